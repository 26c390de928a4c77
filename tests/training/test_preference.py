"""DPO: loss, figures and gradients are those of a loop written by hand, on every layout."""

from __future__ import annotations

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from tests.lab import preferences
from tests.lab.ranks import run_ranks
from tests.lab.runs import SMALL
from tests.lab.slow import cases
from tests.strategies.test_token_scores import size_of

WORDS = [*SMALL, f"train.seq_len={preferences.LENGTH}", "train.loss_chunk_tokens=24", "train.micro_batch_size=1"]
WORDS += [f"train.global_batch_tokens={preferences.ROWS * preferences.LENGTH}", "model.init_std=0.1"]
WORDS += ["train.preference.loss=sigmoid"]
LAYOUTS = {
    "1": [],
    "fsdp2": ["layout.fsdp=2"],
    "tensor2": ["layout.tensor=2"],
    "fsdp2_tensor2": ["layout.fsdp=2", "layout.tensor=2"],
    "context2": ["layout.context=2"],
    "ring2_tensor2": ["layout.context=2", "layout.context_kind=ring", "layout.tensor=2"],
    "pipeline2": ["layout.pipeline=2"],
    "pipeline2_fsdp2": ["layout.pipeline=2", "layout.fsdp=2"],
}
LOSSES = {
    "sigmoid": [],
    "smoothed": ["train.preference.label_smoothing=0.2", "train.preference.beta=0.5"],
    "ipo": ["train.preference.loss=ipo"],
    "hinge": ["train.preference.loss=hinge", "train.preference.beta=0.05"],
}
QUICK = [("1", loss) for loss in LOSSES]
QUICK += [("fsdp2_tensor2", "sigmoid"), ("context2", "ipo"), ("pipeline2_fsdp2", "sigmoid")]


@pytest.mark.parametrize(("layout", "loss"), cases([(a, b) for a in LAYOUTS for b in LOSSES], quick=QUICK))
def test_loss_and_gradients_are_those_of_a_loop_by_hand(layout, loss):
    words = [*WORDS, *LOSSES[loss]]
    parts = run_ranks(size_of(LAYOUTS[layout]), preferences.learn, to_dict(compose([*words, *LAYOUTS[layout]]).config))
    (wanted,) = run_ranks(1, _by_hand, to_dict(compose(words).config))
    preferences.assert_agrees(parts, wanted, 1e-6 if layout == "1" else 1e-5)
    assert 0 < wanted.figures["reward_accuracy"] < 1


REFERENCES = {
    "adapters": ["train.init_from=BASE", "train.lora.rank=4", "train.lora.target_modules=[q,v,down]"],
    "adapters off": ["train.init_from=BASE", "train.lora.rank=4", "train.preference.reference=live"],
    "second model": ["train.preference.reference=live"],
}
FEW = [("fsdp2_tensor2", "adapters off"), ("fsdp2", "second model")]


@pytest.mark.parametrize(("layout", "kind"), cases([(a, b) for a in LAYOUTS for b in REFERENCES], quick=FEW))
def test_with_adapters_and_a_live_reference_too(layout, kind):
    words = [*WORDS, *REFERENCES[kind]]
    parts = run_ranks(size_of(LAYOUTS[layout]), preferences.learn, to_dict(compose([*words, *LAYOUTS[layout]]).config))
    (wanted,) = run_ranks(1, _by_hand, to_dict(compose(words).config))
    # The gradient of an adapter has one more product of fp32 behind it.
    preferences.assert_agrees(parts, wanted, 1e-6 if (layout, kind) == ("1", "second model") else 1e-5)
    assert ("lora_a" in parts[0].gradients[0][0]) == ("adapters" in kind)


@pytest.mark.parametrize("layout", cases(["1", "fsdp2_tensor2", "pipeline2"], quick=["fsdp2_tensor2"]))
def test_both_passes_draw_the_same_dropout(layout):
    words = [*WORDS, *LAYOUTS[layout], "model.dropout=0.2"]
    parts = run_ranks(size_of(LAYOUTS[layout]), preferences.learn, to_dict(compose(words).config))
    (plain,) = run_ranks(1, preferences.learn, to_dict(compose(WORDS).config))
    for part in parts:
        assert part.weighted[0] == pytest.approx(part.weighted[1], rel=1e-5)
        assert part.weighted[0] != pytest.approx(plain.weighted[0], rel=1e-3)


def _by_hand(world, data):
    from orchestrator.config.convert import from_dict
    from orchestrator.config.schema import RunConfig

    return preferences.by_hand(from_dict(RunConfig, data))
