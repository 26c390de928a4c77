"""The output head: from the last hidden states to logits or to the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from orchestrator.models.loss import HeadOps, SourceLosses, ZLoss, default_head_ops


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
        z_loss: added to the loss in training; None: none.
        source_losses: told in training what the losses of each source are; None: nobody asks.
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
        self.z_loss: ZLoss | None = None
        self.source_losses: SourceLosses | None = None
        self._sources: Tensor | None = None
        self._token_weights: Tensor | None = None

    def forward(self, hidden: Tensor, targets: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Loss with targets, logits without.

        Args:
            hidden: [B, T, D].
            targets: [B, T] with -100 where there is none, or None.
            at: [B], the one position of each row whose logits are wanted; None: all.

        Returns:
            fp32 scalar, the sum over the targets, within `weighted` each times its factor; or [B, T, V], with
            `at` [B, 1, V].
        """
        if self.scale != 1.0:
            hidden = hidden * self.scale
        if targets is not None:
            trains = self.training and torch.is_grad_enabled()
            penalty, asks = (self.z_loss, self.source_losses) if trains else (None, None)
            if asks is None or self._sources is None:
                return self.ops.loss(hidden, self.weight, targets, self._token_weights, penalty)
            found = list[Tensor]()
            loss = self.ops.loss(hidden, self.weight, targets, self._token_weights, penalty, found)
            asks.add(torch.cat(found, 1), targets, self._sources)
            return loss
        logits = self.ops.logits(hidden, self.weight, at)
        cap = self.ops.softcap
        return logits if cap is None else (logits / cap).tanh() * cap

    @contextmanager
    def weighted(self, weights: Tensor | None) -> Iterator[None]:
        """Within it each target's cross-entropy is multiplied by a factor. Forward passes of models know nothing of it.

        Args:
            weights: [B, T] fp32, of the batch that is passed forward; None: all are one.
        """
        self._token_weights = weights
        try:
            yield
        finally:
            self._token_weights = None

    @contextmanager
    def told_apart(self, sources: Tensor | None) -> Iterator[None]:
        """Within it the losses of training are told to `source_losses` by source.

        Args:
            sources: [B, T], of the batch that is passed forward; None: they are not told.
        """
        self._sources = sources
        try:
            yield
        finally:
            self._sources = None

    @contextmanager
    def scoring(self) -> Iterator[list[Tensor]]:
        """Within it the head, asked for the loss, keeps what it is of each target.

        Yields:
            A list, to which each forward pass adds a tensor [B, T, 2] fp32: the losses, and 1 where the target is the
            likeliest token; zeros where there is no target.
        """
        ops, found = self.ops, list[Tensor]()

        def loss(hidden: Tensor, weight: Tensor, targets: Tensor, *unused: object) -> Tensor:
            losses, greedy = ops.token_losses(hidden, weight, targets)
            found.append(torch.stack((losses, greedy.float()), -1))
            return losses.sum()

        self.ops = replace(ops, loss=loss)
        try:
            yield found
        finally:
            self.ops = ops
