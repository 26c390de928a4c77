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


@dataclass
class ZLoss:
    """A penalty on the square of the softmax's normaliser, so that logits do not drift (PaLM, arXiv 2204.02311, 5).

    Attributes:
        coefficient: of the square of each counted position's logarithm of the normaliser.
        total: of what was computed since it was taken, a scalar; None where nothing was.
    """

    coefficient: float
    total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        """Count `part`, the penalty of further positions."""
        self.total = part if self.total is None else self.total + part

    def take(self) -> Tensor | None:
        """Return the penalty of the positions here since the last call; None where nothing was computed."""
        taken, self.total = self.total, None
        return taken


@dataclass
class SourceLosses:
    """The cross-entropies of each source of the data, summed while the loss is computed.

    Attributes:
        count: of sources.
        total: [count, 2] since it was taken: the sums, and how many targets they are of; None where nothing was.
    """

    count: int
    total: Tensor | None = None

    @torch.no_grad()
    def add(self, losses: Tensor, targets: Tensor, sources: Tensor) -> None:
        """Count the losses of a batch.

        Args:
            losses: [B, T].
            targets: [B, T], -100 where there is none.
            sources: [B, T].
        """
        numbers = torch.arange(self.count, device=sources.device).view(-1, 1, 1)
        mine = (sources.unsqueeze(0) == numbers) & (targets != IGNORE_INDEX).unsqueeze(0)
        sums = torch.where(mine, losses.unsqueeze(0), 0.0).sum((1, 2))
        found = torch.stack((sums, mine.sum((1, 2)).float()), -1)
        self.total = found if self.total is None else self.total + found

    def take(self) -> Tensor | None:
        """Return the sums since the last call; None where nothing was computed."""
        taken, self.total = self.total, None
        return taken


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    vocab: VocabShard = WHOLE_VOCAB,
    softcap: float | None = None,
    weights: Tensor | None = None,
    penalty: ZLoss | None = None,
    found: list[Tensor] | None = None,
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
        weights: [N], the factor on what each target adds; None: ones. No gradient is taken of them.
        penalty: is added, and told of its part of the sum; None: none.
        found: gets the cross-entropies of each chunk, without factors, [its rows]; None: nobody asks.

    Returns:
        fp32 scalar, the same on all ranks of a sharded vocabulary.

    Raises:
        ValueError: `chunk_tokens` below 1.
        RuntimeError: backward a second time; the gradients are handed out once.
    """
    _check_chunk(chunk_tokens)
    hidden = _to_autocast(hidden)
    formula = _Formula(chunk_tokens, vocab, softcap, penalty, found)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return _chunk_losses(hidden, weight, targets, weights, formula, None, None)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, weights, formula)


@torch.no_grad()
def chunked_token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    vocab: VocabShard = WHOLE_VOCAB,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each target, and whether the target is the likeliest token. Without gradients.

    Args:
        hidden: [N, D], as all arguments those of `chunked_cross_entropy`.
        weight: [V, D], or a rank's rows of it.
        targets: [N].
        chunk_tokens: rows whose logits exist at one time.
        vocab: the rank's place in a sharded vocabulary.
        softcap: bounds the logits; None: none.

    Returns:
        [N] fp32, 0 where there is no target; and [N] bool: no token has a larger logit, and none of a smaller index has
        an equal one, as in `logits.argmax(-1) == targets`. The same on all ranks of a sharded vocabulary.

    Raises:
        ValueError: `chunk_tokens` below 1.
    """
    _check_chunk(chunk_tokens)
    hidden = _to_autocast(hidden)
    weight = weight.to(hidden.dtype)
    losses, greedy = [], []
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        chunk = _shifted_logits(hidden[rows], weight, targets[rows], vocab, softcap)
        indices = torch.arange(weight.shape[0], device=weight.device) + vocab.offset
        earlier = (chunk.logits == 0.0) & (indices < targets[rows].unsqueeze(-1))
        sums = torch.stack((chunk.logits.exp().sum(-1), chunk.target_logit, earlier.sum(-1).float()))
        sums, target_logit, before = vocab.all_reduce_sum(sums).unbind()
        losses.append(torch.where(chunk.counts, sums.log() - target_logit, 0.0))
        greedy.append(chunk.counts & (target_logit == 0.0) & (before == 0.0))
    return torch.cat(losses), torch.cat(greedy)


@dataclass
class HeadOps:
    """The operations of the output head on its weight; a strategy that shards the vocabulary replaces them.

    Attributes:
        loss: (hidden [B, T, D], weight, targets [B, T], weights [B, T] or None, penalty or None, found or None) -> fp32
            scalar sum; `found` is a list that gets the cross-entropies, [B, positions] of each stretch of positions.
        token_losses: (hidden [B, T, D], weight, targets [B, T]) -> the losses [B, T], and whether each target is the
            likeliest token [B, T].
        logits: (hidden [B, T, D], weight, at [B] or None) -> [B, T, V], or [B, 1, V] of the positions `at`.
        chunk_tokens: tokens whose logits exist at one time.
        softcap: of the logits that `loss` makes; those of `logits` are not bounded yet.
    """

    loss: Callable[..., Tensor]
    token_losses: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    logits: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    chunk_tokens: int
    softcap: float | None = None


def default_head_ops(chunk_tokens: int, softcap: float | None = None, vocab: VocabShard = WHOLE_VOCAB) -> HeadOps:
    """Return the head of a model whose `loss` and `token_losses` see all positions that are here at once.

    Args:
        chunk_tokens: tokens whose logits exist at one time.
        softcap: bounds the logits; None: none.
        vocab: the rank's place in a sharded vocabulary.
    """

    def loss(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        penalty: ZLoss | None = None,
        found: list[Tensor] | None = None,
    ) -> Tensor:
        factors = None if weights is None else weights.flatten()
        rows = hidden.flatten(0, 1), weight, targets.flatten()
        chunks = None if found is None else list[Tensor]()
        result = chunked_cross_entropy(*rows, chunk_tokens, vocab, softcap, factors, penalty, chunks)
        if found is not None and chunks is not None:
            found.append(torch.cat(chunks).view(targets.shape))
        return result

    def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses, greedy = chunked_token_losses(
            hidden.flatten(0, 1), weight, targets.flatten(), chunk_tokens, vocab, softcap
        )
        return losses.view(targets.shape), greedy.view(targets.shape)

    def logits(hidden: Tensor, weight: Tensor, at: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(positions_of(hidden, at), weight)

    return HeadOps(loss, token_losses, logits, chunk_tokens, softcap)


def positions_of(values: Tensor, at: Tensor | None) -> Tensor:
    """Return one position of each row, [B, 1, ...].

    Args:
        values: [B, T, width].
        at: [B], their numbers; None: all of them.
    """
    return values if at is None else values.gather(1, at.view(-1, 1, 1).expand(-1, 1, values.shape[2]))


@dataclass(frozen=True)
class _Formula:
    """What is the same for all chunks; see `chunked_cross_entropy`."""

    chunk_tokens: int
    vocab: VocabShard
    softcap: float | None
    penalty: ZLoss | None
    found: list[Tensor] | None


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, formula: _Formula
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = _chunk_losses(hidden, weight, targets, weights, formula, d_hidden, d_weight)
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
        return d_hidden, d_weight, None, None, None


def _chunk_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    formula: _Formula,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
) -> Tensor:
    """Return the summed loss; fill `d_hidden` and add to `d_weight` where they are given."""
    weight = weight.to(hidden.dtype)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], formula.chunk_tokens):
        rows = slice(start, start + formula.chunk_tokens)
        wanted = d_hidden is not None or d_weight is not None
        factors = None if weights is None else weights[rows]
        loss, d_logits = _one_chunk(hidden[rows], weight, targets[rows], factors, formula, with_gradient=wanted)
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
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, formula: _Formula, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of a chunk, and d loss / d (hidden @ weight.T) [n, V] in the dtype of `hidden`."""
    chunk = _shifted_logits(hidden, weight, targets, formula.vocab, formula.softcap)
    # Of a position that does not count the factor may be anything.
    factors = chunk.counts.float() if weights is None else torch.where(chunk.counts, weights, 0.0)
    exponentials = chunk.logits.exp_()
    # One reduction for both: each is a latency, not a bandwidth.
    sums, target_logit = formula.vocab.all_reduce_sum(torch.stack((exponentials.sum(-1), chunk.target_logit))).unbind()
    losses = torch.where(chunk.counts, sums.log() - target_logit, 0.0)
    if formula.found is not None:
        formula.found.append(losses.detach())
    loss = (losses if weights is None else losses * factors).sum()
    of_softmax = factors  # the derivative by the logarithm of the normaliser
    if formula.penalty is not None:
        normaliser, coefficient = sums.log() + chunk.largest, formula.penalty.coefficient
        penalty = (factors * coefficient * normaliser.square()).sum()
        formula.penalty.add(penalty)
        loss = loss + penalty
        of_softmax = factors * (1.0 + 2.0 * coefficient * normaliser)
    if not with_gradient:
        return loss, None
    probabilities = exponentials.mul_((of_softmax / sums).unsqueeze(-1))
    d_logits = probabilities.scatter_add_(-1, chunk.at, -(chunk.here * factors).unsqueeze(-1))
    if chunk.bounded is not None:
        d_logits = d_logits * (1.0 - chunk.bounded.square_())
    return loss, d_logits.to(hidden.dtype)


@dataclass(frozen=True)
class _ShiftedLogits:
    """The logits of a chunk of n tokens, fp32.

    Attributes:
        logits: [n, V] minus `largest`.
        largest: [n], over the whole vocabulary.
        bounded: [n, V], tanh of the logits before they were bounded; None where they are not.
        counts: [n], where there is a target.
        here: [n], where this rank has the target's row.
        at: [n, 1], the target's local index; 0 where it is not here.
        target_logit: [n], of the shifted logits; 0 where it is not here.
    """

    logits: Tensor
    largest: Tensor
    bounded: Tensor | None
    counts: Tensor
    here: Tensor
    at: Tensor
    target_logit: Tensor


def _shifted_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: VocabShard, softcap: float | None
) -> _ShiftedLogits:
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
    return _ShiftedLogits(logits, largest, bounded, counts, here, at, target_logit)


def _check_chunk(chunk_tokens: int) -> None:
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")


def _to_autocast(hidden: Tensor) -> Tensor:
    """`hidden` in the dtype of autocast's matrix products, so that the chunks are computed and kept in it."""
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden
