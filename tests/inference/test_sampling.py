"""Generation with the cache gives what the full forward pass gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from orchestrator.config.schema import MLAConfig, MoEConfig
from orchestrator.errors import NonFiniteError
from orchestrator.inference.sampling import Sampling, choose, generate_tokens
from orchestrator.models.decoder import Decoder
from orchestrator.models.kv_cache import KVCache

Make = Callable[..., Decoder]
GREEDY = Sampling()
MLA = MLAConfig(kv_lora_rank=16, q_lora_rank=24, nope_head_dim=12, rope_head_dim=4, v_head_dim=8)
KINDS: dict[str, dict] = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "learned": {"positions": "learned", "norm": "layer", "activation": "gelu"},
    "window": {"sliding_window": 5},
    "latent": {"mla": MLA, "kv_heads": 4, "rope_layout": "interleaved"},
    "experts": {"moe": MoEConfig(experts=4, top_k=2)},
}


def greedy_without_cache(model: Decoder, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_full_forward(make_model: Make, kind: str) -> None:
    model = make_model(**KINDS[kind])
    prompt = [3, 14, 15, 92, 65, 35, 89]
    with torch.no_grad():
        expected = greedy_without_cache(model, prompt, 20)
    assert list(generate_tokens(model, prompt, 20, GREEDY, 0, ())) == expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_cache_filled_piece_by_piece_gives_the_same_logits(make_model: Make, tokens: torch.Tensor, kind: str) -> None:
    model = make_model(**KINDS[kind])
    cache = KVCache(batch=2, kept=[model.config.cached(layer) for layer in range(2)], capacity=24)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split([9, 1, 1, 6, 7], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="cache holds 24"):
            model(tokens[:, :1], cache=cache)
        with pytest.raises(ValueError, match="documents"):
            model(tokens, cache=cache, documents=tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_one_clear_error(value: float, temperature: float) -> None:
    logits = torch.tensor([1.0, value, 2.0])
    with pytest.raises(NonFiniteError, match="logits that are not finite"):
        choose(logits, Sampling(temperature), torch.Generator())
    with pytest.raises(NonFiniteError):
        choose(torch.full((3,), float("-inf")), Sampling(temperature), torch.Generator())


def test_logits_may_be_ruled_out_and_a_temperature_small() -> None:
    logits = torch.tensor([1.0, float("-inf"), 2.0])
    assert choose(logits, Sampling(1e-30), torch.Generator().manual_seed(0)) == 2


def test_a_seed_gives_one_text(make_model: Make) -> None:
    model = make_model()
    first, again, other = (list(generate_tokens(model, [1], 30, Sampling(1.0), seed, ())) for seed in (0, 0, 1))
    assert first == again != other


def test_text_longer_than_the_window_goes_on(make_model: Make) -> None:
    model = make_model(max_seq_len=16, positions="learned")
    tokens = list(generate_tokens(model, [1, 2, 3], 60, GREEDY, 0, ()))
    assert len(tokens) == 60
    assert tokens[:13] == greedy_without_cache(model, [1, 2, 3], 13)
    assert len(list(generate_tokens(model, list(range(40)), 20, GREEDY, 0, ()))) == 20


def test_end_of_text_stops_and_training_mode_is_kept(make_model: Make) -> None:
    model = make_model(dropout=0.1).train()
    tokens = list(generate_tokens(model, [1, 2, 3], 20, Sampling(1.0), 0, ()))
    cut = list(generate_tokens(model, [1, 2, 3], 20, Sampling(1.0), 0, {tokens[4], 10**6}))
    assert cut == tokens[: tokens.index(tokens[4])]
    assert model.training
    with pytest.raises(ValueError, match="prompt"):
        next(generate_tokens(model, [], 1, GREEDY, 0, ()))


def test_choose() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    assert choose(logits, GREEDY, generator) == 1
    assert {choose(logits, Sampling(1.0, top_k=2), generator) for _ in range(200)} == {1, 2}
    assert {choose(logits, Sampling(5.0), generator) for _ in range(200)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, top_k=5),
        Sampling(1.3, top_p=0.6),
        Sampling(1.0, top_p=1e-9),
        Sampling(0.9, min_p=0.2),
        Sampling(1.0, repetition_penalty=1.7),
        Sampling(0.0, repetition_penalty=50.0),
        Sampling(1.5, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    ],
    ids=str,
)
def test_tokens_are_narrowed_as_in_transformers(sampling: Sampling) -> None:
    """Which tokens can be drawn at all, and how likely each is."""
    from transformers.generation import logits_process as theirs

    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 3
    seen = [3, 4, 4, 17]
    processors = [theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    if sampling.temperature:
        processors.append(theirs.TemperatureLogitsWarper(sampling.temperature))
        processors += [theirs.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        processors += [theirs.TopPLogitsWarper(sampling.top_p)] if sampling.top_p else []
        processors += [theirs.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    scores = logits[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([seen]), scores)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(
        [choose(logits, sampling, generator, seen) for _ in range(3000 if sampling.temperature else 1)]
    )
    if not sampling.temperature:
        assert drawn.tolist() == [int(scores.argmax())]
        return
    expected = torch.softmax(scores[0], -1)
    shares = torch.bincount(drawn, minlength=50) / len(drawn)
    assert not shares[expected == 0].any()
    torch.testing.assert_close(shares, expected, atol=0.04, rtol=0)
