"""Reading parts of a safetensors file, of a folder or of an object store, whoever wrote it.

The format is https://github.com/huggingface/safetensors#format. Its own library maps local files only. Nothing that
the header claims is believed before it was compared with the size of the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.checkpoint.format import ITEM_BYTES, parse_json
from orchestrator.checkpoint.storage import AnyPath, is_remote, read_range, read_range_into
from orchestrator.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # as the format's own library


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its bytes are `[start, stop)` of the file, row-major."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """The tensors of one file by key.

    Raises:
        CheckpointError: it is no safetensors file, or its header claims what the file does not have.
        OSError: it cannot be read.
    """

    def __init__(self, path: AnyPath):
        self._path = path
        self._size = int(path.stat().st_size)
        length = int.from_bytes(self._bytes(0, min(8, self._size)), "little")
        if self._size < 8 or length > min(_MAX_HEADER_BYTES, self._size - 8):
            raise self._damaged("its header does not fit into it")
        try:
            header = parse_json(self._bytes(8, 8 + length))
            header.pop("__metadata__", None)
            self.entries = {str(key): self._entry(value, 8 + length) for key, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(f"its header is damaged: {error!r}"[:300]) from None
        self._map: Any = None if is_remote(path) or not self._size else np.memmap(str(path), np.uint8, "r")

    def _entry(self, value: dict[str, Any], base: int) -> Entry:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = (*shape, start, stop)
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
            raise ValueError("a shape or an offset is not a count")
        if not start <= stop <= self._size - base or stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError("an offset does not fit the shape or the file")
        return Entry(dtype, tuple(shape), base + start, base + stop)

    def spans(self) -> dict[str, tuple[int, int]]:
        """Where the bytes of each key lie in the file."""
        return {key: (entry.start, entry.stop) for key, entry in self.entries.items()}

    def read(self, key: str, box: tuple[slice, ...]) -> np.ndarray:
        """The bytes of a part of a tensor.

        Returns:
            uint8 [*shape of the box, bytes of an item]; of a local file a view of the mapped file.
        """
        entry = self.entries[key]
        item = ITEM_BYTES[entry.dtype]
        if not entry.shape:
            return self._array(entry.start, entry.stop).reshape(item)
        # Rows lie one behind the other: of a store only those of the box are fetched.
        row = math.prod(entry.shape[1:]) * item
        start, stop = entry.start + box[0].start * row, entry.start + box[0].stop * row
        rows = self._array(start, stop).reshape(box[0].stop - box[0].start, *entry.shape[1:], item)
        return rows[(slice(None), *box[1:])]

    def read_into(self, key: str, box: tuple[slice, ...], out: memoryview) -> bool:
        """Read a part straight into the memory that it is for.

        Args:
            out: as many bytes as the part has.

        Returns:
            False, and nothing is read, where the part is no single stretch of the file.
        """
        entry = self.entries[key]
        if any(part != slice(0, size) for part, size in zip(box[1:], entry.shape[1:], strict=True)):
            return False
        row = math.prod(entry.shape[1:]) * ITEM_BYTES[entry.dtype]
        start = entry.start + (box[0].start * row if box else 0)
        if read_range_into(self._path, start, out) != len(out):
            raise self._damaged("it is shorter than it was")
        return True

    def _array(self, start: int, stop: int) -> np.ndarray:
        if self._map is not None:
            return np.asarray(self._map[start:stop])
        return np.frombuffer(self._bytes(start, stop), np.uint8)

    def _bytes(self, start: int, stop: int) -> bytes:
        data = read_range(self._path, start, stop)
        if len(data) != stop - start:
            raise self._damaged("it is shorter than it was")
        return data

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"a file of the checkpoint is damaged: {reason}", got=self._path)
