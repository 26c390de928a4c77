"""Map logical axes to mesh axes: which part of each parameter a rank holds.

Two rules, both data. The table gives some logical axes to the `tensor` mesh axis. Then the `fsdp` axis
(with `context`, whose ranks hold the same sequences) cuts dim 0 of every parameter once more, inside its
tensor shard. Cutting dim 0 lets a rank draw just its rows at initialisation and write one contiguous
range per parameter into a checkpoint.

Strict both ways: a parameter that the model gives no axes, an axis that no rule covers, a name or a rule
that matches nothing are errors in the model or the table.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import LayoutError
from orchestrator.sharding.axes import LOGICAL_AXES, ParameterAxes
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.parts import Reduced

# logical axis -> mesh axis; None: whole on every rank of the tensor group.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "positions": "tensor",
    "embed": None,
    "head_dim": None,
    "norm": None,
}


@dataclass(frozen=True)
class Placement:
    """The placement of one parameter on the mesh.

    Attributes:
        shape: global shape.
        tensor_dim: the dim that the tensor axis cuts, or None where it holds copies.
    """

    shape: tuple[int, ...]
    tensor_dim: int | None

    def slices(self, layout: Layout, rank: int, reduced: Reduced = ()) -> tuple[slice, ...]:
        """Return the part of the global tensor that `rank` holds; empty where there are more ranks than rows.

        Args:
            layout: degrees of the mesh axes.
            rank: of the job.
            reduced: dims in which the tensor has size 1 and is not cut, as optimizer state may have them.
        """
        at = layout.coordinates(rank)
        bounds = [(0, size) for size in self.shape_of(reduced)]
        if self.tensor_dim is not None and self.tensor_dim not in reduced:
            bounds[self.tensor_dim] = _chunk(bounds[self.tensor_dim], layout.tensor, at["tensor"])
        if bounds and 0 not in reduced:
            bounds[0] = _chunk(bounds[0], layout.shards, at["fsdp"] * layout.context + at["context"])
        return tuple(slice(start, stop) for start, stop in bounds)

    def shape_of(self, reduced: Reduced = ()) -> tuple[int, ...]:
        """Return the global shape, with size 1 in the `reduced` dims."""
        return tuple(1 if dim in reduced else size for dim, size in enumerate(self.shape))

    def is_owner(self, layout: Layout, rank: int, reduced: Reduced = ()) -> bool:
        """Return whether `rank` is the one that writes its part: the first of those that hold the same.

        Args:
            layout: degrees of the mesh axes.
            rank: of the process.
            reduced: dims in which the tensor has size 1.
        """
        if not self.shape:
            return rank == 0
        at = layout.coordinates(rank)
        copies = at["replicate"]
        if self.tensor_dim is None or self.tensor_dim in reduced:
            copies += at["tensor"]
        if 0 in reduced:
            copies += at["fsdp"] + at["context"]
        return copies == 0

    def copies(self, layout: Layout) -> int:
        """Return how many ranks hold the same part.

        Args:
            layout: degrees of the mesh axes.
        """
        if not self.shape:
            return layout.devices
        return layout.replicate * (layout.tensor if self.tensor_dim is None else 1)


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
        _problem(f"the rule of '{axis}' names a mesh axis '{mesh}' that rules cannot give", str(mesh), {"tensor": None})
        for axis, mesh in rules.items()
        if mesh not in (None, "tensor")
    ]
    if problems:
        raise LayoutError("the sharding rules do not match the model:\n" + "\n".join(problems))
    return {name: _place_one(name, axes[name], tuple(shape), rules) for name, shape in shapes.items()}


def _place_one(name: str, axes: tuple[str, ...], shape: tuple[int, ...], rules: Mapping[str, str | None]) -> Placement:
    if len(axes) != len(shape):
        raise LayoutError(
            f"parameter '{name}' has {len(shape)} dims and {len(axes)} logical axes", got=f"{shape} and {axes}"
        )
    cut = [dim for dim, axis in enumerate(axes) if rules[axis] == "tensor"]
    if len(cut) > 1:
        raise LayoutError(f"parameter '{name}' would be cut twice by the tensor axis", got=axes, allowed="one dim")
    return Placement(shape, cut[0] if cut else None)


def _chunk(bounds: tuple[int, int], parts: int, index: int) -> tuple[int, int]:
    """Return the `index`-th of `parts` pieces as `torch.chunk` cuts them: the last ones may be short or empty."""
    start, stop = bounds
    step = -(-(stop - start) // parts)
    return min(start + index * step, stop), min(start + (index + 1) * step, stop)


def _problem(what: str, name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"  {what}" + (f" (did you mean '{close[0]}'?)" if close else "")
