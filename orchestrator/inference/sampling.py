"""Text from a model on one device."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.errors import NonFiniteError
from orchestrator.models.decoder import Decoder
from orchestrator.models.kv_cache import KVCache


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
    if not math.isfinite(float(logits.max())):
        raise NonFiniteError(
            "the model gives logits that are not finite",
            got=f"{int(logits.isnan().sum())} NaN and {int(logits.isinf().sum())} infinite of {logits.numel()}",
            fix="its run has diverged, or its weights are damaged: take an earlier checkpoint (checkpoint verify "
            "deep=true names the tensors)",
        )
    if sampling.repetition_penalty != 1.0 and seen:
        there = torch.tensor(sorted({token for token in seen if token < logits.numel()}))
        values, penalty = logits[there], sampling.repetition_penalty
        logits = logits.index_copy(0, there, torch.where(values > 0, values / penalty, values * penalty))
    if sampling.temperature <= 0.0:
        return int(logits.argmax())
    # The highest is taken off first: at a small temperature the quotients would overflow.
    logits = _narrowed((logits - logits.max()) / sampling.temperature, sampling)
    return int(torch.multinomial(torch.softmax(logits, -1), 1, generator=generator))


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


def generate_tokens(
    model: Decoder,
    prompt: list[int],
    count: int,
    sampling: Sampling,
    seed: int,
    stop_ids: Collection[int],
) -> Iterator[int]:
    """Continue a prompt, one token at a time.

    The model sees at most `max_seq_len` tokens. Once these are full it goes on with the last half of them,
    so one long pass is paid per half window and not per token. A longer prompt loses its beginning.

    Args:
        model: on one device; its training mode is left as it is.
        prompt: token ids, at least one.
        count: tokens to draw at most.
        sampling: how each token is drawn.
        seed: of the draws.
        stop_ids: the tokens that end the text and are not yielded.

    Raises:
        ValueError: an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt must have at least one token")
    window = model.config.max_seq_len
    generator = torch.Generator().manual_seed(seed)
    context, seen = list(prompt[-window:]), list(prompt)
    cache = _make_cache(model, min(window, len(context) + count))
    unseen = context
    for _ in range(count):
        token = choose(_next_logits(model, unseen, cache), sampling, generator, seen)
        if token in stop_ids:
            return
        yield token
        seen.append(token)
        context.append(token)
        unseen = [token]
        if cache.length == window:
            unseen = context = context[-max(1, window // 2) :]
            cache.clear()


def _make_cache(model: Decoder, capacity: int) -> KVCache:
    weight = model.embed.weight
    return KVCache(
        batch=1,
        kept=[model.config.cached(layer) for layer in range(model.config.layers)],
        capacity=capacity,
        dtype=weight.dtype,
        device=weight.device,
    )


@torch.no_grad()
def _next_logits(model: Decoder, unseen: list[int], cache: KVCache) -> Tensor:
    """Logits [V] after `unseen`, which joins the cache; eval mode lasts no longer than this call."""
    training = model.training
    model.eval()
    try:
        tokens = torch.tensor([unseen], device=model.embed.weight.device)
        return model(tokens, cache=cache, last_only=True)[0, -1]
    finally:
        model.train(training)
