"""Read parts of a safetensors file, from a folder or an object store.

The format is https://github.com/huggingface/safetensors#format. Its own library maps local files only. Nothing that
the header claims is believed before it was compared with the size of the file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.checkpoint.format import ITEM_BYTES, MAX_DIMS, parse_json
from orchestrator.checkpoint.storage import AnyPath, is_remote, read_range, read_range_into, read_runs, size_of
from orchestrator.errors import DamagedError

_MAX_HEADER_BYTES = 100_000_000  # as the format's own library
_PART_BYTES = 1 << 24
# Shorter stretches are read together with what lies between them: a read of its own costs more than those bytes.
_SHORTEST_BYTES, _SHORTEST_REMOTE_BYTES = 1 << 10, 1 << 18


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its bytes are `[start, stop)` of the file, row-major.

    Attributes:
        dtype: its name in safetensors.
        shape: of the tensor.
        start: first byte.
        stop: the byte behind the last one.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """The tensors of one file by key.

    Args:
        path: a path of this machine or of an object store.
        items: the dtypes that it may hold, and the bytes of an element of each.

    Attributes:
        metadata: what the header says beside the tensors; None where it says nothing.

    Raises:
        DamagedError: it is no safetensors file, or its header claims what the file does not have.
        OSError: it cannot be read.
    """

    def __init__(self, path: AnyPath, items: Mapping[str, int] = ITEM_BYTES):
        self._path, self._items = path, items
        size = size_of(path)
        if size is None:
            raise self._damaged("it is missing")
        self._size = size
        length = int.from_bytes(self._bytes(0, min(8, self._size)), "little")
        if self._size < 8 or length > min(_MAX_HEADER_BYTES, self._size - 8):
            raise self._damaged("its header does not fit into it")
        try:
            header = parse_json(self._bytes(8, 8 + length))
            self.metadata: dict[str, Any] | None = header.pop("__metadata__", None)
            self.entries = {str(key): self._entry(value, 8 + length) for key, value in header.items()}
            self._check_tiling(8 + length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(f"its header is damaged: {error!r}"[:300]) from None

    def _entry(self, value: dict[str, Any], base: int) -> Entry:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        if dtype not in self._items:
            raise ValueError(f"dtype {ascii(dtype)[:20]} is not known")
        if len(shape) > MAX_DIMS:
            raise ValueError("a tensor has too many dims")
        numbers = (*shape, start, stop)
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
            raise ValueError("a shape or an offset is not a count")
        if not start <= stop <= self._size - base or stop - start != math.prod(shape) * self._items[dtype]:
            raise ValueError("an offset does not fit the shape or the file")
        return Entry(dtype, tuple(shape), base + start, base + stop)

    def _check_tiling(self, base: int) -> None:
        """Check that the tensors leave no holes and share no bytes, as the format demands."""
        for start, stop in sorted((entry.start, entry.stop) for entry in self.entries.values()):
            if start != base:
                raise ValueError("its tensors overlap or leave holes")
            base = stop
        if base != self._size:
            raise ValueError("it has bytes that belong to no tensor")

    def spans(self) -> dict[str, tuple[int, int]]:
        """Where the bytes of each key lie in the file."""
        return {key: (entry.start, entry.stop) for key, entry in self.entries.items()}

    def read(self, key: str, box: tuple[slice, ...]) -> np.ndarray:
        """Read a part of a tensor.

        Args:
            key: name of the tensor in the file.
            box: the part, a slice per dim.

        Returns:
            uint8 [*shape of the box, bytes of an item].
        """
        item = self._items[self.entries[key].dtype]
        result = np.empty((*(part.stop - part.start for part in box), item), np.uint8)
        for place, items in self.parts(key, box):
            result[place] = items
        return result

    def parts(self, key: str, box: tuple[slice, ...]) -> Iterator[tuple[tuple[int | slice, ...], np.ndarray]]:
        """Read a part of a tensor in portions that take little memory, with hardly more than its own bytes.

        Args:
            key: name of the tensor in the file.
            box: the part, a slice per dim.

        Yields:
            Where in the box, and its bytes: uint8 [*shape there, bytes of an item], of at most 16 MiB or one row.
        """
        entry = self.entries[key]
        item, shape = self._items[entry.dtype], entry.shape
        lengths = [part.stop - part.start for part in box]
        if not shape or not math.prod(lengths):
            if not shape:
                yield (), self._array([entry.start], item).reshape(item)
            return
        strides = [math.prod(shape[dim + 1 :]) * item for dim in range(len(shape))]
        # The rows of this dim are read whole, those of the dims before it one by one.
        dim = max((d for d, length in enumerate(lengths) if length != shape[d]), default=0)
        shortest = _SHORTEST_REMOTE_BYTES if is_remote(self._path) else _SHORTEST_BYTES
        while dim and lengths[dim] * strides[dim] < shortest:
            dim -= 1
        inner, first = tuple(box[dim + 1 :]), entry.start + box[dim].start * strides[dim]
        if dim == 0:
            step = max(1, _PART_BYTES // strides[0])
            for low in range(0, lengths[0], step):
                count = min(step, lengths[0] - low)
                rows = self._array([first + low * strides[0]], count * strides[0]).reshape(count, *shape[1:], item)
                yield (slice(low, low + count),), rows[(slice(None), *inner)]
            return
        length = lengths[dim] * strides[dim]
        step = max(1, _PART_BYTES // length)
        for outer in itertools.product(*(range(count) for count in lengths[: dim - 1])):
            base = first + sum((box[d].start + index) * strides[d] for d, index in enumerate(outer))
            for low in range(0, lengths[dim - 1], step):
                high = min(low + step, lengths[dim - 1])
                starts = [base + (box[dim - 1].start + row) * strides[dim - 1] for row in range(low, high)]
                rows = self._array(starts, length).reshape(high - low, lengths[dim], *shape[dim + 1 :], item)
                yield (*outer, slice(low, high)), rows[(slice(None), slice(None), *inner)]

    def stretch(self, key: str, box: tuple[slice, ...]) -> tuple[int, int] | None:
        """Return the bytes `[start, stop)` of the file that a part of a tensor is; None where it is not contiguous.

        Args:
            key: name of the tensor in the file.
            box: the part, a slice per dim.
        """
        entry = self.entries[key]
        if any(part != slice(0, size) for part, size in zip(box[1:], entry.shape[1:], strict=True)):
            return None
        row = math.prod(entry.shape[1:]) * self._items[entry.dtype]
        start = entry.start + (box[0].start * row if box else 0)
        return start, start + (box[0].stop - box[0].start if box else 1) * row

    def fill(self, start: int, out: memoryview, tell: Callable[[memoryview], object] = lambda part: None) -> None:
        """Read the bytes from `start` on straight into the memory that they are for; `tell` gets them part by part.

        Args:
            start: offset of the first byte.
            out: the buffer to fill.
            tell: given each part of `out` as it is filled.
        """
        if read_range_into(self._path, start, out, tell) != len(out):
            raise self._damaged("it is shorter than it was")

    def _array(self, starts: list[int], length: int) -> np.ndarray:
        data = np.empty(len(starts) * length, np.uint8)
        if not read_runs(self._path, starts, length, data.data):
            raise self._damaged("it is shorter than it was")
        return data

    def _bytes(self, start: int, stop: int) -> bytes:
        data = read_range(self._path, start, stop)
        if len(data) != stop - start:
            raise self._damaged("it is shorter than it was")
        return data

    def _damaged(self, reason: str) -> DamagedError:
        return DamagedError(f"a file of the checkpoint is damaged: {reason}", got=self._path)
