"""A shard: one part of a named global tensor, with its memory. Strategies and checkpoints exchange these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shard:
    """A rectangular part of a tensor.

    Attributes:
        name: fully qualified, with its kind in front: `model.`, `optimizer.exp_avg.`, …
        shape: of the global tensor; `()` for a scalar.
        slices: the part, one slice per dim.
        data: its elements, of the part's shape, on whatever device.
        owned: whether this rank writes it (one rank does for each part).
    """

    name: str
    shape: tuple[int, ...]
    slices: tuple[slice, ...]
    data: torch.Tensor
    owned: bool = True
