"""How tokens come to their experts and back, on one device; and the interfaces that strategies implement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def unchanged(t: Tensor) -> Tensor:
    """Return `t`: what stands where a strategy may put something."""
    return t


@dataclass(frozen=True)
class Assignment:
    """Which experts each token goes to.

    Attributes:
        weights: [B, T, k] fp32, 0 where a choice was dropped.
        chosen: [B, T, k] int64, numbers of experts, different ones for a token.
        experts: how many there are.
        kept: [B, T, k] bool; None: nothing is dropped.
        place: [B, T, k], how many of its sequence's choices the expert takes before this one; None without capacity.
        capacity: tokens of a sequence that an expert takes; None: all.
    """

    weights: Tensor
    chosen: Tensor
    experts: int
    kept: Tensor | None = None
    place: Tensor | None = None
    capacity: int | None = None


class Dispatch(Protocol):
    """Brings tokens to experts and their answers back."""

    def __call__(self, experts: Any, x: Tensor, assignment: Assignment) -> Tensor:
        """Map `x` [B, T, D] to the weighted sum of what each token's experts say, [B, T, D].

        Args:
            experts: the `models.moe.Experts`.
            x: hidden states.
            assignment: of its tokens.
        """


class WholeSequence:
    """A sequence that is on one rank.

    Attributes:
        parts: ranks that share a sequence.
    """

    parts = 1

    def sum(self, counts: Tensor) -> Tensor:
        """Add up over the ranks of a sequence; no gradient.

        Args:
            counts: of this rank's tokens.
        """
        return counts

    def before(self, counts: Tensor) -> Tensor:
        """Return, for each token, the sum over the earlier tokens of its sequence.

        Args:
            counts: [B, k, T, E], of this rank's tokens.
        """
        return counts.cumsum(2) - counts


class SortedDispatch:
    """Sorts choices by expert, and lets each expert answer its rows: nothing is padded or dropped."""

    def __call__(self, experts: Any, x: Tensor, assignment: Assignment) -> Tensor:
        """Map `x` [B, T, D] to [B, T, D]; `experts` and `assignment` as in `Dispatch`."""
        rows = SortedRows(x, assignment)
        answers = self.compute(experts, rows.rows, rows.counts)
        return rows.combine(answers)

    def compute(self, experts: Any, rows: Tensor, counts: Tensor) -> Tensor:
        """Let the experts answer.

        Args:
            experts: the `models.moe.Experts`.
            rows: [N, D], sorted by expert.
            counts: [E] int64, rows of each expert.
        """
        return grouped_feed_forward(experts, rows, counts)


class SlotDispatch:
    """Puts tokens into slots of their experts: every shape is known beforehand, whatever the router says.

    An expert has as many slots for each sequence as its capacity, or as the sequence has tokens, if nothing may be
    dropped; empty slots are computed, too.

    Args:
        to_experts: what is put around slots [B, E, C, D] on their way to the experts.
        to_tokens: and around the answers on their way back.
    """

    def __init__(
        self, to_experts: Callable[[Tensor], Tensor] = unchanged, to_tokens: Callable[[Tensor], Tensor] = unchanged
    ):
        self._to_experts, self._to_tokens = to_experts, to_tokens

    def __call__(self, experts: Any, x: Tensor, assignment: Assignment) -> Tensor:
        """Map `x` [B, T, D] to [B, T, D]; `experts` and `assignment` as in `Dispatch`."""
        slots, count = self._slots(assignment)
        at = slots.flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        rows = x.repeat_interleave(slots.shape[-1], 1)
        # One slot more than there are, for what is dropped.
        filled = x.new_zeros(x.shape[0], count + 1, x.shape[-1]).scatter(1, at, rows)[:, :count]
        shaped = self._to_experts(filled.unflatten(1, (assignment.experts, -1)))
        answers = self._to_tokens(self._compute(experts, shaped)).flatten(1, 2)
        padded = F.pad(answers, (0, 0, 0, 1))
        given = padded.gather(1, at).unflatten(1, slots.shape[1:])
        return (given * assignment.weights.unsqueeze(-1).to(given.dtype)).sum(2)

    @staticmethod
    def _slots(assignment: Assignment) -> tuple[Tensor, int]:
        """Return the slot of each choice among a sequence's, [B, T, k], and their number."""
        chosen, place = assignment.chosen, assignment.place
        capacity = assignment.capacity or chosen.shape[1]
        count = assignment.experts * capacity
        if place is None or assignment.kept is None:
            here = F.one_hot(chosen, assignment.experts).sum(2)
            place = (here.cumsum(1) - here).gather(-1, chosen)
            return chosen * capacity + place, count
        return torch.where(assignment.kept, chosen * capacity + place, count), count

    @staticmethod
    def _compute(experts: Any, slots: Tensor) -> Tensor:
        def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            result = torch.einsum("beci,eoi->beco", rows, weight)
            return result if bias is None else result + bias.unsqueeze(1).to(result.dtype)

        gate = product(slots, experts.gate, experts.gate_bias)
        up = product(slots, experts.up, experts.up_bias)
        return product(experts.activate(gate, up), experts.down, experts.output_bias)


class SortedRows:
    """Tokens in the order of the experts that they go to.

    Args:
        x: [B, T, D].
        assignment: of its tokens.

    Attributes:
        rows: [N, D], a row for each choice that was kept.
        counts: [E] int64, rows of each expert.
    """

    def __init__(self, x: Tensor, assignment: Assignment):
        flat = assignment.chosen.flatten()
        weights = assignment.weights.flatten()
        self._shape, self._token = x.shape, torch.arange(flat.numel(), device=x.device) // assignment.chosen.shape[-1]
        if assignment.kept is not None:
            kept = assignment.kept.flatten().nonzero().squeeze(-1)
            flat, weights, self._token = flat[kept], weights[kept], self._token[kept]
        order = flat.argsort(stable=True)
        self._weights, self._token = weights[order], self._token[order]
        self.counts = torch.bincount(flat, minlength=assignment.experts)
        self.rows = x.flatten(0, 1).index_select(0, self._token)

    def combine(self, answers: Tensor) -> Tensor:
        """Return the weighted sum of each token's answers, [B, T, D].

        Args:
            answers: [N, D], in the order of `rows`.
        """
        weighted = answers * self._weights.unsqueeze(-1).to(answers.dtype)
        zeros = answers.new_zeros(self._shape[0] * self._shape[1], self._shape[2])
        return zeros.index_add(0, self._token, weighted).view(self._shape)


def grouped_feed_forward(experts: Any, rows: Tensor, counts: Tensor) -> Tensor:
    """Let each expert answer its rows.

    Args:
        experts: the `models.moe.Experts`.
        rows: [N, D], sorted by expert.
        counts: [E] int64, rows of each of the experts whose matrices are here.

    Returns:
        [N, D], or a rank's summand of it where the inner width is divided.
    """
    gate = experts.product(rows, experts.gate, counts, experts.gate_bias)
    up = experts.product(rows, experts.up, counts, experts.up_bias)
    return experts.product(experts.activate(gate, up), experts.down, counts, experts.output_bias)


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply each expert's rows by its matrix.

    Args:
        rows: [N, in], sorted by expert.
        weight: [E, out, in].
        counts: [E] int64, rows of each.
        bias: [E, out], or None.

    Returns:
        [N, out] in the dtype of the product, autocast's where that is on.
    """
    if rows.is_cuda and weight.dtype == torch.bfloat16 == rows.dtype:
        # CUDA's grouped product, for bf16 alone; it reads no count on the host. Never run on a chip yet.
        result = torch._grouped_mm(rows, weight.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))
        return result if bias is None else result + bias.repeat_interleave(counts, 0)
    parts: Sequence[Tensor] = rows.split(counts.tolist())
    biases: Sequence[Tensor | None] = [None] * len(parts) if bias is None else bias.unbind()
    # Also of experts without rows: their gradient is zero then, and not missing on one rank.
    return torch.cat([F.linear(part, one, add) for part, one, add in zip(parts, weight.unbind(), biases, strict=True)])
