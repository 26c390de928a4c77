"""How a token is drawn."""

from __future__ import annotations

import pytest
import torch

from orchestrator.errors import NonFiniteError
from orchestrator.inference.sampling import Sampling, choose, choose_rows

GREEDY = Sampling()


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


def test_rows_are_drawn_each_as_alone() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)) * 2
    mixed = [Sampling(1.0), GREEDY, Sampling(0.0, repetition_penalty=9.0), Sampling(1.0, top_k=3)]
    for samplings in (mixed, [GREEDY] * 4):
        together, alone = ([torch.Generator().manual_seed(row) for row in range(4)] for _ in range(2))
        seen = [[int(row.argmax())] for row in logits]
        expected = [choose(*row) for row in zip(logits, samplings, alone, seen, strict=True)]
        assert choose_rows(logits, samplings, together, seen) == expected
    with pytest.raises(NonFiniteError):
        choose_rows(torch.full((2, 3), float("nan")), [GREEDY] * 2, [], [[], []])
