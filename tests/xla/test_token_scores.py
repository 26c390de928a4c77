"""Losses of single targets, and weighted losses, on virtual devices: what full logits give in one process."""

from __future__ import annotations

import os

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from orchestrator.hardware.target_table import resolve
from tests.lab import scores
from tests.lab.ranks import run_ranks
from tests.lab.slow import cases
from tests.strategies.test_token_scores import MODELS, RELATIVE, WORDS
from tests.strategies.test_token_scores import _expected as expected
from tests.xla.test_conformance import XLA


@pytest.mark.parametrize(
    ("name", "model"),
    cases(
        [("fsdp2_tensor2", "capped"), ("context2_fsdp2", "plain"), ("fsdp4", "plain"), ("1", "plain")],
        quick=[("fsdp2_tensor2", "capped")],
    ),
)
def test_scores_and_weighted_gradients_are_those_of_full_logits(name, model):
    words = [word for word in (*WORDS, *MODELS[model]) if word != "hardware=cpu"]
    parts = run_ranks(1, _score, [*words, *XLA[name]])
    (wanted,) = run_ranks(1, expected, to_dict(compose(words).config))
    scores.assert_agrees(parts, wanted, RELATIVE)


def _score(world, words):
    config = compose(words).config
    os.environ.update(resolve(config.hardware).environment(config.hardware, 0, 1))
    return scores.score(world, to_dict(config))
