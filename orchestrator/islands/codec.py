"""Numbers of an exchange: fp32, bf16, int8 and int4, in groups with one scale each.

A group is a number of whole rows (all but the last dim, flattened) of about 1,024 elements, so it depends on the
tensor's shape alone: any part of an encoded tensor stands for exactly the same numbers as the whole. A scale takes
four bytes, a tenth of a percent of what the elements of a full group take in fp32. Vectors stay in fp32: they are
small, and matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.islands.boxes import Box
from orchestrator.islands.island_messages import MessageError

Array = np.ndarray[Any, np.dtype[np.float32]]
GROUP = 1024
"""Elements of a group, about."""
_LARGEST = {"int8": 127, "int4": 7}
_PLAIN_VECTOR = 1 << 16  # elements up to which a vector is sent in fp32


def encode(values: Array, box: Box, kind: str) -> bytes | memoryview:
    """Return the bytes of a part of a tensor. In fp32 they are those of `values`, where these are in one piece.

    Args:
        values: fp32, of the part's dims.
        box: the part.
        kind: `fp32`, `bf16`, `int8` or `int4`.
    """
    kind = kind_of(box.shape, kind)
    if kind in ("fp32", "bf16"):
        plain = np.ascontiguousarray(values, dtype=np.float32)
        return _bytes_of(plain if kind == "fp32" else _to_bf16(plain))
    rows = np.ascontiguousarray(values, dtype=np.float32).reshape(_rows(box), box.dims[-1])
    place = _places(box)
    scales = _scales(rows, place, _LARGEST[kind])
    return scales.tobytes() + _packed(_quantized(rows, scales, place, _LARGEST[kind]), kind)


def decode(payload: Any, box: Box, kind: str) -> Array:
    """Return the numbers that bytes stand for.

    Args:
        payload: of `encode` or `Encoded.part`.
        box: the part.
        kind: `fp32`, `bf16`, `int8` or `int4`.

    Raises:
        MessageError: there are more or fewer bytes than the part has.
    """
    kind, data = kind_of(box.shape, kind), memoryview(payload).cast("B")
    if len(data) != encoded_bytes(box, kind):
        size = encoded_bytes(box, kind)
        raise MessageError(f"a part of '{box.name}' has another size", got=len(data), allowed=str(size))
    if kind == "fp32":
        return np.frombuffer(data, dtype=np.float32).reshape(box.dims)
    if kind == "bf16":
        return _from_bf16(np.frombuffer(data, dtype=np.uint16)).reshape(box.dims)
    place = _places(box)
    count = int(place[-1]) + 1 if len(place) else 0
    scales = np.frombuffer(data[: 4 * count], dtype=np.float32)
    numbers = _unpacked(data[4 * count :], box.size, kind).reshape(_rows(box), box.dims[-1])
    return _numbers(numbers, scales, place).reshape(box.dims)


def encoded_bytes(box: Box, kind: str) -> int:
    """Return the bytes of a part of a tensor on the way.

    Args:
        box: the part.
        kind: `fp32`, `bf16`, `int8` or `int4`.
    """
    kind = kind_of(box.shape, kind)
    if kind in ("fp32", "bf16"):
        return box.size * (4 if kind == "fp32" else 2)
    place = _places(box)
    groups = int(place[-1]) + 1 if len(place) else 0
    return 4 * groups + (box.size if kind == "int8" else -(-box.size // 2))


def kind_of(shape: tuple[int, ...], kind: str) -> str:
    """Return the numbers in which a tensor is sent: vectors and scalars in fp32.

    Args:
        shape: of the tensor.
        kind: of the exchange.
    """
    small = len(shape) < 2 and (not shape or shape[0] <= _PLAIN_VECTOR)
    return "fp32" if small and kind != "bf16" else kind


@dataclass(frozen=True)
class Encoded:
    """A whole tensor in the numbers of an exchange.

    Attributes:
        box: all of the tensor.
        kind: of its numbers.
        scales: of its groups; empty where there are none.
        numbers: fp32, bf16 as uint16, or int8, of the tensor's shape.
    """

    box: Box
    kind: str
    scales: Array
    numbers: np.ndarray[Any, Any]

    @classmethod
    def of(cls, values: Array, name: str, kind: str) -> Encoded:
        """Encode a tensor.

        Args:
            values: fp32, the whole tensor.
            name: of the tensor.
            kind: `fp32`, `bf16`, `int8` or `int4`.
        """
        box, kind, none = Box.whole(name, values.shape), kind_of(values.shape, kind), np.empty(0, np.float32)
        if kind == "fp32":
            return cls(box, kind, none, np.ascontiguousarray(values, dtype=np.float32))
        if kind == "bf16":
            return cls(box, kind, none, _to_bf16(np.ascontiguousarray(values, dtype=np.float32)))
        rows, place = np.ascontiguousarray(values, dtype=np.float32).reshape(_rows(box), box.dims[-1]), _places(box)
        scales = _scales(rows, place, _LARGEST[kind])
        return cls(box, kind, scales, _quantized(rows, scales, place, _LARGEST[kind]).reshape(box.dims))

    @classmethod
    def read(cls, payload: Any, box: Box, kind: str) -> Encoded:
        """Return the tensor that `part` of all of it gave.

        Args:
            payload: its bytes.
            box: all of the tensor.
            kind: of the exchange.

        Raises:
            MessageError: there are more or fewer bytes than the tensor has.
        """
        kind, data = kind_of(box.shape, kind), memoryview(payload).cast("B")
        if len(data) != encoded_bytes(box, kind):
            raise MessageError(f"an update of '{box.name}' has another size", got=len(data))
        none = np.empty(0, np.float32)
        if kind in ("fp32", "bf16"):
            numbers = np.frombuffer(data, dtype=np.float32 if kind == "fp32" else np.uint16)
            return cls(box, kind, none, numbers.reshape(box.dims))
        place = _places(box)
        count = int(place[-1]) + 1 if len(place) else 0
        scales = np.frombuffer(data[: 4 * count], dtype=np.float32)
        return cls(box, kind, scales, _unpacked(data[4 * count :], box.size, kind).reshape(box.dims))

    def part(self, box: Box) -> bytes | memoryview:
        """Return the bytes of a part: `decode` of them is exactly that part of `decoded`. Not copied where possible.

        Args:
            box: the part.
        """
        numbers = np.ascontiguousarray(self.numbers[box.slices])
        if self.kind in ("fp32", "bf16"):
            return _bytes_of(numbers)
        groups = np.unique(_groups(box))
        return self.scales[groups].tobytes() + _packed(numbers.reshape(-1), self.kind)

    def decoded(self) -> Array:
        """Return the numbers that the tensor stands for."""
        if self.kind == "fp32":
            return self.numbers
        if self.kind == "bf16":
            return _from_bf16(self.numbers)
        rows = self.numbers.reshape(_rows(self.box), self.box.dims[-1])
        return _numbers(rows, self.scales, _places(self.box)).reshape(self.box.dims)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.scales.nbytes + self.numbers.nbytes


def _bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


# --- rows, groups, scales ------------------------------------------------------------------------------


def _rows(box: Box) -> int:
    rows = 1
    for length in box.dims[:-1]:
        rows *= length
    return rows


def _groups(box: Box) -> np.ndarray[Any, Any]:
    """Return the number of the group of each row of a part, in the whole tensor."""
    index = np.zeros(1, dtype=np.int64)
    for length, start, stop in zip(box.shape[:-1], box.start[:-1], box.stop[:-1], strict=True):
        index = (index[:, None] * length + np.arange(start, stop)).reshape(-1)
    return index // max(1, GROUP // max(1, box.shape[-1]))


def _places(box: Box) -> np.ndarray[Any, Any]:
    """Return the place of each row's scale among those of the part: rows are in order, so scales are, too."""
    groups = _groups(box)
    if not len(groups):
        return groups
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(groups[1:] != groups[:-1])))


def _scales(rows: Array, place: np.ndarray[Any, Any], largest: int) -> Array:
    """Return the scale of each group: its largest element is `largest` of them."""
    if not rows.size:
        return np.zeros(int(place[-1]) + 1 if len(place) else 0, dtype=np.float32)
    highest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    begins = np.flatnonzero(np.concatenate((np.ones(1, dtype=bool), place[1:] != place[:-1])))
    return np.asarray(np.maximum.reduceat(highest, begins) / np.float32(largest), dtype=np.float32)


def _quantized(rows: Array, scales: Array, place: np.ndarray[Any, Any], largest: int) -> np.ndarray[Any, Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(scales > 0, np.float32(1) / scales, np.float32(0)).astype(np.float32)
        inverse[~np.isfinite(inverse)] = 0  # of scales so small that they have no inverse: nothing is lost in them
        scaled = rows * inverse[place][:, None]
    np.rint(scaled, out=scaled)
    np.clip(scaled, -largest, largest, out=scaled)
    return scaled.astype(np.int8)


def _numbers(rows: np.ndarray[Any, Any], scales: Array, place: np.ndarray[Any, Any]) -> Array:
    found = rows.astype(np.float32)
    found *= scales[place][:, None]
    return found


# --- bits ------------------------------------------------------------------------------------------------


def _packed(numbers: np.ndarray[Any, Any], kind: str) -> bytes:
    flat = numbers.reshape(-1)
    if kind == "int8":
        return flat.tobytes()
    nibbles = (flat + 8).astype(np.uint8)
    if len(nibbles) % 2:
        nibbles = np.append(nibbles, np.uint8(8))
    return np.asarray(nibbles[::2] | (nibbles[1::2] << 4), dtype=np.uint8).tobytes()


def _unpacked(data: memoryview, size: int, kind: str) -> np.ndarray[Any, Any]:
    if kind == "int8":
        return np.frombuffer(data, dtype=np.int8)
    pairs = np.frombuffer(data, dtype=np.uint8)
    numbers = np.empty(2 * len(pairs), dtype=np.int8)
    numbers[::2], numbers[1::2] = (pairs & 15).astype(np.int8) - 8, (pairs >> 4).astype(np.int8) - 8
    return numbers[:size]


def _to_bf16(values: Array) -> np.ndarray[Any, Any]:
    """Round to the nearest bf16, to even between two."""
    words = values.view(np.uint32)
    return ((words + (((words >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def _from_bf16(words: np.ndarray[Any, Any]) -> Array:
    return np.asarray((words.astype(np.uint32) << 16).view(np.float32))
