"""Text from a model on one device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from orchestrator.errors import NonFiniteError
from orchestrator.models.cache import KVCache
from orchestrator.models.decoder import Decoder


def choose(logits: Tensor, temperature: float, generator: torch.Generator, top_k: int | None = None) -> int:
    """Draw the next token on the host, so that a seed gives the same text on every device.

    Args:
        logits: [V].
        temperature: 0 takes the likeliest token.
        generator: of the CPU.
        top_k: draw among the k likeliest only; None: among all.

    Raises:
        NonFiniteError: logits are NaN or +inf, or all of them -inf: they are no distribution.
    """
    logits = logits.detach().float().cpu()
    if not math.isfinite(highest := float(logits.max())):
        raise NonFiniteError(
            "the model gives logits that are not finite",
            got=f"{int(logits.isnan().sum())} NaN and {int(logits.isinf().sum())} infinite of {logits.numel()}",
            fix="its run has diverged, or its weights are damaged: take an earlier checkpoint (checkpoint verify "
            "deep=true names the tensors)",
        )
    if temperature <= 0.0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    # The highest is taken off first: at a small temperature the quotients would overflow.
    probabilities = torch.softmax((logits - highest) / temperature, -1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def generate_tokens(
    model: Decoder,
    prompt: list[int],
    count: int,
    temperature: float,
    seed: int,
    eos_id: int | None,
    top_k: int | None = None,
) -> Iterator[int]:
    """Continue a prompt, one token at a time.

    The model sees at most `max_seq_len` tokens. Once these are full it goes on with the last half of them,
    so one long pass is paid per half window and not per token. A longer prompt loses its beginning.

    Args:
        model: on one device; its training mode is left as it is.
        prompt: token ids, at least one.
        count: tokens to draw at most.
        temperature: see `choose`.
        seed: of the draws.
        eos_id: the token that ends the text and is not yielded; None: go on to `count`.
        top_k: see `choose`.

    Raises:
        ValueError: an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt must have at least one token")
    window = model.config.max_seq_len
    generator = torch.Generator().manual_seed(seed)
    context = list(prompt[-window:])
    cache = _make_cache(model, min(window, len(context) + count))
    unseen = context
    for _ in range(count):
        token = choose(_next_logits(model, unseen, cache), temperature, generator, top_k)
        if token == eos_id:
            return
        yield token
        context.append(token)
        unseen = [token]
        if cache.length == window:
            unseen = context = context[-max(1, window // 2) :]
            cache.clear()


def _make_cache(model: Decoder, capacity: int) -> KVCache:
    weight = model.embed.weight
    return KVCache(
        layers=model.config.layers,
        batch=1,
        kv_heads=model.config.kv_heads,
        capacity=capacity,
        head_dim=model.head_dim,
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
