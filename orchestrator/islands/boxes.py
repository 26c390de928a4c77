"""Rectangular parts of named tensors, as islands exchange them. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor.

    Attributes:
        name: of the tensor, as the model has it (`layers.0.attention.query.weight`).
        shape: of the whole tensor.
        start: first index of the part, for each dim.
        stop: the one behind its last.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> Box:
        """Return the part that is all of a tensor.

        Args:
            name: of the tensor.
            shape: of the tensor.
        """
        return cls(name, shape, (0,) * len(shape), shape)

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Elements of the part."""
        return math.prod(self.dims)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part, one slice for each dim of the whole tensor."""
        return tuple(slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Return where this part is in a larger one of the same tensor.

        Args:
            outer: a part that contains this one.
        """
        pairs = zip(self.start, self.stop, outer.start, strict=True)
        return tuple(slice(start - base, stop - base) for start, stop, base in pairs)

    def pieces(self, limit: int) -> Iterator[Box]:
        """Cut the part along its first dims into parts of at most `limit` elements, in order.

        A part is cut along one dim after the other, so each piece is contiguous in this one; the last dim stays whole
        unless a single row is larger than the limit.

        Args:
            limit: elements of a piece, at least 1.
        """
        if self.size <= limit or not self.shape:
            yield self
            return
        dim = next(at for at, length in enumerate(self.dims) if length > 1)
        step = max(1, limit // max(1, self.size // self.dims[dim]))
        for begin in range(self.start[dim], self.stop[dim], step):
            start = (*self.start[:dim], begin, *self.start[dim + 1 :])
            stop = (*self.stop[:dim], min(begin + step, self.stop[dim]), *self.stop[dim + 1 :])
            yield from Box(self.name, self.shape, start, stop).pieces(limit)
