"""Cross-entropy over a large vocabulary without ever holding all logits.

The logits of a batch are its largest tensor by far (tokens x vocabulary). Here they exist for a chunk of
tokens at a time, and the gradients are taken while they do, so backward has only to scale what forward
stored. Every shape is static and nothing is read back to the host: the code traces under XLA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.constants import IGNORE_INDEX


def _same(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class VocabShard:
    """The rows of the head's weight that this rank holds, and the reductions over the ranks.

    Attributes:
        offset: vocabulary index of the first local row.
        all_reduce_max: element-wise maximum over the ranks; may work in place.
        all_reduce_sum: element-wise sum over the ranks; may work in place.
    """

    offset: int = 0
    all_reduce_max: Callable[[Tensor], Tensor] = _same
    all_reduce_sum: Callable[[Tensor], Tensor] = _same


WHOLE_VOCAB = VocabShard()


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    vocab: VocabShard = WHOLE_VOCAB,
    softcap: float | None = None,
) -> Tensor:
    """Sum of the cross-entropies of `softmax(hidden @ weight.T)` against the targets.

    The products run in the dtype of `hidden` (under autocast: autocast's), the softmax in fp32, and the
    weight's gradient is accumulated in fp32.

    Args:
        hidden: [N, D].
        weight: [V, D], or a rank's rows of it.
        targets: [N], indices into the whole vocabulary; -100 marks positions that do not count.
        chunk_tokens: rows whose logits exist at one time.
        vocab: the rank's place in a sharded vocabulary. The gradient of `hidden` is then this rank's part
            of a sum over ranks, which the caller takes.
        softcap: bounds the logits, by `softcap * tanh(logits / softcap)`; None: none.

    Returns:
        fp32 scalar, the same on all ranks of a sharded vocabulary.

    Raises:
        ValueError: `chunk_tokens` below 1.
        RuntimeError: backward a second time; the gradients are handed out once.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    hidden = _to_autocast(hidden)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return _chunk_losses(hidden, weight, targets, chunk_tokens, vocab, softcap, None, None)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_tokens, vocab, softcap)


@dataclass
class HeadOps:
    """The operations of the output head on its weight; a strategy that shards the vocabulary replaces them.

    Attributes:
        loss: (hidden [B, T, D], weight, targets [B, T]) -> fp32 scalar sum.
        logits: (hidden [B, T, D], weight) -> [B, T, V].
        chunk_tokens: tokens whose logits exist at one time.
        softcap: of the logits that `loss` makes; those of `logits` are not bounded yet.
    """

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    logits: Callable[[Tensor, Tensor], Tensor]
    chunk_tokens: int
    softcap: float | None = None


def default_head_ops(chunk_tokens: int, softcap: float | None = None) -> HeadOps:
    """Return the head of a model whose vocabulary is whole on every device.

    Args:
        chunk_tokens: tokens whose logits exist at one time.
        softcap: bounds the logits; None: none.
    """

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return chunked_cross_entropy(
            hidden.flatten(0, 1), weight, targets.flatten(), chunk_tokens, WHOLE_VOCAB, softcap
        )

    return HeadOps(loss, torch.nn.functional.linear, chunk_tokens, softcap)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        vocab: VocabShard,
        softcap: float | None,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = _chunk_losses(hidden, weight, targets, chunk_tokens, vocab, softcap, d_hidden, d_weight)
        # Not save_for_backward: backward scales these in place and lets them go.
        ctx.gradients, ctx.weight_dtype = (d_hidden, d_weight), weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked cross-entropy can be differentiated once per forward pass")
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(upstream[0])
        if d_weight is not None:
            d_weight = d_weight.mul_(upstream[0]).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None


def _chunk_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    vocab: VocabShard,
    softcap: float | None,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
) -> Tensor:
    """Return the summed loss; fill `d_hidden` and add to `d_weight` where they are given."""
    weight = weight.to(hidden.dtype)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        wanted = d_hidden is not None or d_weight is not None
        loss, d_logits = _one_chunk(hidden[rows], weight, targets[rows], vocab, softcap, with_gradient=wanted)
        total = total + loss
        if d_hidden is not None and d_logits is not None:
            d_hidden[rows] = d_logits @ weight
        if d_weight is not None and d_logits is not None:
            if d_logits.dtype == d_weight.dtype:
                d_weight.addmm_(d_logits.T, hidden[rows])
            else:
                d_weight.add_(d_logits.T @ hidden[rows])
        del d_logits  # before the next chunk's logits are made
    return total


def _one_chunk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: VocabShard,
    softcap: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of a chunk, and d loss / d (hidden @ weight.T) [n, V] in the dtype of `hidden`."""
    logits = (hidden @ weight.T).float()
    bounded = None
    if softcap is not None:
        bounded = (logits / softcap).tanh_()
        logits = bounded * softcap
    counts = targets != IGNORE_INDEX
    local = targets - vocab.offset
    here = counts & (local >= 0) & (local < weight.shape[0])
    at = torch.where(here, local, 0).unsqueeze(-1)

    largest = vocab.all_reduce_max(logits.amax(-1))
    logits.sub_(largest.unsqueeze(-1))
    target_logit = torch.where(here, logits.gather(-1, at).squeeze(-1), 0.0)
    exponentials = logits.exp_()
    # One reduction for both: each is a latency, not a bandwidth.
    sums, target_logit = vocab.all_reduce_sum(torch.stack((exponentials.sum(-1), target_logit))).unbind()
    loss = torch.where(counts, sums.log() - target_logit, 0.0).sum()
    if not with_gradient:
        return loss, None
    probabilities = exponentials.mul_((counts / sums).unsqueeze(-1))
    d_logits = probabilities.scatter_add_(-1, at, -here.float().unsqueeze(-1))
    if bounded is not None:
        d_logits = d_logits * (1.0 - bounded.square_())
    return loss, d_logits.to(hidden.dtype)


def _to_autocast(hidden: Tensor) -> Tensor:
    """`hidden` in the dtype of autocast's matrix products, so that the chunks are computed and kept in it."""
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden
