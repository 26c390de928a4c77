"""How the next token of a text is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.errors import NonFiniteError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; in the order in which it is applied, which is that of transformers.

    Attributes:
        repetition_penalty: divides the positive logits of tokens that are there already, and multiplies the negative
            ones (Keskar et al., arXiv:1909.05858); 1: none.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest; None: among all.
        top_p: draw among the likeliest tokens that together have at least this probability (Holtzman et al.,
            arXiv:1904.09751).
        min_p: draw among tokens of at least this part of the likeliest one's probability (Nguyen et al.,
            arXiv:2407.01082).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Sequence[int] = ()) -> int:
    """Draw the next token on the host, so that a seed gives the same text on every device.

    Args:
        logits: [V].
        sampling: temperature, limits and penalty.
        generator: of the CPU.
        seen: the tokens that are there already, for the repetition penalty.

    Raises:
        NonFiniteError: logits are NaN or +inf, or all of them -inf: they are no distribution.
    """
    logits = logits.detach().float().cpu()
    _check_finite(logits)
    if sampling.repetition_penalty != 1.0 and seen:
        there = torch.tensor(sorted({token for token in seen if token < logits.numel()}))
        values, penalty = logits[there], sampling.repetition_penalty
        logits = logits.index_copy(0, there, torch.where(values > 0, values / penalty, values * penalty))
    if sampling.temperature <= 0.0:
        return int(logits.argmax())
    # The highest is taken off first: at a small temperature the quotients would overflow.
    logits = _narrowed((logits - logits.max()) / sampling.temperature, sampling)
    return int(torch.multinomial(torch.softmax(logits, -1), 1, generator=generator))


def choose_rows(
    logits: Tensor,
    samplings: Sequence[Sampling],
    generators: Sequence[torch.Generator],
    seen: Sequence[Sequence[int]],
) -> list[int]:
    """Draw the next token of several texts, each as `choose` does it.

    Args:
        logits: [rows, V], fp32 on the host.
        samplings: of each row.
        generators: of each row.
        seen: the tokens that are there already, of each row.

    Raises:
        NonFiniteError: as `choose`.
    """
    if all(sampling.temperature <= 0.0 and sampling.repetition_penalty == 1.0 for sampling in samplings):
        if len(samplings):
            _check_finite(logits)
        likeliest: list[int] = logits.argmax(-1).tolist() if len(samplings) else []
        return likeliest
    rows = zip(logits, samplings, generators, seen, strict=True)
    return [choose(*row) for row in rows]


def _check_finite(logits: Tensor) -> None:
    if not bool(logits.amax(-1).isfinite().all()):
        raise NonFiniteError(
            "the model gives logits that are not finite",
            got=f"{int(logits.isnan().sum())} NaN and {int(logits.isinf().sum())} infinite of {logits.numel()}",
            fix="its run has diverged, or its weights are damaged: take an earlier checkpoint (checkpoint verify "
            "deep=true names the tensors)",
        )


def _narrowed(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the logits [V] with those of tokens that may not be drawn at -inf."""
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        probabilities, order = torch.softmax(logits, -1).sort(descending=True)
        # One is kept as long as those before it have not enough.
        beyond = order[probabilities.cumsum(-1) - probabilities >= sampling.top_p]
        logits = logits.index_fill(0, beyond, -torch.inf)
    if sampling.min_p is not None and sampling.min_p > 0.0:
        probabilities = torch.softmax(logits, -1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), -torch.inf)
    return logits
