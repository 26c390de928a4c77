"""A run from start to report: what the launcher does, and what each process does."""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import stopping
from orchestrator.checkpoint.storage import AnyPath, locate
from orchestrator.config.schema import RunConfig
from orchestrator.errors import DONE, DamagedDataError, LostPeerError, UserError
from orchestrator.hardware.registry import resolve
from orchestrator.hardware.world import OWN_PREFIX, World, detect
from orchestrator.train import rundir
from orchestrator.train.say import doing, warn

if TYPE_CHECKING:
    from orchestrator.resilience.peers import Peers
    from orchestrator.strategies.base import ParallelStrategy
    from orchestrator.train.build import Job


@dataclass(frozen=True)
class Place:
    """Where the run is kept, as all its processes have agreed."""

    run_dir: Path
    checkpoints: AnyPath
    resume_from: AnyPath | None


def work(config: RunConfig, world: World, settle: Callable[[ParallelStrategy], Place]) -> int:
    """Train as one process of the job.

    Args:
        settle: called when the processes have met, to say where the run is kept.

    Returns:
        0, or `INTERRUPTED` or `TERMINATED` when a signal ended the run early; it can be resumed.

    Raises:
        Stopped: a signal came before the first step.
        LostPeerError: another process has gone or does not answer.
    """

    def tell(text: str) -> None:
        if world.rank == 0:
            doing(text, config)

    tell("loading torch")
    if threading.current_thread() is not threading.main_thread():
        warn("signals are not seen outside of the main thread: a request to stop ends this process unsaved")
    from orchestrator.data.prepare import prepare
    from orchestrator.resilience.peers import Peers
    from orchestrator.train.build import build, make_strategy

    quiet(world.rank)
    with stopping.listening():
        parallel = make_strategy(config, resolve(config.hardware), world)
        if world.size > 1:
            tell(f"waiting for {world.size} processes to meet")
        parallel.join()
        peers = Peers(parallel)
        try:
            with peers.watched():
                place = settle(parallel)
                data = prepare(config.data, progress=False, verify=False)
                facts = rundir.read_run(place.run_dir)
                tell(f"restoring {place.resume_from}" if place.resume_from else "building the model")
                job = build(config, parallel, data, place, leg=len(facts["legs"]))
                peers.follow(lambda: job.module.step)
                # Every rank has read the number of legs before rank 0 adds this one.
                parallel.barrier()
                checked = _hand_over(config, job, place.run_dir)
                return _drive(job, place.run_dir, facts, checked, peers)
        finally:
            parallel.leave()


def _hand_over(config: RunConfig, job: Job, run_dir: Path) -> str | None:
    """Whether the restored model computes what it did where it was saved, in a line; asked before it trains on.

    Raises:
        HandoverError: it does not, and the run is to stop then.
    """
    from orchestrator.train.handover import check_handover, note

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


def _drive(job: Job, run_dir: Path, facts: dict[str, Any], checked: str | None, peers: Peers) -> int:
    # From here on a signal is obeyed after a step, by all ranks at the same one. It may have come to one of them only.
    # A runtime that was started meanwhile may have put handlers of its own into place.
    with stopping.listening(), stopping.deferred():
        if number := job.parallel.start_vote(stopping.requested()).result():
            raise stopping.Stopped(number)
        return _train(job, run_dir, facts, checked, peers)


def _train(job: Job, run_dir: Path, facts: dict[str, Any], checked: str | None, peers: Peers) -> int:
    main = job.parallel.rank == 0
    leg = {**job.leg, "started": time.time()}
    legs = job.history.legs = [*facts["legs"], leg]
    if main:
        rundir.write_run(run_dir, {**facts, **job.facts, "status": "running", "legs": legs})
        _introduce(job, run_dir, checked)
    status = "failed"
    try:
        with peers.explained():
            job.trainer.fit(job.module, job.loader)
            status = "interrupted" if job.stop.stopped else "finished"
            _close(job, status)
    finally:
        job.checkpoints.close()
        job.metrics.close()
        if job.progress:
            job.progress.close()
        if main:
            leg.update(ended=time.time(), end_step=job.module.step)
            rundir.write_run(run_dir, {**facts, **job.facts, "status": status, "legs": legs})
            _report(run_dir)
    if main:
        _conclude(job, run_dir, status)
    return stopping.exit_code(job.stop.stopped) if status == "interrupted" else DONE


def _close(job: Job, status: str) -> None:
    """The last evaluation, checkpoint and sample. An interrupted run is only saved: its time is short."""
    if status == "interrupted" or job.checkpoints.at_end:
        job.say(f"saved {job.checkpoints.save_now(job.module)}")
    if status == "finished":
        job.evaluation.run(job.module)
        sample = textwrap.indent(job.samples.run(job.module), "  | ", lambda line: True)
        job.say(f"\nsample of generated text\n{sample}\n")


def _introduce(job: Job, run_dir: Path, checked: str | None) -> None:
    facts, leg = job.facts, job.leg
    devices = f"{leg['devices']} x {', '.join(leg['device_names'][:1]) or leg['target']}"
    job.say(f"model      {facts['parameters']:,} parameters, vocabulary {facts['vocab_size']:,}")
    job.say(f"hardware   {leg['target']}: {devices}, {leg['precision']}, layout {job.parallel.layout}")
    entropy = facts["unigram_entropy_nats"]
    job.say(f"baseline   unigram entropy {entropy:.3f} nats per token: a model that learns gets below it")
    for name in ("mixture", "validation"):
        for number, line in enumerate(facts[name]):
            job.say(f"{'' if number else name:<10} {line}")
    job.say(f"run        {run_dir}" + (f", resumed at step {leg['start_step']}" if leg["resumed_from"] else ""))
    if checked:
        job.say(f"handover   {checked}")


def _conclude(job: Job, run_dir: Path, status: str) -> None:
    latest = job.metrics.latest
    if latest:
        rate = f"{latest['tokens_per_second']:,.0f} tokens/s"
        print(f"\n{status} at step {job.module.step}: loss {latest['loss']:.4f}, {rate}")
    print(f"report     {run_dir / 'report.html'}")
    print(f"run        {run_dir}")
    if status == "interrupted":
        print(f"continue   python -m orchestrator train resume={run_dir}")


def _report(run_dir: Path) -> None:
    try:
        from orchestrator.observe.report import write_report

        write_report(run_dir)
    except Exception as error:
        # The run is done and saved; a report that cannot be drawn must not turn it into a failure.
        print(f"warning: the report could not be written: {error!r}", file=sys.stderr)


def quiet(rank: int) -> None:
    """Lightning announces devices and tips; the run says what matters itself."""
    import logging
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
    from orchestrator.config.compose import read_config

    run_dir, checkpoints, resume = (os.environ[OWN_PREFIX + name] for name in ("RUN_DIR", "CHECKPOINTS_DIR", "RESUME"))
    world = detect(os.environ) or World()
    try:
        place = Place(Path(run_dir), locate(checkpoints), locate(resume) if resume else None)
        return work(read_config(place.run_dir / rundir.CONFIG), world, lambda parallel: place)
    except UserError as error:
        # All ranks meet the same problem; one says so. Who lost the others may be the only one that is left, and a
        # damaged part of the data is met by whoever reads it.
        if world.rank == 0 or isinstance(error, (LostPeerError, DamagedDataError)):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
