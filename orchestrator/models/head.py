"""The output head: from the last hidden states to logits or to the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orchestrator.models.loss import HeadOps, default_head_ops


class LMHead(nn.Module):
    """From the last hidden states to logits or to the loss.

    Args:
        vocab_size: V.
        dim: D.
        ops: its mathematics, or how many tokens' logits exist at one time when the loss is computed.
        scale: factor on the logits.
        softcap: bounds them then, by `softcap * tanh(logits / softcap)`; None: none.

    Attributes:
        weight: [V, D].
        ops: the mathematics; a strategy that shards the vocabulary replaces it.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        ops: HeadOps | int = 2048,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
    ):
        super().__init__()
        self.weight: Tensor = nn.Parameter(torch.empty(vocab_size, dim))
        self.ops = default_head_ops(ops, softcap) if isinstance(ops, int) else ops
        self.scale = scale

    def forward(self, hidden: Tensor, targets: Tensor | None = None, last_only: bool = False) -> Tensor:
        """Loss with targets, logits without.

        Args:
            hidden: [B, T, D].
            targets: [B, T] with -100 where there is none, or None.
            last_only: logits of the last position only.

        Returns:
            fp32 scalar, the sum over the targets; or [B, T, V], with `last_only` [B, 1, V].
        """
        if self.scale != 1.0:
            hidden = hidden * self.scale
        if targets is not None:
            return self.ops.loss(hidden, self.weight, targets)
        logits = self.ops.logits(hidden[:, -1:] if last_only else hidden, self.weight)
        cap = self.ops.softcap
        return logits if cap is None else (logits / cap).tanh() * cap
