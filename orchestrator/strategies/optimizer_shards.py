"""The parts of an optimizer's state that a rank of the torch-native strategy has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from orchestrator.sharding.layout import Layout
from orchestrator.sharding.parts import Reduced, blocks, in_blocks, reduced_dims
from orchestrator.sharding.rules import Placement
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.sharded_parts import local_part


def optimizer_shards(
    name: str,
    parameter: Tensor,
    placement: Placement,
    optimizer: torch.optim.Optimizer,
    owns: Callable[[Reduced], bool],
    at: tuple[Layout, int],
) -> Iterator[Shard]:
    """Yield the parts of a parameter's optimizer state: scalars, of its shape, or with size 1 in some dims.

    Args:
        name: of the parameter.
        parameter: placed.
        placement: of it.
        optimizer: with its state.
        owns: whether this rank writes its part of a tensor that is reduced in some dims.
        at: the layout, and the rank.
    """
    reduced, blocked = reduced_dims(optimizer), blocks(optimizer)
    for key, value in optimizer.state[parameter].items():
        full, dims = f"optimizer.{key}.{name}", reduced.get(key, ())
        if value.dim() == 0:
            # Every rank of the stage has it: as of a tensor that no axis cuts.
            yield Shard(full, (), (), value, owns(tuple(range(len(placement.shape)))))
            continue
        shape, slices = placement.shape_of(dims), placement.slices(*at, dims)
        if key in blocked:
            shape, slices = in_blocks(shape, slices, blocked[key])
        yield Shard(full, shape, slices, local_part(value), owns(dims))
