"""`sharding.parts.Parts` of the torch-native strategy.

Whole matrices are dealt out: each process of a group that holds one copy of the model gets some matrices whole,
computes, and hands the parts back. Two all-to-alls move as many bytes as one all-gather, and each matrix is computed
once per copy of the model instead of once per process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from orchestrator.sharding.layout import Layout
from orchestrator.sharding.parts import Reduced
from orchestrator.sharding.rules import Placement


class ShardedParts:
    """`Parts` of the torch-native strategy.

    Args:
        mesh: of the axes `replicate`, `shard` and `tensor`.
        layout: degrees of the mesh axes.
        rank: this process.
        placements: parameter -> where it lies.
    """

    def __init__(self, mesh: DeviceMesh, layout: Layout, rank: int, placements: Mapping[Any, Placement]):
        self._layout, self._placements = layout, dict[Any, Placement](placements)
        self._size = layout.shards * layout.tensor
        # The ranks that hold one copy of the model; rank r of it is rank r of the first copy.
        self._group = self._group_of(mesh) if self._size > 1 else None
        self._rank, self._me = rank, rank % self._size
        self._shard_group = mesh.get_group("shard") if layout.shards > 1 else None
        self._tensor_group = mesh.get_group("tensor") if layout.tensor > 1 else None

    @staticmethod
    def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
        names = [name for name in ("shard", "tensor") if mesh[name].size() > 1]
        if len(names) == 1:
            return mesh.get_group(names[0])
        return mesh["shard", "tensor"]._flatten("model").get_group()

    def local(self, tensor: Tensor) -> Tensor:
        """Return this rank's shard of `tensor`."""
        return local_part(tensor)

    def zeros(self, parameter: Tensor, reduced: Reduced = ()) -> Tensor:
        """Allocate zeros of this rank's shard of `parameter`, with size 1 in the `reduced` dims."""
        local = local_part(parameter)
        return local.new_zeros([1 if dim in reduced else size for dim, size in enumerate(local.shape)])

    def numel(self, parameter: Tensor) -> int:
        """Return the number of elements of the whole `parameter`."""
        return parameter.numel()

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Return the shape of the whole `parameter`."""
        return self._placements[parameter].shape

    def start(self, parameter: Tensor) -> tuple[int, ...]:
        """Return where this rank's shard begins in the whole `parameter`."""
        return tuple(part.start for part in self._placements[parameter].slices(self._layout, self._rank))

    def sum(self, values: Sequence[Tensor], parameters: Sequence[Tensor], dims: Reduced) -> list[Tensor]:
        """All-reduce partial sums over the ranks that hold parts; `values`, `parameters` and `dims` as in `Parts`."""
        result = list(values)
        cuts = [self._placements[parameter].tensor_dim for parameter in parameters]
        if self._shard_group is not None and 0 in dims:
            _all_reduce(result, range(len(result)), self._shard_group)
        if self._tensor_group is not None:
            _all_reduce(result, [index for index, cut in enumerate(cuts) if cut in dims], self._tensor_group)
        return result

    def on_wholes(
        self, part_of: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], function: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Assemble each whole tensor on one rank and apply `function`; `part_of` and `parameters` as in `Parts`."""
        if self._group is None:
            for parameter in parameters:
                yield parameter, function(part_of(parameter))
            return
        # Those of one size together: nobody waits for another's larger one.
        order = sorted(parameters, key=lambda parameter: self._placements[parameter].shape)
        for start in range(0, len(order), self._size):
            chunk = order[start : start + self._size]
            placements = [self._placements[parameter] for parameter in chunk]
            done = self._exchange([part_of(parameter) for parameter in chunk], placements, function)
            yield from zip(chunk, done, strict=True)

    def _exchange(
        self, parts: Sequence[Tensor], placements: Sequence[Placement], function: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Bring the n-th tensor whole to the n-th process of the group, and the parts of its result back."""
        layout, ranks, mine = self._layout, range(self._size), self._me < len(placements)
        idle = [0] * (self._size - len(placements))
        counts = [part.numel() for part in parts]
        # Of several processes that hold the same part the first one sends it; all of them get it back.
        speaks = [placement.is_owner(layout, self._me) for placement in placements]
        sent = [count if owner else 0 for count, owner in zip(counts, speaks, strict=True)]
        said = [part.reshape(-1) for part, owner in zip(parts, speaks, strict=True) if owner]
        flat = torch.cat(said) if said else parts[0].new_empty(0)
        boxes = [placements[self._me].slices(layout, rank) for rank in ranks] if mine else []
        sizes = [_elements(box) for box in boxes] if mine else [0] * self._size
        owners = [mine and placements[self._me].is_owner(layout, rank) for rank in ranks]
        wanted = [size if owner else 0 for size, owner in zip(sizes, owners, strict=True)]
        received = self._all_to_all(flat, [*sent, *idle], wanted)
        back = flat.new_empty(0)
        if mine:
            whole = flat.new_empty(placements[self._me].shape)
            for box, piece in zip(boxes, received.split(wanted), strict=True):
                if piece.numel():
                    whole[box] = piece.view(whole[box].shape)
            done = function(whole)
            back = torch.cat([done[box].reshape(-1) for box in boxes])
        returned = self._all_to_all(back, sizes, [*counts, *idle])
        pieces = returned.split([*counts, *idle])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=False)]

    def _all_to_all(self, flat: Tensor, sent: list[int], wanted: list[int]) -> Tensor:
        received = flat.new_empty(sum(wanted))
        dist.all_to_all_single(received, flat, wanted, sent, group=self._group)
        return received


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of `tensor`, a parameter, gradient or optimizer state, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _all_reduce(values: list[Tensor], which: Sequence[int], group: dist.ProcessGroup) -> None:
    """Replace those of `values` by their sums over the group, in one collective."""
    if not which:
        return
    flat = torch.cat([values[index].reshape(-1) for index in which])
    dist.all_reduce(flat, group=group)
    for index, part in zip(which, flat.split([values[index].numel() for index in which]), strict=True):
        values[index] = part.view(values[index].shape)


def _elements(box: tuple[slice, ...]) -> int:
    count = 1
    for part in box:
        count *= part.stop - part.start
    return count
