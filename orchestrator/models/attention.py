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
        scale: factor on the scores; None: 1 / sqrt(head_dim).
        softcap: bounds the scores, by `softcap * tanh(scores / softcap)`; None: none.
        sinks: each call gets the heads' sinks. What wraps a core and computes softmax itself reads these four.
    """

    def __init__(
        self, dropout: float = 0.0, scale: float | None = None, softcap: float | None = None, *, sinks: bool = False
    ):
        super().__init__()
        self.dropout, self.scale, self.softcap, self.sinks = dropout, scale, softcap, sinks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            q: [B, H, T, head_dim].
            k: [B, H / n, S, head_dim]; each key head serves n query heads in a row.
            v: as `k`.
            mask: broadcastable to [B, H, T, S]: bool, True where attention may look, or as `mask.additive` makes
                it. None: causal, and for T = 1 everything.
            sinks: [H], a logit per head that takes part in the softmax and has no value; None: there are none.

        Returns:
            [B, H, T, head_dim]
        """
        if self.softcap is not None:
            return self._written_out(q, k, v, mask, sinks)
        if sinks is None:
            return self._fused(q, k, v, mask, self.scale)
        return self._with_sinks(q, k, v, mask, sinks)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
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
            scale=scale,
            enable_gqa=grouped,
        )

    def _with_sinks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor) -> Tensor:
        """Attend with one more key in front, whose score is the sink: what kernels without sinks can do.

        Queries get one more element, the sink, and the key has a one there; its value is zero.
        """
        head_dim = q.shape[-1]
        scale = head_dim**-0.5 if self.scale is None else self.scale
        more = 8 - head_dim % 8  # kernels want widths of eights
        extra = (sinks / scale).to(q.dtype).view(1, -1, 1, 1).expand(*q.shape[:3], 1)
        q = F.pad(torch.cat((q, extra), -1), (0, more - 1))
        one = F.pad(torch.ones_like(k[:, :, :1, :1]), (head_dim, more - 1))
        k, v = torch.cat((one, F.pad(k, (0, more))), 2), F.pad(v, (0, more, 1, 0))
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
        elif q.shape[2] > 1:
            # One more query in front, too, and plain causality says the same as before.
            return self._fused(F.pad(q, (0, 0, 1, 0)), k, v, None, scale)[:, :, 1:, :head_dim]
        return self._fused(q, k, v, mask, scale)[..., :head_dim]

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Attend with all scores written out, in fp32: there is no kernel that bounds them."""
        assert self.softcap is not None
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, key heads, n, T, head_dim]
        scores = (grouped @ k.unsqueeze(2).transpose(-1, -2)).float() * scale
        scores = ((scores / self.softcap).tanh() * self.softcap).flatten(1, 2)
        if mask is None and q.shape[2] > 1:
            ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            mask = ones.tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        if sinks is not None:
            scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
        weights = scores.softmax(-1)
        weights = weights if sinks is None else weights[..., :-1]
        weights = F.dropout(weights.to(v.dtype), self.dropout, self.training and self.dropout > 0.0)
        return (weights.unflatten(1, (k.shape[1], -1)) @ v.unsqueeze(2)).flatten(1, 2)


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

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask | Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Attend; arguments and result as `AttentionCore`, but `mask` is the rule instead of the tensor.

        Where rows of a cache differ it is the tensor: of one position of each.
        """
        length = q.shape[2]
        more = () if sinks is None else (sinks,)
        if isinstance(mask, Tensor):
            return self.core(q, k, v, mask, *more)
        if length <= self.block:
            return self.core(q, k, v, mask.whole(), *more)
        parts = []
        for start in range(0, length, self.block):
            stop = min(start + self.block, length)
            first, end = mask.visible_keys(start, stop)
            tensors = (q[:, :, start:stop], k[:, :, first:end], v[:, :, first:end])
            if torch.is_grad_enabled():
                parts.append(self.checkpoint(self._attend, *tensors, mask, (start, stop), (first, end), *more))
            else:
                parts.append(self._attend(*tensors, mask, (start, stop), (first, end), *more))
        return torch.cat(parts, 2)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: CausalMask,
        queries: tuple[int, int],
        keys: tuple[int, int],
        *sinks: Tensor,
    ) -> Tensor:
        return self.core(q, k, v, mask.part(queries, keys), *sinks)
