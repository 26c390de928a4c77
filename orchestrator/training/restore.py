"""Restore a run from a checkpoint, and from an older one where that is damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.averaged import AVERAGE, has_average
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import STATE
from orchestrator.checkpoint.merged_weights import read_weights
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.run_checkpoints import newest_valid
from orchestrator.checkpoint.signing import Trust
from orchestrator.checkpoint.storage import AnyPath, is_remote
from orchestrator.config.schema import RunConfig
from orchestrator.data.skipping import Ranges, merged
from orchestrator.data.stream import Position, TokenStream
from orchestrator.distributed.exchange import Coordinator
from orchestrator.errors import CheckpointError, DamagedError, NonFiniteError
from orchestrator.models.protocol import ShardableModel
from orchestrator.observe.bar import Bar
from orchestrator.runs.messages import warn
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.adapter_state import read_adapted
from orchestrator.training.diagnosis import find_nonfinite
from orchestrator.training.resolved import Resolved
from orchestrator.training.state_conversion import widen

_NAMED = 4  # tensors that are listed
_AVERAGE = f"optimizer.{AVERAGE}."
ISLAND = "optimizer.island_"
"""Begins the names of what an island has beside weights and optimizer: whoever is none does not need it."""


def restore_run(
    where: AnyPath,
    resolved: Resolved,
    parallel: ParallelStrategy,
    model: ShardableModel,
    optimizer: torch.optim.Optimizer,
    stream: TokenStream,
    trusted: Trust = Trust(),
    opened: Checkpoint | None = None,
) -> Checkpoint:
    """Fill model and optimizer from the checkpoint `where`, on whatever layout. All ranks call it together.

    Its hashes are checked while it is read. Where it is damaged, and `resolved.takes_older`, the run goes on from the
    newest one before it that is whole.

    Args:
        where: the checkpoint is.
        resolved: the run.
        parallel: the strategy.
        model: placed.
        optimizer: with its state allocated.
        stream: the data, which has to be the checkpoint's.
        trusted: whose checkpoints are believed.
        opened: a checkpoint that this process has opened already; it is taken if it is the one.

    Returns:
        The checkpoint that it was.

    Raises:
        CheckpointError: it is of another model, other bits of state, or other data, where going on is not the same run.
        DamagedError: it is damaged, and none before it is whole.
        NonFiniteError: its numbers are not finite, and none before it is whole.
    """
    config = resolved.config
    while True:
        try:
            checkpoint = open_together(where, trusted, parallel, opened)
            check_run_of(checkpoint, config, stream)
            fill(checkpoint, config, parallel, model, optimizer, trusted=trusted)
            return checkpoint
        except (DamagedError, NonFiniteError) as error:
            if not resolved.takes_older:
                raise
            if parallel.rank == 0:
                warn(f"skipping {where}: {error}")
        older = ""
        if parallel.rank == 0:
            verify = config.checkpoint.verify_on_load
            older = str(newest_valid(where.parent, verify, warn, trusted, before=where) or "")
        name = parallel.broadcast(older.rpartition("/")[2])
        if not name:
            raise CheckpointError(
                "no valid checkpoint was found", got=where.parent, fix="resume another run, or start a new one"
            )
        where = where.parent / name


def restore_weights(
    checkpoint: Checkpoint,
    config: RunConfig,
    parallel: ParallelStrategy,
    model: ShardableModel,
    cast: bool = True,
    trusted: Trust = Trust(),
) -> None:
    """Fill the model alone from `checkpoint`, on whatever layout. All ranks call it together.

    A model without adapters takes those of a checkpoint merged into its weights; one with them gets initial ones where
    the checkpoint has none.

    Args:
        checkpoint: the checkpoint to read.
        config: of the run.
        parallel: the strategy.
        model: the placed model.
        cast: weights in another format are converted, and no error.
        trusted: whose checkpoints are believed.

    Raises:
        CheckpointError: it is of another model, or damaged, or its weights are not finite.
    """
    fill(checkpoint, config, parallel, model, None, cast, trusted)


def open_together(
    where: AnyPath, trusted: Trust, parallel: ParallelStrategy, opened: Checkpoint | None = None
) -> Checkpoint:
    """Open the checkpoint on all ranks or on none: a failure of one must not leave the others waiting.

    Args:
        where: its directory.
        trusted: whose checkpoints are accepted.
        parallel: the strategy.
        opened: a checkpoint that this process has opened already; it is taken if it is the one. Another process may
            have decided, and found a later one.

    Raises:
        DamagedError: a process cannot read it.
    """
    problem, checkpoint = None, opened if opened is not None and _is_at(opened, where) else None
    try:
        # Whoever chose it has looked at each file; a thousand processes need not.
        checkpoint = checkpoint or Checkpoint(where, trusted, look=False)
        checkpoint.state()
    except CheckpointError as error:
        problem = error
    if parallel.any_raised(problem is not None) or checkpoint is None:
        what = problem.what if problem else "another process cannot read the checkpoint"
        raise DamagedError(what, got=problem.got if problem else where) from problem
    return checkpoint


def _is_at(checkpoint: Checkpoint, where: AnyPath) -> bool:
    mine, other = (path if is_remote(path) else Path(path).resolve() for path in (checkpoint.directory, where))
    return str(mine) == str(other)


def check_run_of(checkpoint: Checkpoint, config: RunConfig, stream: TokenStream) -> None:
    """Check that data and batch are those of the saved run: a step's batch is a function of its number.

    Args:
        checkpoint: of the saved run.
        config: of this run.
        stream: its data.

    Raises:
        CheckpointError: they are not.
    """
    saved: dict[str, Any] = checkpoint.state().get("data", {})
    if lacking := {"fingerprint", "global_batch_sequences"} - saved.keys():
        raise CheckpointError(
            "the state of the checkpoint does not say where in the data it is",
            got=f"no {', '.join(sorted(lacking))} in {checkpoint.directory / STATE}",
        )
    if saved["fingerprint"] != stream.fingerprint and "data" not in config.resume_allow:
        raise CheckpointError(
            "the data is not what the checkpoint was trained on, so its position in it means nothing",
            got=f"fingerprint {stream.fingerprint[:12]}",
            allowed=f"fingerprint {saved['fingerprint'][:12]}",
            fix=f"{_other_data(saved.get('facts'), stream)}; or let the run go on with other data, from its beginning: "
            f"'resume_allow=[data]'; or start a new run from the weights: train.init_from={checkpoint.directory}",
        )
    train = config.train
    # With other sequences the number of them says nothing; the configurations have been held against each other.
    same_data = saved["fingerprint"] == stream.fingerprint
    changed = saved["global_batch_sequences"] != train.global_batch_tokens // train.seq_len
    if same_data and changed and "batch" not in config.resume_allow:
        tokens = saved["global_batch_sequences"] * train.seq_len
        raise CheckpointError(
            "the global batch of a resumed run cannot change: a step's batch is a function of its number",
            got=f"train.global_batch_tokens={train.global_batch_tokens}",
            allowed=str(tokens),
            fix=f"set train.global_batch_tokens={tokens}; or, if that is what you want: 'resume_allow=[batch]'",
        )


def data_position(checkpoint: Checkpoint | None, stream: TokenStream) -> Position:
    """Return where a run goes on in `stream`: behind what it was trained on, or at the start of other data.

    Args:
        checkpoint: the restored one; None for a new run.
        stream: the training sequences.
    """
    if checkpoint is None:
        return Position()
    saved: dict[str, Any] = checkpoint.state()["data"]
    read = saved.get("next_sequence", checkpoint.step * saved["global_batch_sequences"])
    same_data = saved["fingerprint"] == stream.fingerprint
    # Checkpoints of the first version do not count tokens; no key of theirs could change on the way.
    return Position(checkpoint.step, read if same_data else 0, saved.get("tokens", read * stream.seq_len))


def data_skipped(checkpoint: Checkpoint | None, stream: TokenStream) -> Ranges:
    """Return the sequences of `stream` that the run of a checkpoint leaves out; none of other data.

    Args:
        checkpoint: the restored one; None for a new run.
        stream: the training sequences.
    """
    saved: dict[str, Any] = checkpoint.state()["data"] if checkpoint is not None else {}
    return merged(saved.get("skipped", ())) if saved.get("fingerprint") == stream.fingerprint else ()


# What the order of the data depends on, and the keys that say it.
_DATA_KEYS = {
    "version": "the version of orchestrator: it orders data otherwise; go on with the one that saved",
    "stores": "the content of data.sources, their number or order, or the tokenizer",
    "weights": "data.sources[...].weight",
    "seq_len": "train.seq_len",
    "seed": "seed",
    "document_mask": "data.document_mask",
}


def _other_data(saved: Any, stream: TokenStream) -> str:
    """Return what to change so that the data is that of the saved run."""
    facts = stream.facts
    if not isinstance(saved, dict):
        keys = ", ".join(_DATA_KEYS[key] for key in facts if key in _DATA_KEYS and key != "version")
        return f"give the same values as the saved run: {keys}"
    other = [key for key in _DATA_KEYS if saved.get(key) != facts[key]]
    values = {key: f" (saved {ascii(saved.get(key))[:80]}, now {facts[key]})" for key in other if key != "stores"}
    return "make it what it was in the saved run: " + "; ".join(_DATA_KEYS[key] + values.get(key, "") for key in other)


def fill(
    checkpoint: Checkpoint,
    config: RunConfig,
    parallel: ParallelStrategy,
    model: ShardableModel,
    optimizer: torch.optim.Optimizer | None,
    cast: bool = False,
    trusted: Trust = Trust(),
) -> None:
    """Fill model and optimizer, and check what was read. All ranks call it together.

    Args:
        checkpoint: the checkpoint to read.
        config: of the run.
        parallel: the strategy.
        model: placed.
        optimizer: with its state allocated; None for the weights alone.
        cast: weights in another format are converted, and no error.
        trusted: whose checkpoints are believed.

    Raises:
        CheckpointError: it is of another model, or damaged; what was filled is worth nothing then.
        NonFiniteError: its numbers are not finite; the same.
    """
    shards = parallel.state_shards(model, optimizer)
    if not has_average(checkpoint):
        shards = [shard for shard in shards if not shard.name.startswith(_AVERAGE)]  # it begins with the weights
    verify = config.checkpoint.verify_on_load or checkpoint.partial
    check: Coordinator | None = parallel if verify else None
    # Moments that are stored in fewer bits are read as they are, and widened.
    reads, widened = widen(checkpoint, shards)
    with _progress(reads, config, parallel) as progress:
        if config.train.lora.rank is not None:
            read_adapted(checkpoint, reads, config, parallel, model, optimizer, check, progress, trusted)
        elif optimizer is None:
            read_weights(checkpoint, reads, cast, check, progress, parallel.held_elsewhere(model), trusted)
        else:
            unwanted = [ISLAND] if config.train.ema.decay is not None else [_AVERAGE, ISLAND]
            read_into(checkpoint, reads, unwanted, cast, check, progress, parallel.held_elsewhere(model))
    for one in widened:
        one.finish()
    if names := find_nonfinite(shards, parallel):
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise NonFiniteError(
            "tensors of the checkpoint are not finite: the run that saved it had diverged",
            got=f"{', '.join(names[:_NAMED])}{more} in {checkpoint.directory}",
            fix="take an earlier checkpoint of that run",
        )
    parallel.adopt(model, optimizer, shards)


@contextlib.contextmanager
def _progress(
    shards: Sequence[Shard], config: RunConfig, parallel: ParallelStrategy
) -> Iterator[Callable[[int], object]]:
    total = sum(shard.data.numel() * shard.data.element_size() for shard in shards)
    with Bar("load", total, shown=config.logger.progress and parallel.rank == 0) as bar:
        yield bar.add
