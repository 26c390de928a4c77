"""Where a model computes that writes text: one device, or the devices of a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.decoder import Decoder
from orchestrator.models.expert_dispatch import unchanged
from orchestrator.models.kv_cache import KVCache, StaticKVCache
from orchestrator.models.protocol import ShardableModel
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.strategies.sharded_parts import local_part


class Place:
    """One device.

    Args:
        model: on it.

    Attributes:
        groups: groups of processes that hold different rows.
        group: that of this process.
        split: what divides the length of a pass.
        static: shapes are programs: there are to be few.
        cached: keys and values can be kept; else each token is another pass over the whole text.
        row_multiple: what divides the rows of a pass.
    """

    groups, group, split, row_multiple = 1, 0, 1, 1
    static, cached = False, True
    part: Callable[[Tensor], Tensor] = staticmethod(unchanged)

    def __init__(self, model: ShardableModel):
        self.model = model
        self.cached = isinstance(model, Decoder)
        self.device = next(model.parameters()).device

    def batch(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring arrays to the device.

        Args:
            arrays: [B, T], by name.
        """
        return {name: array.to(self.device) for name, array in arrays.items()}

    def rows(self, array: Tensor) -> Tensor:
        """Bring an array that has no positions to the device.

        Args:
            array: [B, ...].
        """
        return array.to(self.device)

    def around(self) -> AbstractContextManager[Any]:
        """Wrap a forward pass."""
        return torch.no_grad()

    def host(self, logits: Tensor) -> Tensor:
        """Return logits on the host, in fp32.

        Args:
            logits: of a pass.
        """
        return logits.float().cpu()

    def share(self, tokens: Sequence[int]) -> list[list[int]]:
        """Return what each group has chosen.

        Args:
            tokens: that this one has, equally many in all groups.
        """
        return [list(tokens)]

    def cache(self, rows: int, capacity: int) -> KVCache:
        """Make the cache of this process.

        Args:
            rows: of it.
            capacity: positions of each that a static cache has.
        """
        return KVCache(len(self.model.blocks), rows, part=self.part)


class LayoutPlace(Place):
    """The devices of a layout, whose processes do everything together.

    Args:
        model: placed on it.
        parallel: the strategy that did.
    """

    def __init__(self, model: ShardableModel, parallel: ParallelStrategy):
        super().__init__(model)
        layout = parallel.layout
        self._parallel = parallel
        self.static = parallel.static_shapes
        self.group, self.groups = parallel.data_share
        self.row_multiple = layout.data_parallel if self.static else 1
        # A sequence that is divided has its keys on other ranks.
        self.cached = self.cached and layout.context == 1
        self.split = 1 if self.static and layout.context == 1 else layout.sequence_split
        self.part = local_part

    def batch(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring arrays [B, T] to the devices, divided as the layout says."""
        return self._parallel.prepare_batch(arrays)

    def rows(self, array: Tensor) -> Tensor:
        """Bring an array [B, ...] to the devices, divided along its rows alone."""
        return self._parallel.prepare_rows(array)

    def around(self) -> AbstractContextManager[Any]:
        """Wrap a forward pass, for which nothing is compiled that was not."""
        return self._parallel.generating()

    def host(self, logits: Tensor) -> Tensor:
        """Return logits on the host, in fp32; where programs are compiled they run now."""
        return self._parallel.read_rows(logits)

    def share(self, tokens: Sequence[int]) -> list[list[int]]:
        """Return what each group has chosen, of which one process speaks."""
        return self._parallel.share_rows(torch.tensor(tokens, dtype=torch.int64)).tolist()

    def cache(self, rows: int, capacity: int) -> KVCache:
        """Make the cache of this process: of its heads, in pages or in one shape."""
        if not self.static:
            return super().cache(rows, capacity)
        config = self.model.config
        kept = [config.cached(layer) for layer in range(config.layers)]
        make, keep = self._parallel.make_rows_cache, self._parallel.keep_rows_cache
        return StaticKVCache(kept, rows, capacity, make, keep)
