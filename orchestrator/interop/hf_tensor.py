"""One tensor of a Hugging Face state dict, made of our parameters and taken apart into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HFTensor:
    """A tensor of a Hugging Face state dict.

    Attributes:
        name: theirs.
        shape: theirs.
        parts: our parameters that it consists of, in their order along `axis` of ours.
        transposed: its last two dims are exchanged against what the parts make.
        axis: of ours, along which the parts follow each other.
        interleaved: their rows alternate along it instead.
        expert: it is the row of this expert in dim 0 of its part; None: all of it.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    transposed: bool = False
    axis: int = 0
    interleaved: bool = False
    expert: int | None = None

    @property
    def described(self) -> str:
        """Our parameters, for the report of an import."""
        row = "" if self.expert is None else f"[{self.expert}]"
        return ", ".join(f"model.{part}{row}" for part in self.parts)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Make the tensor of our parameters, given in the order of `parts`; of an expert, of its rows [1, ...]."""
        if self.interleaved:
            joined = torch.stack(list(parts), self.axis + 1).flatten(self.axis, self.axis + 1)
        else:
            joined = torch.cat(list(parts), self.axis) if len(parts) > 1 else parts[0]
        if self.expert is not None:
            joined = joined.squeeze(0)
        return joined.mT.contiguous() if self.transposed else joined

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return views of the tensor that are our parameters, in the order of `parts`; of an expert, its row.

        Args:
            tensor: of the shape `shape`.
        """
        ours = tensor.mT if self.transposed else tensor
        if self.interleaved:
            return ours.unflatten(self.axis, (-1, len(self.parts))).unbind(self.axis + 1)
        return ours.chunk(len(self.parts), self.axis) if len(self.parts) > 1 else [ours]

    def box(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """Return the part of one of our parameters that is in the tensor.

        Args:
            shape: of that parameter.
        """
        whole = tuple(slice(0, size) for size in shape)
        return whole if self.expert is None else (slice(self.expert, self.expert + 1), *whole[1:])
