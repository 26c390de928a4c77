"""Texts that are written on virtual devices are those of one process, by few programs."""

from __future__ import annotations

import os

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from orchestrator.hardware.target_table import resolve
from tests.lab import texts
from tests.lab.ranks import run_ranks
from tests.lab.slow import cases
from tests.strategies.test_texts import MODELS, WORDS
from tests.xla.test_conformance import XLA

# Prompts of 1 to 48 tokens make programs for 32 and 64, beside the one for a further token.
PROGRAMS = 3
CASES = [("fsdp2_tensor2", "variety"), ("fsdp2_tensor2", "plain"), ("fsdp4", "gpt2"), ("1", "experts")]
CASES += [("context2_fsdp2", "plain"), ("fsdp2_tensor2", "latent")]


@pytest.mark.parametrize(("name", "model"), cases(CASES, quick=[("fsdp2_tensor2", "variety")]))
def test_texts_are_those_of_one_process(name, model):
    words = [word for word in (*WORDS, *MODELS[model]) if word != "hardware=cpu"]
    (found,) = run_ranks(1, write, [*words, *XLA[name]])
    (wanted,) = run_ranks(1, texts.alone, to_dict(compose(words).config))
    assert found.texts == wanted
    assert found.cached == ("context" not in name)
    assert found.compiled is not None
    assert found.compiled[0] <= PROGRAMS
    assert found.compiled[1] == 0


def write(world, words):
    config = compose(words).config
    os.environ.update(resolve(config.hardware).environment(config.hardware, 0, 1))
    return texts.write(world, to_dict(config), 2)
