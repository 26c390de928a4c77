"""A run from start to report: the part of the launcher, and the part of each process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import stopping
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.signing import Trust, trust
from orchestrator.checkpoint.store_timeouts import wait_for_stores
from orchestrator.data.prepare import PreparedData, prepare
from orchestrator.distributed import standing
from orchestrator.distributed.world import OWN_PREFIX, World, detect
from orchestrator.errors import (
    DIVERGED,
    DONE,
    DamagedDataError,
    DataError,
    LostPeerError,
    PartError,
    UserError,
)
from orchestrator.hardware.target import Target
from orchestrator.launch import rejoining
from orchestrator.launch.deadline import note_time_left, noticed, prepare_last_save
from orchestrator.launch.export_metrics import export_metrics, measure_energy
from orchestrator.launch.failure_notes import leave_note
from orchestrator.output import tell
from orchestrator.report.run_time import goodput_line
from orchestrator.runs import run_directory, time_book
from orchestrator.runs.attempts import attempt_folder
from orchestrator.runs.messages import doing, say, warn
from orchestrator.runs.record import Record
from orchestrator.runs.shared_folder import check_shared
from orchestrator.runs.time_book import TimeBook
from orchestrator.training.resolved import Resolved, read_resolved

if TYPE_CHECKING:
    from orchestrator.launch.missing_ranks import RankMonitor
    from orchestrator.strategies.parallel_strategy import ParallelStrategy
    from orchestrator.training.job import Job


# A variable, behind OWN_PREFIX: the run directory.
RUN_DIR = "RUN_DIR"


@dataclass(frozen=True)
class Opened:
    """What of a run this process has opened: each once, and handed on to whoever needs it.

    Attributes:
        target: whose devices the run uses, looked at.
        trusted: whose checkpoints are believed.
        data: what the run learns from; None where it is not open yet.
        checkpoint: that the run goes on or starts from; None where it is not open yet.
    """

    target: Target
    trusted: Trust
    data: PreparedData | None = None
    checkpoint: Checkpoint | None = None

    @classmethod
    def of(cls, resolved: Resolved) -> Opened:
        """Open what a process needs that was given no more than the record.

        Args:
            resolved: the run.
        """
        settings = resolved.config.checkpoint
        return cls(resolved.target(), trust(settings.trusted_keys, settings.require_signature))


def work(resolved: Resolved, world: World, opened: Opened | None = None) -> int:
    """Train as one process of the job, in the run directory that the launcher has opened.

    Args:
        resolved: the run.
        world: this process among the job's.
        opened: what this process has opened already.

    Returns:
        0; `DIVERGED`; or `INTERRUPTED` or `TERMINATED` when a signal ended the run early; it can be resumed.

    Raises:
        Stopped: a signal came before the first step.
        LostPeerError: another process has gone or does not answer.
    """
    opened = opened or Opened.of(resolved)
    with joined(resolved, world, opened.target) as (parallel, monitor):
        return train(resolved, parallel, monitor, opened)


@contextlib.contextmanager
def joined(resolved: Resolved, world: World, target: Target) -> Iterator[tuple[ParallelStrategy, RankMonitor]]:
    """Within it this process is one of the job's: they have met, and each notices when another one is gone.

    Args:
        resolved: the run. Its layout and precision have to be those of the other processes: the mesh is made of them.
        world: this process among the job's.
        target: whose devices the run uses.
    """
    wait_for_stores(resolved.config.checkpoint.store_timeout_seconds)
    _show(world.rank, "loading torch", resolved)
    if threading.current_thread() is not threading.main_thread():
        warn("signals are not seen outside of the main thread: a request to stop ends this process unsaved")
    from orchestrator.launch.missing_ranks import RankMonitor
    from orchestrator.training.job import make_strategy

    quiet(world.rank)
    with stopping.listening():
        parallel = make_strategy(resolved, target, world)
        if world.size > 1:
            _show(world.rank, f"waiting for {world.size} processes to meet", resolved)
        parallel.join()
        # The product's own launcher watches from outside.
        watched_outside = not world.store.startswith("tcp:")
        monitor = RankMonitor(parallel, None if watched_outside else resolved.config.hardware.timeout_seconds)
        try:
            with monitor.watched(), noticed(resolved.config.launch, parallel, world):
                yield parallel, monitor
        finally:
            parallel.leave()


def train(resolved: Resolved, parallel: ParallelStrategy, monitor: RankMonitor, opened: Opened) -> int:
    """Train, from the run directory that is open to its report. Returns what `work` does.

    Args:
        resolved: the run.
        parallel: the strategy.
        monitor: this process's sign of life.
        opened: what the launcher has opened already, or this process itself.
    """
    from orchestrator.training.job import build

    place = resolved.place
    # As rank 0 reads it: not every host need see the run directory.
    facts = parallel.broadcast(run_directory.read_run(place.run_dir))
    under_way = rejoining.leg_under_way(facts)
    leg = len(facts["legs"])
    monitor.keep_stacks_in(attempt_folder(place.run_dir, facts))
    with time_book.keep(place.run_dir if parallel.speaks else None, leg) as book:
        standing.enter(standing.LOADING)
        before = place.resume_from if place.resume_from and place.resume_from.parent == place.checkpoints else None
        check_shared(place.checkpoints, parallel, known=before / MANIFEST if before else None)
        data = opened.data or _open_data(resolved)
        _show(parallel.rank, f"restoring {place.resume_from}" if place.resume_from else "building the model", resolved)
        job = build(resolved, parallel, data, leg, opened.trusted, opened.checkpoint, facts["legs"])
        job.leg.update(under_way)
        standing.here.step = job.module.step
        checked = _hand_over(job)
        return _drive(job, facts, checked, monitor, book)


def _open_data(resolved: Resolved) -> PreparedData:
    """Open what the launcher has prepared and checked.

    Raises:
        DataError: it is not that any more.
    """
    data = prepare(resolved.config.data, progress=False, verify=False)
    if resolved.data and data.fingerprint != resolved.data:
        raise DataError(
            "the data was changed while the run was being started",
            got=f"fingerprint {data.fingerprint[:12]}",
            allowed=f"fingerprint {resolved.data[:12]}, which was checked",
            fix="start it again when nobody writes to the data",
        )
    return data


def _show(rank: int, text: str, resolved: Resolved) -> None:
    if rank == 0:
        doing(text, resolved.config)


def _hand_over(job: Job) -> str | None:
    """Whether the restored model computes what it did where it was saved, in a line; asked before it trains on.

    Raises:
        HandoverError: it does not, and the run is to stop then.
    """
    from orchestrator.training.handover_check import check_handover, note

    settings, run_dir = job.resolved.config.checkpoint.handover, job.resolved.place.run_dir
    if job.restored is None or not settings.enabled:
        return None
    if job.island is not None and job.island.welcome.start != "replay":
        return None  # its weights are those of the run now, which the hub compares
    module = job.module
    result = check_handover(job.restored, module.model, module.configure_optimizers(), job.parallel, job.leg)
    # All ranks stop or none.
    refused = job.parallel.any_raised(result.verdict == "differs") and settings.on_mismatch == "stop"
    entry = {**result.to_dict(), "went_on": not refused}
    job.leg["handover"] = {key: value for key, value in entry.items() if key not in ("from", "to")}
    if job.parallel.speaks:
        note(run_dir, {"leg": job.leg["leg"], "checkpoint": str(job.restored.directory), **entry})
    if refused:
        if job.parallel.speaks:
            _report(run_dir)
        raise result.error()
    return str(result)


def _drive(job: Job, facts: dict[str, Any], checked: str | None, monitor: RankMonitor, book: TimeBook) -> int:
    # From here on a signal is obeyed after a step, by all ranks at the same one. It may have come to one of them only.
    # A runtime that was started meanwhile may have put handlers of its own into place.
    with stopping.listening(), stopping.deferred():
        if number := job.parallel.start_vote(stopping.requested()).result():
            raise stopping.Stopped(number)
        standing.enter(standing.COMPILING)
        return _go_through(job, facts, checked, monitor, book)


def _go_through(job: Job, facts: dict[str, Any], checked: str | None, monitor: RankMonitor, book: TimeBook) -> int:
    main, run_dir = job.parallel.rank == 0, job.resolved.place.run_dir
    record = Record(
        run_dir, {**facts, **job.facts}, job.leg, job.watchers.channels, main, book, lambda: job.parallel.speaks
    )
    job.watchers.copies.record = record.publish
    job.watchers.history.legs, job.watchers.history.times = record.legs, book.carried
    status, left_out = "failed", list[str]()
    with contextlib.ExitStack() as ending:  # in reverse order, each of it whatever becomes of the others
        ending.callback(lambda: _report(run_dir) if job.parallel.speaks else None)
        ending.callback(job.watchers.progress.close if job.watchers.progress else int)
        ending.callback(job.watchers.channels.close)
        ending.callback(lambda: rejoining.end(job, record, status, left_out))
        ending.callback(job.watchers.checkpoints.close)
        ending.callback(lambda: job.island.close(status == "diverged") if job.island else None)
        ending.callback(job.watchers.snapshots.close)
        ending.callback(measure_energy(job, record))
        record.begin()
        export_metrics(job, book)
        if job.parallel.speaks:
            _introduce(job, run_dir, checked)
        with monitor.explained():
            status = _work_through(job, run_dir, record, left_out)
    if job.parallel.speaks and status == "diverged":
        from orchestrator.launch.aftermath import conclude

        conclude(run_dir, record.legs[-1]["diverged"])
    elif job.parallel.speaks:
        _conclude(job, run_dir, status, left_out, book)
    if status == "diverged":
        return DIVERGED
    return stopping.exit_code(job.watchers.stop.stopped) if status == "interrupted" or left_out else DONE


def _work_through(job: Job, run_dir: Path, record: Record, left_out: list[str]) -> str:
    """Train, save and look back. Returns the run's status; what there was no time for is in `left_out`."""
    from orchestrator.launch.aftermath import examine
    from orchestrator.launch.rewinding import condemn, rewound
    from orchestrator.training.callbacks.replica_check import Corrupted
    from orchestrator.training.divergence import Diverged

    status = ""
    while not status:
        try:
            _train_through(job, record, left_out)
            status = _status(job)
        except Diverged as found:
            left_out.clear()
            standing.enter(standing.LOADING)  # one long piece, also where the step is compiled to be looked at
            job.watchers.stop.on_train_end(job.trainer, job.module)
            job.watchers.snapshots.clear()
            about = examine(job, found, run_dir)
            again = rewound(job, found, about, record)
            if again is None:
                job.watchers.snapshots.finish()
                record.note(diverged=about)
                status = "diverged"
            job = again or job
        except Corrupted as found:
            raise condemn(job, found, record) from found
    if spikes := job.watchers.spikes.found:
        record.note(spikes=spikes)
    if seconds := job.watchers.replicas.seconds:
        record.note(replica_checks={"checks": len(seconds), "seconds": round(sum(seconds), 3)})
    if skipped := job.module.guard.skipped:
        record.note(skipped_steps=skipped)
    return status


def _train_through(job: Job, record: Record, left_out: list[str]) -> None:
    from orchestrator.runs.own_parts import blamed

    if not _all_steps_done(job):
        if not rejoining.catch_up(job):
            return  # the others are concluding the run
        island = job.island.fitting(job.watchers.stop) if job.island else contextlib.nullcontext()
        with blamed(job.watchers.own), island:
            job.trainer.fit(job.module, job.loader)
    standing.enter(standing.ENDING)
    if job.island is not None:
        job.island.prepare_end()
    job.parallel.by_one(lambda: _save(job, record))
    job.watchers.snapshots.finish()
    if _all_steps_done(job) and (job.island is None or job.island.leads):
        left_out += ["evaluation", "sample"]
        _look_back(job, left_out)
    if job.island is not None:
        job.island.conclude("finished" if _all_steps_done(job) else "stopped")
    job.parallel.by_one(lambda: None)  # who of those that are left concludes


def _status(job: Job) -> str:
    if _all_steps_done(job):
        return "finished"
    return run_directory.PRUNED if job.watchers.pruning.pruned and not job.watchers.stop.stopped else "interrupted"


def _all_steps_done(job: Job) -> bool:
    return job.done


def _save(job: Job, record: Record) -> None:
    """Save the last checkpoint. A run has ended as it should when it is written, and failed where it cannot be.

    Raises:
        CheckpointError: it could not be written.
    """
    # What only the memory of the hosts has is not kept yet.
    trained = job.module.step > job.leg["start_step"] or job.leg.get("restored_from") == "memory"
    prepare_last_save(job, record)
    if trained and (job.watchers.checkpoints.at_end or _status(job) == "interrupted"):
        path = job.watchers.checkpoints.save_now(job.module)
        job.say(f"saved {path}")
        if job.watchers.checkpoints.elsewhere:
            record.note(saved_elsewhere={"checkpoint": str(path), "because": job.watchers.checkpoints.elsewhere})
        note_time_left(job, record)
    else:
        job.watchers.checkpoints.settle()


def _look_back(job: Job, left_out: list[str]) -> None:
    """Run the last evaluation and sample; what is done leaves the list. After a signal the time for it is short."""
    for what, action in (("evaluation", _evaluate), ("sample", _sample)):
        if job.watchers.stop.ask():
            return
        action(job)
        left_out.remove(what)


def _evaluate(job: Job) -> None:
    job.watchers.evaluation.run(job.module)
    job.watchers.tasks.run(job.module)


def _sample(job: Job) -> None:
    sample = job.watchers.samples.run(job.module)
    if sample is not None:
        sample = textwrap.indent(sample, "  | ", lambda line: True)
        job.say(f"\nsample of generated text\n{sample}\n")


def _introduce(job: Job, run_dir: Path, checked: str | None) -> None:
    facts, leg = job.facts, job.leg
    devices = f"{leg['devices']} x {', '.join(leg['device_names'][:1]) or leg['target']}"
    total, active = facts["parameters"], facts["active_parameters"]
    some = f", {active:,} active for a token" if active != total else ""
    some += f", {trained:,} of them trained, in adapters" if (trained := facts.get("trained_parameters")) else ""
    job.say(f"model      {total:,} parameters{some}, vocabulary {facts['vocab_size']:,}")
    precision, layout = job.parallel.describe_precision(), job.parallel.job_layout
    job.say(f"hardware   {leg['target']}: {devices}, {precision}, layout {layout}")
    for number, line in enumerate(job.module.groups):
        job.say(f"{'' if number else 'groups':<10} {line}")
    entropy = facts["unigram_entropy_nats"]
    job.say(f"baseline   unigram entropy {entropy:.3f} nats per token; the loss should fall below this")
    for name in ("mixture", "packing", "validation"):
        for number, line in enumerate(facts[name]):
            job.say(f"{'' if number else name:<10} {line}")
    job.say(f"run        {run_dir}" + (f", resumed at step {leg['start_step']}" if leg["resumed_from"] else ""))
    if checked:
        job.say(f"handover   {checked}")


def _conclude(job: Job, run_dir: Path, status: str, left_out: list[str], book: TimeBook) -> None:
    latest = job.watchers.metrics.latest
    numbers = ""
    if latest:
        loss = "not finite" if latest["loss"] is None else f"{latest['loss']:.4f}"  # of a step that was left out
        numbers = f": loss {loss}, {latest['tokens_per_second']:,.0f} tokens/s"
    say(f"\n{status} at step {job.module.step}{numbers}")
    say(f"goodput    {goodput_line(book.book())}")
    say(f"report     {run_dir / 'report.html'}")
    say(f"run        {run_dir}")
    if left_out:
        say(f"left out   the last {' and '.join(left_out)}: asked to stop. Resuming does that, and trains no more")
    if job.watchers.checkpoints.elsewhere and job.watchers.checkpoints.saved:
        last = job.watchers.checkpoints.saved[1]
        say(f"saved      in {last}, and not in {job.watchers.checkpoints.directory}, which did not take it")
        say(f"continue   python -m orchestrator train resume={last}")
    elif left_out or status == "interrupted":
        say(f"continue   python -m orchestrator train resume={run_dir}")


def _report(run_dir: Path) -> None:
    try:
        from orchestrator.report.run_report import write_report

        write_report(run_dir)
    except Exception as error:
        # The run is done and saved; a report that cannot be drawn must not turn it into a failure.
        warn(f"the report could not be written: {error!r}")


def quiet(rank: int) -> None:
    """Silence Lightning's announcements of devices and its tips; the run says what matters itself.

    Args:
        rank: of this process.
    """
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message=r".*(num_workers|does not have many workers|logging interval|srun|no `val_dataloader`).*"
    )
    warnings.filterwarnings("ignore", message=r".*`?isinstance\(treespec.*")
    # FSDP2 warns of in-place operations on an embedding's output, of which there are none; torch_xla of its own code.
    warnings.filterwarnings(
        "ignore", message=r"(?s).*(returned a view tensor|non-tuple sequence for multidimensional).*"
    )
    if rank:
        warnings.filterwarnings("ignore")


def train_worker() -> int:
    """Be one process of a run that the product's own launcher started."""
    from orchestrator.config import registry

    # What of the configuration is the user's own code no file may say.
    registry.permit(json.loads(os.environ.get(OWN_PREFIX + "PARTS", "[]")))
    world = detect(os.environ) or World()
    try:
        rejoining.end_with_supervisor()
        return work(rejoining.from_newest(read_resolved(Path(os.environ[OWN_PREFIX + RUN_DIR]))), world)
    except UserError as error:
        # All ranks meet the same problem; one says so. Who lost the others may be the only one that is left, and a
        # damaged part of the data is met by whoever reads it.
        if world.rank == 0 or isinstance(error, (LostPeerError, DamagedDataError, PartError)):
            tell(str(error), level=logging.ERROR)
        leave_note(world.rank, error)
        return error.exit_code
    except Exception as error:
        leave_note(world.rank, error)
        raise
