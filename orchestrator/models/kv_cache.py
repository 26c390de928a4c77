"""The cache of keys and values of earlier positions for text generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, preallocated.

    Args:
        shape: (B, kv_heads, capacity, width of a key).
        value_width: of a value.
        dtype: of the keys and values.
        device: where they lie.
    """

    def __init__(self, shape: tuple[int, int, int, int], value_width: int, dtype: torch.dtype, device: torch.device):
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty((*shape[:3], value_width), dtype=dtype, device=device)
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, kv_heads, T, width]; returns all positions so far, [B, kv_heads, length, width].

        Args:
            k: keys.
            v: values.

        Raises:
            ValueError: more positions than the cache was made for.
        """
        stop = self.length + k.shape[2]
        if stop > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} positions, {stop} are needed")
        self.keys[:, :, self.length : stop] = k
        self.values[:, :, self.length : stop] = v
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class KVCache:
    """The caches of all layers.

    Args:
        batch: sequences.
        kept: of each layer, its key heads, and the widths of a key and of a value: `ModelConfig.cached`.
        capacity: positions that fit.
        dtype: of the keys and values.
        device: where they lie.
    """

    def __init__(
        self,
        *,
        batch: int,
        kept: Sequence[tuple[int, int, int]],
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.capacity = capacity
        place = torch.device(device)
        self.layers = [LayerCache((batch, heads, capacity, key), value, dtype, place) for heads, key, value in kept]

    @property
    def length(self) -> int:
        """Positions that are in the cache."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forget all positions; the memory stays."""
        for layer in self.layers:
            layer.length = 0
