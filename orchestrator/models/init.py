"""Initial weights that are the same on every backend and layout.

Each parameter is cut into chunks of whole rows, and each chunk is drawn on the host from its own generator,
keyed by seed, parameter name and chunk index. So a rank draws the chunks that overlap its shard and no
others, and what it gets does not depend on how many ranks there are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Init:
    """The initial distribution of a parameter.

    Attributes:
        kind: `normal` and `uniform` have mean 0 and standard deviation `std`.
        std: of `normal` and `uniform`.
        cutoff: standard deviations beyond which what is `normal` is drawn again, at least 1; None: it is not.
    """

    kind: Literal["normal", "uniform", "zeros", "ones"]
    std: float = 0.0
    cutoff: float | None = None


def draw_slice(init: Init, name: str, seed: int, shape: tuple[int, ...], slices: tuple[slice, ...]) -> Tensor:
    """Draw the part `slices` of a parameter's initial value.

    Args:
        init: how the parameter starts.
        name: its fully qualified name.
        seed: of the run.
        shape: its global shape.
        slices: one per dim, with step 1.

    Returns:
        fp32 on the host, of the slices' shape.

    Raises:
        ValueError: not one slice per dim, or a step other than 1.
    """
    if len(slices) != len(shape):
        raise ValueError(f"'{name}' has {len(shape)} dims, got {len(slices)} slices")
    bounds = [part.indices(size) for part, size in zip(slices, shape, strict=True)]
    if any(step != 1 for _, _, step in bounds):
        raise ValueError(f"slices of '{name}' must have step 1, got {slices}")
    out = np.empty([max(stop - start, 0) for start, stop, _ in bounds], dtype=np.float32)
    if init.kind in ("zeros", "ones"):
        out.fill(1.0 if init.kind == "ones" else 0.0)
    elif out.size:
        _fill_drawn(out, init, name, seed, shape, bounds)
    return torch.from_numpy(out)


def rows_per_chunk(shape: tuple[int, ...]) -> int:
    """Return the number of rows on dim 0 that share a generator: about 64 Ki elements, at least one row.

    Args:
        shape: of the parameter.
    """
    return max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))


def _fill_drawn(
    out: np.ndarray, init: Init, name: str, seed: int, shape: tuple[int, ...], bounds: list[tuple[int, int, int]]
) -> None:
    start, stop, _ = bounds[0]
    columns = tuple(slice(low, high) for low, high, _ in bounds[1:])
    for chunk, first, last in _chunks(shape, start, stop):
        generator, size = _generator(seed, name, chunk), (last - first, *shape[1:])
        if init.kind == "normal":
            values = generator.standard_normal(size, dtype=np.float32)
            while init.cutoff is not None and (beyond := np.abs(values) > init.cutoff).any():
                values[beyond] = generator.standard_normal(int(beyond.sum()), dtype=np.float32)
        else:  # uniform, of variance 1
            values = (2 * generator.random(size, dtype=np.float32) - 1) * np.float32(math.sqrt(3))
        low, high = max(first, start), min(last, stop)
        part = values[(slice(low - first, high - first), *columns)]
        np.multiply(part, np.float32(init.std), out=out[low - start : high - start])


def _chunks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Index, first and one-past-last row of the chunks that overlap rows [start, stop)."""
    rows = rows_per_chunk(shape)
    for chunk in range(start // rows, -(-stop // rows)):
        yield chunk, chunk * rows, min((chunk + 1) * rows, shape[0])


def _generator(seed: int, name: str, chunk: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\0{name}\0{chunk}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
