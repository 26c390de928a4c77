"""Snapshots in the memory of the hosts, for a run: opened at its start, and restored where they are the newest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.host_memory import HostMemory
from orchestrator.checkpoint.memory_restore import Snapshot, files_for, find_snapshots
from orchestrator.checkpoint.run_checkpoints import step_of
from orchestrator.checkpoint.signing import Trust
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.config.validate import check_stored
from orchestrator.data.stream import TokenStream
from orchestrator.errors import CheckpointError, UserError
from orchestrator.runs import identity
from orchestrator.runs.messages import warn
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.module import LanguageModule
from orchestrator.training.resolved import Resolved, flat
from orchestrator.training.restore import check_run_of, fill

LEG = "leg"  # of a snapshot's state: which start of the run wrote it
# What the steps that follow depend on. Where the data lies is not: its fingerprint is compared.
_COMPUTED = ("model.", "optim.", "train.", "data.", "seed", "experiment")
_NOT_COMPUTED = (
    *("model.name", "optim.name", "data.cache_dir", "data.prefetch", "data.sources", "data.tokenizer.path"),
    *("data.validation", "data.workers", "train.eval_", "train.init_from", "train.objective", "train.sample."),
)


def open_host_memory(resolved: Resolved, parallel: ParallelStrategy) -> HostMemory | None:
    """Open the memory of the hosts for the snapshots of the run. All ranks call it together.

    Args:
        resolved: the run, whose directory is open.
        parallel: the strategy, joined.

    Returns:
        None where they are off, or cannot be made, which is said.
    """
    settings = resolved.config.checkpoint.memory
    if not settings.enabled:
        return None
    run = parallel.broadcast(identity.uuid_of(resolved.place.run_dir) if parallel.rank == 0 else "")
    try:
        memory = HostMemory.open(settings.place, run, parallel.open_lane())
    except CheckpointError as error:
        if parallel.rank == 0:
            warn(f"there are no snapshots in memory: {error.what}; what storage has is not affected")
        return None
    if memory.first_here and (stale := memory.folder.clear_others()):
        warn(f"snapshots in memory of {len(stale)} runs that have ended were removed: {', '.join(map(str, stale[:3]))}")
    return memory


def newer_snapshots(memory: HostMemory | None, resolved: Resolved, parallel: ParallelStrategy) -> list[Snapshot]:
    """List the snapshots that the run may go on from rather than from storage, the newest first. All ranks call it.

    Args:
        memory: of this host.
        resolved: the run. Where its user has named a checkpoint, it is that one.
        parallel: the strategy.
    """
    where = resolved.place.resume_from
    if memory is None or (where is not None and not resolved.takes_older):
        return []
    report = warn if parallel.rank == 0 else _unheard
    return list(find_snapshots(memory, -1 if where is None else step_of(where), report))


def _unheard(text: str) -> None:
    """Drop a line of another process."""


def restore_snapshot(
    found: Iterable[Snapshot],
    resolved: Resolved,
    module: LanguageModule,
    stream: TokenStream,
    trusted: Trust,
    legs: Iterable[Mapping[str, Any]],
) -> Checkpoint | None:
    """Fill model and optimizer from the first snapshot that is the run's and whole. All ranks call it together.

    Args:
        found: as `newer_snapshots` lists them.
        resolved: the run.
        module: placed, with its optimizer.
        stream: the data.
        trusted: whose snapshots are believed.
        legs: of the run so far.

    Returns:
        The snapshot; None where none was good, which is said. Then weights and state are to be filled otherwise.
    """
    parallel = module.parallel
    for snapshot in found:
        try:
            checkpoint = snapshot.open(trusted)
            _agreed(parallel, lambda: _check(checkpoint, resolved, stream, legs))  # noqa: B023 - called here
            snapshot.fetch(files_for(snapshot.manifest, parallel.state_shards(module.model, module.optimizer)))
            fill(checkpoint, resolved.config, parallel, module.model, module.optimizer, trusted=trusted)
            return checkpoint
        except UserError as error:
            if parallel.rank == 0:
                warn(f"skipping {snapshot.directory}: {error}")
    return None


def _agreed(parallel: ParallelStrategy, check: Any) -> None:
    """Check on all ranks, and raise on all of them what one of them found."""
    problem: UserError | None = None
    try:
        check()
    except UserError as error:
        problem = error
    if parallel.any_raised(problem is not None):
        raise problem or CheckpointError("another process cannot use the snapshot")


def _check(checkpoint: Checkpoint, resolved: Resolved, stream: TokenStream, legs: Iterable[Mapping[str, Any]]) -> None:
    """Check that the run goes on from this snapshot as it would from a checkpoint of the same step in storage."""
    config, state = resolved.config, checkpoint.state()
    if checkpoint.step >= config.train.max_steps:
        raise CheckpointError("it is not of a step before train.max_steps", got=checkpoint.step)
    if other := _other_keys(checkpoint.config(), resolved.asked):
        raise CheckpointError("it was computed with another configuration", got=", ".join(other[:5]))
    if state.get("precision") != resolved.precision:
        raise CheckpointError(
            "it was computed in another precision", got=state.get("precision"), allowed=resolved.precision
        )
    if _was_left(state.get(LEG), checkpoint.step, legs):
        raise CheckpointError("the run has gone on from an earlier step since", got=f"step {checkpoint.step}")
    check_run_of(checkpoint, config, stream)


def _other_keys(saved: Mapping[str, Any], asked: RunConfig) -> list[str]:
    """List the keys on which the steps depend whose values differ."""
    was = from_dict(RunConfig, saved)
    if problems := check_stored(was):
        raise problems[0]
    before, now = dict(flat(to_dict(was))), dict(flat(to_dict(asked)))
    return sorted(
        key
        for key in before.keys() | now.keys()
        if key.startswith(_COMPUTED) and not key.startswith(_NOT_COMPUTED) and before.get(key) != now.get(key)
    )


def _was_left(leg: object, step: int, legs: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a later start of the run began before `step`: then this is not its past, but what it turned away from.

    A host that was away meanwhile has kept it.
    """
    if not isinstance(leg, int):
        return False
    return any(int(one.get("leg", -1)) > leg and int(one.get("start_step", step)) < step for one in legs)
