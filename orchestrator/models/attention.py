"""Softmax attention of given queries, keys and values: at once, or a block of queries at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.models.mask import CausalMask


class AttentionCore(nn.Module):
    """Softmax attention of given queries, keys and values: what a context-parallel strategy wraps.

    Args:
        dropout: probability for the attention weights, in training.
    """

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend.

        Args:
            q: [B, H, T, head_dim].
            k: [B, H / n, S, head_dim]; each key head serves n query heads in a row.
            v: as `k`.
            mask: broadcastable to [B, H, T, S]: bool, True where attention may look, or as `mask.additive` makes
                it. None: causal, and for T = 1 everything.

        Returns:
            [B, H, T, head_dim]
        """
        grouped = k.shape[1] != q.shape[1]
        if grouped and mask is not None and q.is_cuda:
            # The CUDA kernels that take a mask do not take fewer key heads: torch would fall back to the one
            # that writes out all scores. On a CPU, and without a mask, not copying is the faster way.
            repeats = q.shape[1] // k.shape[1]
            k, v, grouped = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), False
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and q.shape[2] > 1,
            enable_gqa=grouped,
        )


class BlockedAttentionCore(nn.Module):
    """Attention to one block of queries after the other, where torch has no kernel that keeps no scores.

    Of the scores [B, H, T, S] one strip [B, H, block, S] exists at a time: each block is computed again in the
    backward pass. A block meets only the keys that it may see, so that causality saves nearly half of the products.

    Args:
        core: attends for one block.
        block: queries in a block; no more than these go to `core` as they are.
        checkpoint: the backend's checkpoint function, called as `checkpoint(function, *args)`.
    """

    def __init__(self, core: AttentionCore, block: int, checkpoint: Callable[..., Tensor]):
        super().__init__()
        self.core, self.block, self.checkpoint = core, block, checkpoint

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask) -> Tensor:
        """Attend; arguments and result as `AttentionCore`, but `mask` is the rule instead of the tensor."""
        length = q.shape[2]
        if length <= self.block:
            return self.core(q, k, v, mask.whole())
        parts = []
        for start in range(0, length, self.block):
            stop = min(start + self.block, length)
            first, end = mask.visible_keys(start, stop)
            tensors = (q[:, :, start:stop], k[:, :, first:end], v[:, :, first:end])
            if torch.is_grad_enabled():
                parts.append(self.checkpoint(self._attend, *tensors, mask, (start, stop), (first, end)))
            else:
                parts.append(self._attend(*tensors, mask, (start, stop), (first, end)))
        return torch.cat(parts, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask, queries: tuple[int, int], keys: tuple[int, int]
    ) -> Tensor:
        return self.core(q, k, v, mask.part(queries, keys))
