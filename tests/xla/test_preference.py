"""DPO on virtual devices: loss, figures and gradients of a loop written by hand."""

from __future__ import annotations

import os

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from orchestrator.hardware.target_table import resolve
from tests.lab import preferences
from tests.lab.ranks import run_ranks
from tests.lab.slow import cases
from tests.training.test_preference import REFERENCES, WORDS
from tests.training.test_preference import _by_hand as by_hand
from tests.xla.test_conformance import XLA

KINDS = {"plain": [], "dropout": ["model.dropout=0.2"], **REFERENCES}
LAYOUTS = ["fsdp2_tensor2", "context2_fsdp2"]
QUICK = [("fsdp2_tensor2", "plain"), ("fsdp2_tensor2", "dropout")]


@pytest.mark.parametrize(("name", "kind"), cases([(a, b) for a in LAYOUTS for b in KINDS], quick=QUICK))
def test_loss_and_gradients_are_those_of_a_loop_by_hand(name, kind):
    words = [word for word in (*WORDS, *KINDS[kind]) if word != "hardware=cpu"]
    parts = run_ranks(1, _learn, [*words, *XLA[name]])
    if kind == "dropout":
        assert parts[0].weighted[0] == pytest.approx(parts[0].weighted[1], rel=1e-5), "the passes drew other masks"
        return
    (wanted,) = run_ranks(1, by_hand, to_dict(compose(words).config))
    preferences.assert_agrees(parts, wanted, 1e-5)


def _learn(world, words):
    config = compose(words).config
    os.environ.update(resolve(config.hardware).environment(config.hardware, 0, 1))
    return preferences.learn(world, to_dict(config))
