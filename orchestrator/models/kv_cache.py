"""The cache of keys and values of earlier positions for text generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, preallocated.

    Args:
        shape: (B, kv_heads, capacity, head_dim).
        dtype: of the keys and values.
        device: where they lie.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, kv_heads, T, head_dim]; returns all positions so far, [B, kv_heads, length, head_dim].

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
        kv_heads: key heads of each layer.
        capacity: positions that fit.
        head_dim: width of one head.
        dtype: of the keys and values.
        device: where they lie.
    """

    def __init__(
        self,
        *,
        batch: int,
        kv_heads: Sequence[int],
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.capacity = capacity
        place = torch.device(device)
        self.layers = [LayerCache((batch, heads, capacity, head_dim), dtype, place) for heads in kv_heads]

    @property
    def length(self) -> int:
        """Positions that are in the cache."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forget all positions; the memory stays."""
        for layer in self.layers:
            layer.length = 0
