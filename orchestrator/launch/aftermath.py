"""Find out why a run diverged, keep it in the run's record, and tell the user."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.run_checkpoints import open_newest
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.errors import CheckpointError, UserError
from orchestrator.launch.changes import changes, differing
from orchestrator.optim.schedule import warmup_steps
from orchestrator.output import tell
from orchestrator.runs.messages import say
from orchestrator.training.diagnosis import Diagnosis, diagnose, find_nonfinite
from orchestrator.training.divergence import Diverged

if TYPE_CHECKING:
    from orchestrator.training.job import Job

_EARLY_STEPS = 200  # a run that diverges by then may have needed a longer warm-up
_SLOWER = 3.0


def examine(job: Job, found: Diverged, run_dir: Path) -> dict[str, Any]:
    """Find out where the numbers of `job` stopped being finite. All ranks call it together, after the trainer's end.

    A save that is under way ends first. Rows of steps after the bad one, which had no effect, are dropped.

    Args:
        job: the job of this process.
        found: what was not finite.
        run_dir: the run's directory.

    Returns:
        JSON data for the run's record: `step`, `source`, `values` as text, `found` (sentences), `diagnosis`,
        `checkpoint` (the newest one of the run, which is finite; None where there is none), `resume` (what to go on
        from; None where to begin anew), `changed` (options that this leg had and the configuration there has not) and
        `advice` (pairs of options and reasons).
    """
    module, parallel = job.module, job.parallel
    job.watchers.metrics.forget_after(found.step)
    job.watchers.metrics.flush()
    try:
        job.watchers.checkpoints.settle()
    except Diverged:
        pass  # it was refused for the same reason
    except CheckpointError as error:
        job.say(f"warning: {error}")
    problem, diagnosis = "", None
    try:
        if found.source == "spike":
            diagnosis = None  # every number is finite
        elif found.source == "step":
            diagnosis = diagnose(module, job.loader.step(found.step - 1), found.step, found.own)
        else:
            shards = parallel.state_shards(module.model, module.optimizer)
            diagnosis = Diagnosis(state=tuple(find_nonfinite(shards, parallel)))
    except Exception as error:  # as out of memory: what is known already must be said all the same
        problem = f"the step could not be computed a second time: {error!r}"[:300]
    told = [text for text in (str(found.__cause__ or "").partition("\n")[0], problem) if text]
    if diagnosis is not None:
        told += diagnosis.lines(parallel.size) if found.source == "step" else _state_lines(diagnosis)
    kept = start = None
    if parallel.rank == 0:  # whose words are kept
        kept = start = _newest(job)
        again = found.source in ("step", "spike") and (diagnosis is None or diagnosis.reproduced)
        if kept is not None and again:
            start = _before(job, kept, found.before)
    before = _config_of(start) if start is not None else to_dict(job.resolved.asked)
    return {
        "step": found.step,
        "source": found.source,
        "values": {name: str(value) for name, value in found.values.items()},
        "what": found.what,
        "found": told,
        "diagnosis": diagnosis.to_dict() if diagnosis else None,
        "checkpoint": str(kept.directory) if kept is not None else None,
        "start": str(start.directory) if start is not None else None,
        "resume": _resume(job, start, run_dir),
        "changed": changed(before, job.resolved.asked, start.step) if start is not None else [],
        "advice": advise(module.config, before, parallel.precision, found, diagnosis, start is not None),
    }


def text(about: Mapping[str, Any]) -> str:
    """Return what the user is told, for a terminal.

    Args:
        about: as `examine` returns it.
    """
    lines = [f"diverged at step {about['step']}: {about['what']}"]
    lines += [f"  where:   {line}" if not index else f"           {line}" for index, line in enumerate(about["found"])]
    kept = about["checkpoint"]
    lines.append(f"  kept:    {kept}, finite; nothing was saved after it" if kept else "  kept:    no checkpoint yet")
    if kept and kept != about["start"]:
        lines.append("           whose weights gave these numbers: whatever the options, they would again")
    (options, reason), *others = about["advice"]
    resume = f"resume={about['resume']}"
    start = f"python -m orchestrator train {shlex.quote(resume)}" if about["resume"] else "start it again, with"
    given = [shlex.quote(word) for word in about["changed"] if word.partition("=")[0] != options.partition("=")[0]]
    lines.append(f"  do:      {' '.join([start, *given, *([options] if options else [])])}")
    lines.append(f"           {reason}")
    lines += [f"           or {options}: {reason}" for options, reason in others]
    return "\n".join(lines)


def changed(before: Mapping[str, Any], config: RunConfig, step: int) -> list[str]:
    """Options that make a run that goes on from `step` with the configuration `before` the run of `config`."""
    kept_apart = ("resume", "resume_allow", "runs_dir")
    found = [
        f"{key}={_as_word(value)}"
        for key, _, value in differing(before, to_dict(config))
        if key not in kept_apart and not isinstance(value, (Mapping, list, tuple))
    ]
    with contextlib.suppress(UserError):  # of a version with other keys
        needs = {change.needs for change in changes(from_dict(RunConfig, dict(before)), config, step)} - {None}
        found += [f"resume_allow=[{','.join(sorted(map(str, needs)))}]"] if needs else []
    return [f"runs_dir={config.runs_dir}", *found] if config.runs_dir != RunConfig.runs_dir else found


def _as_word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def advise(
    config: RunConfig,
    before: Mapping[str, Any],
    precision: str,
    diverged: Diverged,
    diagnosis: Diagnosis | None,
    resumes: bool,
) -> list[tuple[str, str]]:
    """List options to try, the likeliest help first, each with the reason. Never empty.

    Args:
        config: of the run.
        before: configuration of the checkpoint that the run can go on from.
        precision: of the matrix products.
        diverged: what was not finite.
        diagnosis: of the step; None where none was made.
        resumes: there is such a checkpoint.
    """
    optim, train = config.optim, config.train
    found = []
    if diagnosis is not None and not diagnosis.state and not diagnosis.reproduced:
        found.append(("", "unchanged, as the step was finite the second time; if it comes back, test the hardware"))
    earlier = before.get("optim", {}).get("lr")
    if isinstance(earlier, float) and 0 < earlier < optim.lr:
        found.append((f"optim.lr={earlier:g}", f"the learning rate from before; it was {optim.lr:g} now"))
    else:
        found.append((f"optim.lr={optim.lr / _SLOWER:.1g}", f"a lower learning rate; it was {optim.lr:g}"))
    warmup = warmup_steps(config)
    if diverged.step <= max(_EARLY_STEPS, 2 * warmup):
        longer = max(_EARLY_STEPS, 4 * warmup)
        allow = " 'resume_allow=[schedule]'" if resumes else ""
        found.append((f"optim.schedule.warmup_steps={longer}{allow}", f"a longer warm-up; it was {warmup} steps"))
    if optim.grad_clip is None or optim.grad_clip > 1.0:
        was = "they were not clipped" if optim.grad_clip is None else f"they were clipped to {optim.grad_clip:g}"
        found.append(("optim.grad_clip=1.0", f"smaller gradients; {was}"))
    if precision != "fp32":
        found.append(("hardware.precision=fp32", "tells whether the precision is the cause"))
    if train.on_nonfinite == "stop" and diverged.source == "step":
        found.append(("train.on_nonfinite=skip", "leaves such batches out, where they are rare"))
        found.append(("train.on_nonfinite=rewind", "goes back by itself, and leaves out the data up to there"))
    return found


def _state_lines(diagnosis: Diagnosis) -> list[str]:
    names = ", ".join(diagnosis.state[:4])
    return [f"not finite: {names}" if names else "weights and optimizer state are finite"]


def _newest(job: Job) -> Checkpoint | None:
    """Return the checkpoint that the run can be resumed from."""
    try:
        return open_newest(job.watchers.checkpoints.directory, False, lambda line: None) or _restored(job)
    except CheckpointError:
        return _restored(job)


def _restored(job: Job) -> Checkpoint | None:
    """Return the checkpoint that this leg began with; none where it was a snapshot in memory, which has gone since."""
    return None if job.restored is None or job.restored.partial else job.restored


def _before(job: Job, kept: Checkpoint, step: int) -> Checkpoint | None:
    """`kept`, if it is older than `step`, else the newest one that is: the weights of `step` are the bad step's."""
    found: Checkpoint | None = kept
    with contextlib.suppress(CheckpointError):
        while found is not None and found.step >= step:
            older = None
            if found.directory.parent == job.watchers.checkpoints.directory:
                older = open_newest(found.directory.parent, False, lambda line: None, before=found.directory)
            found = older
    if found is not None and found.step >= step:
        found = None
    restored = _restored(job)
    return restored if found is None and restored is not None and restored.step < step else found


def _resume(job: Job, start: Checkpoint | None, run_dir: Path) -> str | None:
    if start is None:
        return None
    # A run directory means its newest one. A run that branched off, and has saved nothing yet, begins there again.
    newest = _newest(job)
    own = start.directory.parent == job.watchers.checkpoints.directory
    return str(run_dir if own and newest is not None and newest.step == start.step else start.directory)


def _config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        return checkpoint.config()
    except CheckpointError:
        return {}


def conclude(run_dir: Path, about: Mapping[str, Any]) -> None:
    """Say how a run has diverged, and where that is described.

    Args:
        run_dir: of the run.
        about: as `examine` returns it.
    """
    tell(f"\n{text(about)}")
    say(f"report     {run_dir / 'report.html'}")
    say(f"run        {run_dir}")
