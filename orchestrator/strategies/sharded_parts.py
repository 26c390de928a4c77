"""`sharding.parts.Parts` of the torch-native strategy.

Whole matrices are dealt out: each process of a group that holds one copy of the model gets some matrices whole,
computes, and hands the parts back. Two all-to-alls move as many bytes as one all-gather, and each matrix is computed
once per copy of the model instead of once per process.

Of a mixture the matrix of each expert is dealt out by itself, among the processes that hold parts of that expert: those
of one coordinate of the axis `expert`. Where each expert lies whole on one process nothing travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from orchestrator.sharding.layout import Layout
from orchestrator.sharding.parts import Reduced
from orchestrator.sharding.rules import Placement
from orchestrator.sharding.shard import Shard


@dataclass(frozen=True)
class _Team:
    """Processes that share tensors, each with a part.

    Attributes:
        group: of these processes; None where one is alone.
        ranks: theirs in the first copy of the model, in the order of the group.
        me: this process's place among them.
    """

    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    me: int


@dataclass(frozen=True)
class _Unit:
    """A tensor that one process gets whole: a parameter's, or the matrix of one expert.

    Attributes:
        placement: of the parameter.
        layout: degrees of the mesh axes.
    """

    placement: Placement
    layout: Layout

    @property
    def skipped(self) -> int:
        """Leading dims of the parameter that the unit has not."""
        return 0 if self.placement.expert_dim is None else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole unit."""
        return self.placement.shape[self.skipped :]

    def box(self, rank: int) -> tuple[slice, ...]:
        """Return the part of a rank."""
        return self.placement.slices(self.layout, rank)[self.skipped :]

    def speaks(self, rank: int) -> bool:
        """Whether a rank is the first of those that hold the same part."""
        return self.placement.is_owner(self.layout, rank)


class ShardedParts:
    """`Parts` of the torch-native strategy.

    Args:
        mesh: of the axes `replicate`, `shard` and `tensor`.
        layout: degrees of the mesh axes.
        rank: this process.
        placements: parameter -> where it lies.
        expert_mesh: on which experts are sharded, with `expert` as an axis of its own; None: experts are not divided.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        layout: Layout,
        rank: int,
        placements: Mapping[Any, Placement],
        expert_mesh: DeviceMesh | None = None,
    ):
        self._layout, self._placements, self._rank = layout, dict[Any, Placement](placements), rank
        # The ranks that hold one copy of the model; rank r of it is rank r of the first copy.
        size = layout.shards * layout.tensor
        me = rank % size
        self._team = _Team(self._group_of(mesh) if size > 1 else None, tuple(range(size)), me)
        self._expert_team = self._team
        if expert_mesh is not None:
            expert = layout.coordinates(me)["expert"]
            ranks = tuple(one for one in range(size) if layout.coordinates(one)["expert"] == expert)
            group = self._group_of(expert_mesh) if len(ranks) > 1 else None
            self._expert_team = _Team(group, ranks, ranks.index(me))
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
        return math.prod(self._placements[parameter].shape)  # torch knows of one rank's experts alone

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
        if len(dims) > 1:  # over everything, also where experts have a dim more
            cuts = [None if cut is None else dims[0] for cut in cuts]
        if self._shard_group is not None and 0 in dims:
            _all_reduce(result, range(len(result)), self._shard_group)
        if self._tensor_group is not None:
            _all_reduce(result, [index for index, cut in enumerate(cuts) if cut in dims], self._tensor_group)
        return result

    def on_wholes(
        self, part_of: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], function: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Assemble each whole tensor on one rank and apply `function`; `part_of` and `parameters` as in `Parts`."""
        experts = [one for one in parameters if self._placements[one].expert_dim is not None]
        others = [one for one in parameters if self._placements[one].expert_dim is None]
        for team, chosen in ((self._team, others), (self._expert_team, experts)):
            if team.group is None:
                for parameter in chosen:
                    yield parameter, function(part_of(parameter))
            else:
                yield from self._dealt(team, part_of, chosen, function)

    def _dealt(
        self,
        team: _Team,
        part_of: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        function: Callable[[Tensor], Tensor],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Deal the units of `parameters` out among a team, as many at a time as it has members."""
        waiting: list[tuple[Tensor, Tensor, _Unit]] = []  # parameter, this rank's part of the unit, the unit
        done: dict[Tensor, list[Tensor]] = {}

        def exchange() -> Iterator[tuple[Tensor, Tensor]]:
            pieces = self._exchange(team, [part for _, part, _ in waiting], [unit for *_, unit in waiting], function)
            for (parameter, _, unit), piece in zip(waiting, pieces, strict=True):
                found = done.setdefault(parameter, [])
                found.append(piece)
                if not unit.skipped:
                    yield parameter, piece
                elif len(found) == local_part(parameter).shape[0]:
                    yield parameter, torch.stack(done.pop(parameter))
            waiting.clear()

        # Those of one size together: nobody waits for another's larger one.
        for parameter in sorted(parameters, key=lambda one: self._placements[one].shape):
            unit, part = _Unit(self._placements[parameter], self._layout), part_of(parameter)
            for piece in part.unbind(0) if unit.skipped else (part,):
                waiting.append((parameter, piece, unit))
                if len(waiting) == len(team.ranks):
                    yield from exchange()
        if waiting:
            yield from exchange()

    def _exchange(
        self, team: _Team, parts: Sequence[Tensor], units: Sequence[_Unit], function: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Bring the n-th unit whole to the n-th process of the team, and the parts of its result back."""
        size, mine = len(team.ranks), team.me < len(units)
        idle = [0] * (size - len(units))
        counts = [part.numel() for part in parts]
        # Of several processes that hold the same part the first one sends it; all of them get it back.
        speaks = [unit.speaks(team.ranks[team.me]) for unit in units]
        sent = [count if owner else 0 for count, owner in zip(counts, speaks, strict=True)]
        said = [part.reshape(-1) for part, owner in zip(parts, speaks, strict=True) if owner]
        flat = torch.cat(said) if said else parts[0].new_empty(0)
        boxes = [units[team.me].box(rank) for rank in team.ranks] if mine else []
        sizes = [_elements(box) for box in boxes] if mine else [0] * size
        owners = [mine and units[team.me].speaks(rank) for rank in team.ranks]
        wanted = [count if owner else 0 for count, owner in zip(sizes, owners, strict=True)]
        received = _all_to_all(team, flat, [*sent, *idle], wanted)
        back = flat.new_empty(0)
        if mine:
            whole = flat.new_empty(units[team.me].shape)
            for box, piece in zip(boxes, received.split(wanted), strict=True):
                if piece.numel():
                    whole[box] = piece.view(whole[box].shape)
            done = function(whole)
            back = torch.cat([done[box].reshape(-1) for box in boxes])
        returned = _all_to_all(team, back, sizes, [*counts, *idle])
        pieces = returned.split([*counts, *idle])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=False)]


def _all_to_all(team: _Team, flat: Tensor, sent: list[int], wanted: list[int]) -> Tensor:
    received = flat.new_empty(sum(wanted))
    dist.all_to_all_single(received, flat, wanted, sent, group=team.group)
    return received


def as_gradients(weights: Iterable[Shard], parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[Shard]:
    """Return this rank's parts of gradients, where those of the weights are; zeros where a parameter has none.

    Args:
        weights: this rank's parts of the weights.
        parameters: with their names; those that are not trained are left out.
    """
    boxes, found = {shard.name: shard for shard in weights}, []
    for name, parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(replace(boxes[f"model.{name}"], name=f"gradient.{name}", data=local_part(parameter.grad)))
    return found


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
