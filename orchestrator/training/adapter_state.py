"""A run of adapters: what its checkpoints hold, and how model and adapters are filled from two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from orchestrator.checkpoint.adapters import STATE_KEY, adapter_record, is_adapter, open_base, record_for
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.signing import Trust
from orchestrator.checkpoint.storage import AnyPath
from orchestrator.config.schema import RunConfig
from orchestrator.distributed.exchange import Coordinator
from orchestrator.errors import CheckpointError, DamagedError, UserError
from orchestrator.models.init import draw_slice
from orchestrator.models.lora import lora_scale
from orchestrator.models.protocol import ShardableModel
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.parallel_strategy import ParallelStrategy


def saved_shards(shards: Sequence[Shard], config: RunConfig) -> list[Shard]:
    """Return what a checkpoint of the run holds: all, or of adapters what is not the base's.

    Args:
        shards: parts of weights and optimizer state.
        config: of the run.
    """
    return [shard for shard in shards if not _is_beneath(shard.name, config)]


def _is_beneath(name: str, config: RunConfig) -> bool:
    return config.train.lora.rank is not None and name.startswith("model.") and not is_adapter(name)


def base_of(source: Checkpoint, trusted: Trust, parallel: ParallelStrategy, named: str | None = None) -> Checkpoint:
    """Open the weights that lie beneath the adapters of a run, on all ranks or on none.

    Args:
        source: that the run goes on or starts from: of adapters, or the base itself.
        trusted: whose checkpoints are believed.
        parallel: the strategy.
        named: where else the base may be.

    Raises:
        CheckpointError: it is not there, or has other weights; on all ranks.
    """
    problem: UserError | None = None
    base: Checkpoint | None = None
    try:
        base = open_base(source, trusted, named, look=parallel.rank == 0) or source
    except UserError as error:
        problem = error
    if parallel.any_raised(problem is not None) or base is None:
        raise problem or DamagedError(
            "another process cannot read the weights beneath the adapters", got=source.directory
        )
    return base


def adapters_state(
    config: RunConfig, source: Checkpoint | None, trusted: Trust, parallel: ParallelStrategy, checkpoints: AnyPath
) -> dict[str, Any]:
    """Return what the state of the run's checkpoints says of the weights beneath adapters; nothing without adapters.

    Args:
        config: of the run.
        source: that the run goes on or starts from.
        trusted: whose checkpoints are believed.
        parallel: the strategy.
        checkpoints: the directory of the run's checkpoints.
    """
    if config.train.lora.rank is None:
        return {}
    assert source is not None, "adapters lie beside weights"
    base = base_of(source, trusted, parallel, config.train.init_from)
    return {STATE_KEY: record_for(base, lora_scale(config.train.lora), checkpoints / "step-00000000").to_dict()}


def read_adapted(
    checkpoint: Checkpoint,
    shards: Sequence[Shard],
    config: RunConfig,
    parallel: ParallelStrategy,
    model: ShardableModel,
    optimizer: torch.optim.Optimizer | None,
    check: Coordinator | None,
    progress: Callable[[int], object],
    trusted: Trust,
) -> None:
    """Fill base, adapters and optimizer state: from a checkpoint of adapters and its base, or from a base.

    Where the checkpoint is a base, adapters get their initial values, which depend on seed and name alone.

    Args:
        checkpoint: of adapters, or a base. A snapshot in memory holds both.
        shards: parts of weights and optimizer state.
        config: of the run.
        parallel: the strategy.
        model: placed.
        optimizer: None for the weights alone.
        check: as for `read_into`.
        progress: told of what was read.
        trusted: whose checkpoints are believed.

    Raises:
        CheckpointError: one of them is of another model, or damaged.
    """
    ignore, elsewhere = [] if optimizer else ["optimizer."], parallel.held_elsewhere(model)
    stored = checkpoint.manifest.tensors
    adapted = adapter_record(checkpoint) is not None
    beneath = [one for one in shards if _is_beneath(one.name, config) and not (adapted and one.name in stored)]
    names = {one.name for one in beneath}
    others = [one for one in shards if one.name not in names]
    if adapted:
        read_into(checkpoint, others, ignore, False, check, progress, elsewhere)
    elif optimizer is not None:
        raise CheckpointError(
            "the checkpoint holds whole weights: a run of adapters has none like it to go on from",
            got=checkpoint.directory,
            fix=f"start a new run: train.init_from={checkpoint.directory}",
        )
    else:
        initializers = model.initializers()
        for one in others:
            name = one.name.removeprefix("model.")
            one.data.copy_(draw_slice(initializers[name], name, config.seed, one.shape, one.slices))
    if parallel.any_raised(bool(beneath)):
        base = base_of(checkpoint, trusted, parallel, config.train.init_from)
        away = {*elsewhere, *(name for name in model.initializers() if is_adapter(name))}
        read_into(base, beneath, ["optimizer."], not adapted, check, progress, away)
