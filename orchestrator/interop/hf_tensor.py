"""One tensor of a Hugging Face state dict, made of our parameters and taken apart into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HFSource:
    """Where a parameter lies in a foreign state dict.

    Attributes:
        name: foreign name, with `{i}` for the layer; several of ours with one name follow each other in it.
        transposed: stored as [in, out].
        by_head: those of one head follow each other, head by head.
    """

    name: str
    transposed: bool = False
    by_head: bool = False


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
        sizes: of the parts along `axis`; (): they are equal.
        blocks: equal blocks along `axis`, such as heads, each of which has its part of every part.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    transposed: bool = False
    axis: int = 0
    interleaved: bool = False
    expert: int | None = None
    sizes: tuple[int, ...] = ()
    blocks: int = 1

    @property
    def described(self) -> str:
        """Our parameters, for the report of an import."""
        row = "" if self.expert is None else f"[{self.expert}]"
        return ", ".join(f"model.{part}{row}" for part in self.parts)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Make the tensor of our parameters, given in the order of `parts`; of an expert, of its rows [1, ...]."""
        if self.interleaved:
            joined = torch.stack(list(parts), self.axis + 1).flatten(self.axis, self.axis + 1)
        elif self.blocks > 1:
            cut = [part.unflatten(self.axis, (self.blocks, -1)) for part in parts]
            joined = torch.cat(cut, self.axis + 1).flatten(self.axis, self.axis + 1)
        else:
            joined = torch.cat(list(parts), self.axis) if len(parts) > 1 else parts[0]
        if self.expert is not None:
            joined = joined.squeeze(0)
        return joined.mT.contiguous() if self.transposed else joined

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return our parameters, views of the tensor where one can be, in the order of `parts`; of an expert, its row.

        Args:
            tensor: of the shape `shape`.
        """
        ours = tensor.mT if self.transposed else tensor
        if self.interleaved:
            return ours.unflatten(self.axis, (-1, len(self.parts))).unbind(self.axis + 1)
        if self.blocks > 1:
            pieces = ours.unflatten(self.axis, (self.blocks, -1))
            inner = [size // self.blocks for size in self.sizes]
            return [piece.flatten(self.axis, self.axis + 1) for piece in pieces.split(inner, self.axis + 1)]
        if self.sizes:
            return ours.split(self.sizes, self.axis)
        return ours.chunk(len(self.parts), self.axis) if len(self.parts) > 1 else [ours]

    def box(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """Return the part of one of our parameters that is in the tensor.

        Args:
            shape: of that parameter.
        """
        whole = tuple(slice(0, size) for size in shape)
        return whole if self.expert is None else (slice(self.expert, self.expert + 1), *whole[1:])
