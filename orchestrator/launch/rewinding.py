"""Take a run back to its newest checkpoint in the same process, leave out the data that led astray, and train on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.run_checkpoints import newest_valid
from orchestrator.checkpoint.storage import AnyPath, locate
from orchestrator.data.skipping import Ranges, behind, covered, merged
from orchestrator.data.stream import Position
from orchestrator.distributed import standing
from orchestrator.errors import CheckpointError, RunFailedError
from orchestrator.runs.messages import warn
from orchestrator.runs.record import Record
from orchestrator.strategies.replicas import described
from orchestrator.training.callbacks.replica_check import Corrupted
from orchestrator.training.divergence import Diverged
from orchestrator.training.job import fill, make_trainer
from orchestrator.training.restore import data_position, data_skipped

if TYPE_CHECKING:
    from orchestrator.training.job import Job

_INITIAL = "initial weights"


def rewound(job: Job, found: Diverged, about: dict[str, Any], record: Record) -> Job | None:
    """Take `job` back to before `found`, with the data up to there left out. All ranks call it together.

    Args:
        job: the job of this process, whose trainer has ended.
        found: what was met.
        about: what is known of it, as `aftermath.examine` returns it. Where the run is not taken back although it was
            asked for, the reason is added to its `found`.
        record: of the run.

    Returns:
        The job, with another trainer; None where the run has to stop.

    Raises:
        CheckpointError: the checkpoint that it was to be taken back to cannot be restored.
        RunFailedError: the store does not say which checkpoints there are.
    """
    train = job.resolved.config.train
    if (train.on_spike if found.source == "spike" else train.on_nonfinite) != "rewind":
        return None
    earlier = [entry for leg in record.legs for entry in leg.get("rewinds", [])]
    if refusal := job.parallel.broadcast(_refusal(job, found, earlier)):
        about["found"].append(refusal)
        return None
    before, loader = job.module.step, job.loader
    stop = loader.first(found.step)
    restored, position = _restore(job, found)
    skipped = _skipped(job, restored, position, stop)
    entry = {
        "step": found.step,
        "to": position.step,
        "checkpoint": str(restored.directory) if restored is not None else None,
        "skipped": [position.sequence, skipped[1]],
        "undone_steps": max(before, found.step) - position.step,
        "time": time.time(),
        **{key: about[key] for key in ("source", "values", "what", "found", "diagnosis")},
    }
    loader.move(position, skipped[0])
    record.publish(rewinds=[*record.legs[-1].get("rewinds", []), entry])
    _go_on_from(job, restored, position.step, entry)
    job.say(_text(entry, len(earlier) + 1, train.max_rewinds))
    trainer = make_trainer(job.parallel, job.watchers.callbacks(job.module.guard), train.deterministic)
    return replace(job, trainer=trainer)


def condemn(job: Job, found: Corrupted, record: Record) -> RunFailedError:
    """Keep what was computed since the copies were last the same from being gone on from. All ranks call it together.

    Args:
        job: the job of this process.
        found: which copies differ.
        record: of the run.

    Returns:
        What is to be raised.
    """
    job.watchers.stop.on_train_end(job.trainer, job.module)
    job.watchers.snapshots.clear()
    checkpoints = job.watchers.checkpoints
    try:
        checkpoints.settle()
    except (CheckpointError, Diverged) as error:
        job.say(f"warning: {error}")
    marked = checkpoints.set_aside(found.good, f"written with bits that devices did not hold alike: {found.found}")
    kept = None
    if job.parallel.rank == 0:
        with contextlib.suppress(CheckpointError):
            kept = newest_valid(checkpoints.directory, False, lambda line: None, job.trusted)
    record.note(
        corrupted={
            "step": found.step,
            "good_step": found.good,
            **described(found.found),
            "set_aside": [str(path) for path in marked],
            "checkpoint": str(kept) if kept else None,
        }
    )
    aside = f"; set aside: {', '.join(path.name for path in marked)}" if marked else ""
    return RunFailedError(
        "devices that must hold the same bits do not: one of them computes or stores wrongly",
        got=f"after step {found.step}: {found.found}",
        allowed=f"equal sums over the bits, as after step {found.good}",
        fix=f"take the device out or test it; resume goes on from {kept or 'the beginning'}{aside}",
    )


def _refusal(job: Job, found: Diverged, earlier: Sequence[Mapping[str, Any]]) -> str:
    """Why the run is not taken back; empty where it is."""
    limit = job.resolved.config.train.max_rewinds
    if len(earlier) >= limit:
        return f"the run was taken back {len(earlier)} times already (train.max_rewinds={limit})"
    # Only of those that this run has the data of: a restart may have come before a rewind.
    last = next((one for one in reversed(earlier) if covered(job.loader.skipped, *one["skipped"])), None)
    if last is not None and found.step <= last["step"]:
        return (
            f"the run was taken back from step {last['step']} to {last['to']} already, and has not come further with "
            "other data: the data is not the cause"
        )
    return ""


def _restore(job: Job, found: Diverged) -> tuple[Checkpoint | None, Position]:
    """Fill the model from the newest checkpoint before `found`; where there is none, with its initial weights."""
    parallel, module, resolved = job.parallel, job.module, job.resolved
    verify, trusted = resolved.config.checkpoint.verify_on_load, job.trusted
    told = ["", ""]
    if parallel.rank == 0:
        try:
            directory = job.watchers.checkpoints.directory
            told[0] = str(newest_valid(directory, verify, warn, trusted, until=found.before) or "")
        except CheckpointError as error:
            told[1] = str(error)
    path, problem = parallel.broadcast(told)
    if problem:
        raise RunFailedError(f"the run cannot be taken back: {problem}", fix="resume it when the store answers again")
    where: AnyPath | None = locate(path) if path else None
    if where is None and job.restored is not None and not job.restored.partial:
        where = job.restored.directory
    # What began with a snapshot in memory has come from storage before, or began here.
    where = where or resolved.place.resume_from
    if where is None:
        # Of the run's own: there is no other state to keep in memory beside the new one.
        parallel.optimizers = []
        module.make_optimizer()
    place = replace(resolved.place, resume_from=where)
    restored = fill(replace(resolved, paths=place, takes_older=True), module, job.loader.stream, trusted)
    restored = restored if where is not None else None
    if module.average is not None:
        module.average.begin(restored)
    return restored, data_position(restored, job.loader.stream)


def _skipped(job: Job, restored: Checkpoint | None, position: Position, stop: int) -> tuple[Ranges, int]:
    """Return all that the run leaves out from now on, and where the range ends that was added."""
    loader, least = job.loader, job.resolved.config.train.rewind_skip_steps
    before = merged([*loader.skipped, *data_skipped(restored, loader.stream)])
    least_sequences = loader.sizes.upto(position.step + least) - loader.sizes.upto(position.step)
    stop = max(stop, behind(before, position.sequence, least_sequences))
    return merged([*before, (position.sequence, stop)]), stop


def _go_on_from(job: Job, restored: Checkpoint | None, step: int, entry: Mapping[str, Any]) -> None:
    """Set everything that counts steps back to `step`."""
    module, watchers = job.module, job.watchers
    undone = step + entry["undone_steps"]
    module.step = standing.here.step = step
    module.guard.reset()
    watchers.metrics.rewind(step, undone)
    watchers.evaluation.rewind()
    watchers.samples.rewind()
    watchers.tasks.rewind()
    watchers.spikes.rewind(step)
    watchers.replicas.rewind(step)
    if watchers.progress is not None:
        watchers.progress.rewind(step)
    because = f"the run was taken back from step {entry['step']} to {step}: {entry['what']}"
    watchers.checkpoints.rewind(module, restored, because)


def _text(entry: Mapping[str, Any], number: int, limit: int) -> str:
    first, stop = entry["skipped"]
    origin = entry["checkpoint"] or _INITIAL
    lines = [
        f"rewind     step {entry['step']}: {entry['what']}; back to step {entry['to']} ({origin})",
        *(f"           {line}" for line in entry["found"]),
        f"           sequences {first} to {stop - 1} are left out; rewind {number} of at most {limit}",
    ]
    return "\n".join(lines)
