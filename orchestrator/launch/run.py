"""A run from start to report: what the launcher does, and what each process does."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import stopping
from orchestrator.checkpoint.storage import locate
from orchestrator.checkpoint.store_timeouts import wait_for_stores
from orchestrator.config.schema import RunConfig
from orchestrator.distributed.world import OWN_PREFIX, World, detect
from orchestrator.errors import (
    DIVERGED,
    DONE,
    DamagedDataError,
    LostPeerError,
    PartError,
    UserError,
    error_to_dict,
)
from orchestrator.hardware.target_table import resolve
from orchestrator.output import tell
from orchestrator.runs import run_directory
from orchestrator.runs.messages import doing, say, warn
from orchestrator.runs.record import Record
from orchestrator.runs.run_directory import RunPaths
from orchestrator.runs.shared_folder import check_shared

if TYPE_CHECKING:
    from orchestrator.launch.missing_ranks import RankMonitor
    from orchestrator.strategies.parallel_strategy import ParallelStrategy
    from orchestrator.training.job import Job


ERRORS = "ERRORS"  # variable, behind OWN_PREFIX: the folder where processes leave their errors for the launcher


def work(config: RunConfig, world: World, settle: Callable[[ParallelStrategy], RunPaths]) -> int:
    """Train as one process of the job.

    Args:
        settle: called when the processes have met, to say where the run is kept.

    Returns:
        0; `DIVERGED`; or `INTERRUPTED` or `TERMINATED` when a signal ended the run early; it can be resumed.

    Raises:
        Stopped: a signal came before the first step.
        LostPeerError: another process has gone or does not answer.
    """

    def show(text: str) -> None:
        if world.rank == 0:
            doing(text, config)

    wait_for_stores(config.checkpoint.store_timeout_seconds)
    show("loading torch")
    if threading.current_thread() is not threading.main_thread():
        warn("signals are not seen outside of the main thread: a request to stop ends this process unsaved")
    from orchestrator.data.prepare import prepare
    from orchestrator.launch.missing_ranks import RankMonitor
    from orchestrator.training.job import build, make_strategy

    quiet(world.rank)
    with stopping.listening():
        parallel = make_strategy(config, resolve(config.hardware), world)
        if world.size > 1:
            show(f"waiting for {world.size} processes to meet")
        parallel.join()
        monitor = RankMonitor(parallel)
        try:
            with monitor.watched():
                place = settle(parallel)
                check_shared(place.checkpoints, parallel)
                data = prepare(config.data, progress=False, verify=False)
                # As rank 0 reads it: not every host need see the run directory.
                facts = parallel.broadcast(run_directory.read_run(place.run_dir))
                show(f"restoring {place.resume_from}" if place.resume_from else "building the model")
                job = build(config, parallel, data, place, leg=len(facts["legs"]))
                monitor.follow(lambda: job.module.step)
                checked = _hand_over(config, job, place.run_dir)
                return _drive(job, place.run_dir, facts, checked, monitor)
        finally:
            parallel.leave()


def _hand_over(config: RunConfig, job: Job, run_dir: Path) -> str | None:
    """Whether the restored model computes what it did where it was saved, in a line; asked before it trains on.

    Raises:
        HandoverError: it does not, and the run is to stop then.
    """
    from orchestrator.training.handover_check import check_handover, note

    settings = config.checkpoint.handover
    if job.restored is None or not settings.enabled:
        return None
    module = job.module
    result = check_handover(job.restored, module.model, module.configure_optimizers(), job.parallel, job.leg)
    # All ranks stop or none.
    refused = job.parallel.any_raised(result.verdict == "differs") and settings.on_mismatch == "stop"
    entry = {**result.to_dict(), "went_on": not refused}
    job.leg["handover"] = {key: value for key, value in entry.items() if key not in ("from", "to")}
    if job.parallel.rank == 0:
        note(run_dir, {"leg": job.leg["leg"], "checkpoint": str(job.restored.directory), **entry})
    if refused:
        if job.parallel.rank == 0:
            _report(run_dir)
        raise result.error()
    return str(result)


def _drive(job: Job, run_dir: Path, facts: dict[str, Any], checked: str | None, monitor: RankMonitor) -> int:
    # From here on a signal is obeyed after a step, by all ranks at the same one. It may have come to one of them only.
    # A runtime that was started meanwhile may have put handlers of its own into place.
    with stopping.listening(), stopping.deferred():
        if number := job.parallel.start_vote(stopping.requested()).result():
            raise stopping.Stopped(number)
        return _train(job, run_dir, facts, checked, monitor)


def _train(job: Job, run_dir: Path, facts: dict[str, Any], checked: str | None, monitor: RankMonitor) -> int:
    main = job.parallel.rank == 0
    record = Record(run_dir, {**facts, **job.facts}, job.leg, job.channels, main)
    job.history.legs = record.legs
    status, left_out = "failed", list[str]()
    with contextlib.ExitStack() as ending:  # in reverse order, each of it whatever becomes of the others
        if main:
            ending.callback(_report, run_dir)
        ending.callback(job.progress.close if job.progress else int)
        ending.callback(job.channels.close)
        ending.callback(lambda: record.end(status, job.module.step, left_out))
        ending.callback(job.checkpoints.close)
        record.begin()
        if main:
            _introduce(job, run_dir, checked)
        with monitor.explained():
            status = _work_through(job, run_dir, record, left_out)
    if main and status == "diverged":
        _conclude_diverged(run_dir, record)
    elif main:
        _conclude(job, run_dir, status, left_out)
    if status == "diverged":
        return DIVERGED
    return stopping.exit_code(job.stop.stopped) if status == "interrupted" or left_out else DONE


def _work_through(job: Job, run_dir: Path, record: Record, left_out: list[str]) -> str:
    """Train, save and look back. Returns the run's status; what there was no time for is in `left_out`."""
    from orchestrator.launch.aftermath import examine
    from orchestrator.runs.own_parts import blamed
    from orchestrator.training.divergence import Diverged

    try:
        if not _all_steps_done(job):
            with blamed(job.own_callbacks):
                job.trainer.fit(job.module, job.loader)
        _save(job, record)
        if _all_steps_done(job):
            left_out += ["evaluation", "sample"]
            _look_back(job, left_out)
        status = "finished" if _all_steps_done(job) else "interrupted"
    except Diverged as found:
        left_out.clear()
        job.stop.on_train_end(job.trainer, job.module)
        record.note(diverged=examine(job, found, run_dir))
        status = "diverged"
    if skipped := job.module.guard.skipped:
        record.note(skipped_steps=skipped)
    return status


def _all_steps_done(job: Job) -> bool:
    return job.module.step >= job.module.config.train.max_steps


def _save(job: Job, record: Record) -> None:
    """The last checkpoint. A run is finished or interrupted when it is written, and failed where it cannot be.

    Raises:
        CheckpointError: it could not be written.
    """
    trained = job.module.step > job.leg["start_step"]
    if trained and (job.checkpoints.at_end or not _all_steps_done(job)):
        path = job.checkpoints.save_now(job.module)
        job.say(f"saved {path}")
        if job.checkpoints.elsewhere:
            record.note(saved_elsewhere={"checkpoint": str(path), "because": job.checkpoints.elsewhere})
    else:
        job.checkpoints.settle()


def _look_back(job: Job, left_out: list[str]) -> None:
    """The last evaluation and sample; what is done leaves the list. With a signal to stop the time for it is short."""
    for what, action in (("evaluation", _evaluate), ("sample", _sample)):
        if job.stop.ask():
            return
        action(job)
        left_out.remove(what)


def _evaluate(job: Job) -> None:
    job.evaluation.run(job.module)


def _sample(job: Job) -> None:
    sample = job.samples.run(job.module)
    if sample is not None:
        sample = textwrap.indent(sample, "  | ", lambda line: True)
        job.say(f"\nsample of generated text\n{sample}\n")


def _introduce(job: Job, run_dir: Path, checked: str | None) -> None:
    facts, leg = job.facts, job.leg
    devices = f"{leg['devices']} x {', '.join(leg['device_names'][:1]) or leg['target']}"
    job.say(f"model      {facts['parameters']:,} parameters, vocabulary {facts['vocab_size']:,}")
    job.say(f"hardware   {leg['target']}: {devices}, {leg['precision']}, layout {job.parallel.layout}")
    entropy = facts["unigram_entropy_nats"]
    job.say(f"baseline   unigram entropy {entropy:.3f} nats per token; the loss should fall below this")
    for name in ("mixture", "validation"):
        for number, line in enumerate(facts[name]):
            job.say(f"{'' if number else name:<10} {line}")
    job.say(f"run        {run_dir}" + (f", resumed at step {leg['start_step']}" if leg["resumed_from"] else ""))
    if checked:
        job.say(f"handover   {checked}")


def _conclude(job: Job, run_dir: Path, status: str, left_out: list[str]) -> None:
    latest = job.metrics.latest
    numbers = ""
    if latest:
        loss = "not finite" if latest["loss"] is None else f"{latest['loss']:.4f}"  # of a step that was left out
        numbers = f": loss {loss}, {latest['tokens_per_second']:,.0f} tokens/s"
    say(f"\n{status} at step {job.module.step}{numbers}")
    say(f"report     {run_dir / 'report.html'}")
    say(f"run        {run_dir}")
    if left_out:
        say(f"left out   the last {' and '.join(left_out)}: asked to stop. Resuming does that, and trains no more")
    if job.checkpoints.elsewhere and job.checkpoints.saved:
        last = job.checkpoints.saved[1]
        say(f"saved      in {last}, and not in {job.checkpoints.directory}, which did not take it")
        say(f"continue   python -m orchestrator train resume={last}")
    elif left_out or status == "interrupted":
        say(f"continue   python -m orchestrator train resume={run_dir}")


def _conclude_diverged(run_dir: Path, record: Record) -> None:
    from orchestrator.launch.aftermath import text

    tell(f"\n{text(record.legs[-1]['diverged'])}")
    say(f"report     {run_dir / 'report.html'}")
    say(f"run        {run_dir}")


def _report(run_dir: Path) -> None:
    try:
        from orchestrator.report.run_report import write_report

        write_report(run_dir)
    except Exception as error:
        # The run is done and saved; a report that cannot be drawn must not turn it into a failure.
        warn(f"the report could not be written: {error!r}")


def quiet(rank: int) -> None:
    """Lightning announces devices and tips; the run says what matters itself."""
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*(num_workers|does not have many workers|logging interval|srun).*")
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
    from orchestrator.config.compose import read_config

    registry.permit(json.loads(os.environ.get(OWN_PREFIX + "PARTS", "[]")))
    run_dir, checkpoints, resume = (os.environ[OWN_PREFIX + name] for name in ("RUN_DIR", "CHECKPOINTS_DIR", "RESUME"))
    world = detect(os.environ) or World()
    try:
        place = RunPaths(Path(run_dir), locate(checkpoints), locate(resume) if resume else None)
        return work(read_config(place.run_dir / run_directory.CONFIG), world, lambda parallel: place)
    except UserError as error:
        # All ranks meet the same problem; one says so. Who lost the others may be the only one that is left, and a
        # damaged part of the data is met by whoever reads it.
        if world.rank == 0 or isinstance(error, (LostPeerError, DamagedDataError, PartError)):
            tell(str(error), level=logging.ERROR)
        if folder := os.environ.get(OWN_PREFIX + ERRORS):
            Path(folder, f"{world.rank}.json").write_text(json.dumps(error_to_dict(error)))
        return error.exit_code
