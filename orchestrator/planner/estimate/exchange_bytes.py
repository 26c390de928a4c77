"""Bytes of an exchange between islands, from shapes alone; they are those that `islands.codec` writes."""

from __future__ import annotations

import math
from collections.abc import Iterable

KINDS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
"""Numbers on the way, and the bytes of one."""
_GROUP = 1024  # elements with one scale, about
_PLAIN_VECTOR = 1 << 16  # elements up to which a vector is sent in fp32
_SCALE = 4


def exchange_bytes(shapes: Iterable[tuple[int, ...]], kind: str) -> int:
    """Return the bytes of all tensors in one direction. Shards that cut a group send its scale once more each.

    Args:
        shapes: of the tensors.
        kind: a key of `KINDS`.
    """
    return sum(_tensor_bytes(shape, kind) for shape in shapes)


def typical_bytes(elements: float, kind: str) -> float:
    """Return the bytes of a model of which only the size is known: as if all of it were matrices.

    Args:
        elements: parameters that are trained.
        kind: a key of `KINDS`.
    """
    return elements * (KINDS[kind] + (_SCALE / _GROUP if kind.startswith("int") else 0.0))


def _tensor_bytes(shape: tuple[int, ...], kind: str) -> int:
    size = math.prod(shape)
    vector = len(shape) < 2 and size <= _PLAIN_VECTOR
    if kind == "fp32" or (vector and kind != "bf16"):
        return 4 * size
    if kind == "bf16":
        return 2 * size
    groups = -(-math.prod(shape[:-1]) // max(1, _GROUP // max(1, shape[-1])))
    return _SCALE * groups + (size if kind == "int8" else -(-size // 2))
