"""Map logical axes to mesh axes: which part of each parameter a rank holds.

Two rules, both data. The table gives some logical axes to the `tensor` mesh axis. Then the `fsdp` axis
(with `expert`, and with `context`, whose ranks hold the same sequences) cuts dim 0 of every parameter once more,
inside its tensor shard. Cutting dim 0 lets a rank draw just its rows at initialisation and write one contiguous
range per parameter into a checkpoint.

Experts' tensors have the experts in dim 0, which the `expert` axis cuts; fsdp and context cut dim 1, since there may
be fewer experts than ranks. Offsets that balance experts are whole on every rank.

Strict both ways: a parameter that the model gives no axes, an axis that no rule covers, a name or a rule
that matches nothing are errors in the model or the table.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import LayoutError
from orchestrator.sharding.axes import LOGICAL_AXES, ParameterAxes
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.parts import Reduced

# Logical axis -> mesh axis; None: whole on every rank of the tensor group.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "positions": "tensor",
    "embed": None,
    "head_dim": None,
    "latent": None,
    "rank": None,
    "norm": None,
    "experts": "expert",
    "choices": None,
    "balance": None,
}
_GIVEN = ("tensor", "expert")  # mesh axes that the table may give
_WHOLE = "balance"


@dataclass(frozen=True)
class Placement:
    """The placement of one parameter on the mesh.

    Attributes:
        shape: global shape.
        tensor_dim: the dim that the tensor axis cuts, or None where it holds copies.
        expert_dim: the dim that the expert axis cuts; None: the parameter is no expert's.
        fsdp_dim: the dim that fsdp cuts, with context and, where the parameter is no expert's, with expert. None:
            every rank has the whole.
    """

    shape: tuple[int, ...]
    tensor_dim: int | None
    expert_dim: int | None = None
    fsdp_dim: int | None = 0

    def slices(self, layout: Layout, rank: int, reduced: Reduced = ()) -> tuple[slice, ...]:
        """Return the part of the global tensor that `rank` holds; empty where there are more ranks than rows.

        Args:
            layout: degrees of the mesh axes.
            rank: of the job.
            reduced: dims in which the tensor has size 1 and is not cut, as optimizer state may have them.
        """
        at = layout.coordinates(rank)
        bounds = [(0, size) for size in self.shape_of(reduced)]
        for dim, parts, index in (
            (self.expert_dim, layout.expert, at["expert"]),
            (self.tensor_dim, layout.tensor, at["tensor"]),
            (self.fsdp_dim, *self._shard(layout, at)),
        ):
            if dim is not None and dim < len(bounds) and dim not in reduced:
                bounds[dim] = _chunk(bounds[dim], parts, index)
        return tuple(slice(start, stop) for start, stop in bounds)

    def _shard(self, layout: Layout, at: Mapping[str, int]) -> tuple[int, int]:
        """Return the number of parts that the fsdp rule makes, and which of them the rank has."""
        if self.expert_dim is not None:
            return layout.expert_shards, at["fsdp"] * layout.context + at["context"]
        return layout.shards, (at["fsdp"] * layout.expert + at["expert"]) * layout.context + at["context"]

    def shape_of(self, reduced: Reduced = ()) -> tuple[int, ...]:
        """Return the global shape, with size 1 in the `reduced` dims."""
        return tuple(1 if dim in reduced else size for dim, size in enumerate(self.shape))

    def is_owner(self, layout: Layout, rank: int, reduced: Reduced = ()) -> bool:
        """Return whether `rank` is the one that writes its part: the first of those that hold the same.

        Args:
            layout: degrees of the mesh axes.
            rank: of the process; it has the parameter, which with a pipeline the ranks of one stage have.
            reduced: dims in which the tensor has size 1.
        """
        at = layout.coordinates(rank)
        return all(at[axis] == 0 for axis in self._copied(reduced))

    def _copied(self, reduced: Reduced = ()) -> set[str]:
        """Return the mesh axes along which the ranks of a stage hold copies."""
        copied = {"replicate", "fsdp", "expert", "context", "tensor"}
        if not self.shape:
            return copied
        cut = {"tensor": self.tensor_dim, "expert": self.expert_dim, "fsdp": self.fsdp_dim, "context": self.fsdp_dim}
        if self.expert_dim is None:
            cut["expert"] = self.fsdp_dim
        return copied - {axis for axis, dim in cut.items() if dim is not None and dim not in reduced}

    def copies(self, layout: Layout) -> int:
        """Return how many ranks of a stage hold the same part.

        Args:
            layout: degrees of the mesh axes.
        """
        return math.prod(layout.degree(axis) for axis in self._copied())


def place(
    axes: ParameterAxes, shapes: Mapping[str, tuple[int, ...]], rules: Mapping[str, str | None] = RULES
) -> dict[str, Placement]:
    """Apply the rules to every parameter.

    Args:
        axes: what the model says of its parameters.
        shapes: global shapes of the parameters that there are.
        rules: logical axis -> mesh axis, or None for an axis that is not split.

    Raises:
        LayoutError: anything in `axes`, `shapes` and `rules` that has no counterpart.
    """
    problems = [_problem(f"parameter '{name}' has no logical axes", name, axes) for name in shapes if name not in axes]
    problems += [
        _problem(f"logical axes name a parameter '{name}' that is not there", name, shapes)
        for name in axes
        if name not in shapes
    ]
    used = {axis for names in axes.values() for axis in names}
    problems += [
        _problem(f"no rule covers the logical axis '{axis}'", axis, rules) for axis in sorted(used - set(rules))
    ]
    unknown = sorted(set(rules) - set(LOGICAL_AXES))
    problems += [_problem(f"a rule names '{axis}', which no model can have", axis, LOGICAL_AXES) for axis in unknown]
    problems += [
        _problem(
            f"the rule of '{axis}' names a mesh axis '{mesh}' that rules cannot give", str(mesh), dict.fromkeys(_GIVEN)
        )
        for axis, mesh in rules.items()
        if mesh not in (None, *_GIVEN)
    ]
    if problems:
        raise LayoutError("the sharding rules do not match the model:\n" + "\n".join(problems))
    return {name: _place_one(name, axes[name], tuple(shape), rules) for name, shape in shapes.items()}


def _place_one(name: str, axes: tuple[str, ...], shape: tuple[int, ...], rules: Mapping[str, str | None]) -> Placement:
    if len(axes) != len(shape):
        raise LayoutError(
            f"parameter '{name}' has {len(shape)} dims and {len(axes)} logical axes", got=f"{shape} and {axes}"
        )
    cut = {mesh: [dim for dim, axis in enumerate(axes) if rules[axis] == mesh] for mesh in _GIVEN}
    for mesh, dims in cut.items():
        if len(dims) > 1:
            raise LayoutError(f"parameter '{name}' would be cut twice by the {mesh} axis", got=axes, allowed="one dim")
    if cut["expert"] and (cut["expert"] != [0] or len(shape) < 2):
        raise LayoutError(
            f"parameter '{name}' does not have its experts in dim 0", got=axes, allowed="(experts, ..., ...)"
        )
    tensor_dim = cut["tensor"][0] if cut["tensor"] else None
    if cut["expert"]:
        return Placement(shape, tensor_dim, expert_dim=0, fsdp_dim=1)
    return Placement(shape, tensor_dim, fsdp_dim=None if _WHOLE in axes else 0)


def _chunk(bounds: tuple[int, int], parts: int, index: int) -> tuple[int, int]:
    """Return the `index`-th of `parts` pieces as `torch.chunk` cuts them: the last ones may be short or empty."""
    start, stop = bounds
    step = -(-(stop - start) // parts)
    return min(start + index * step, stop), min(start + (index + 1) * step, stop)


def _problem(what: str, name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"  {what}" + (f" (did you mean '{close[0]}'?)" if close else "")
