"""The tiny twins of published mixtures of experts, with all that their families have, on every axis that they have."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lab.runs import assert_trained_alike, losses, read_rows
from tests.lab.slow import cases

RELATIVE = 1e-5
TWINS = {
    "mixtral": [],
    "qwen3_moe": [],
    "olmoe": [],
    "deepseek": ["model.kv_heads=4"],
    "gpt_oss": ["model.rope_scaling.original_max_seq_len=16"],
}
LAYOUTS = {
    "expert2_tensor2": ["layout.expert=2", "layout.tensor=2", "layout.fsdp=1"],
    "expert2_fsdp2": ["layout.expert=2", "layout.fsdp=2"],
    "expert2_context2": ["layout.expert=2", "layout.context=2", "layout.fsdp=1"],
    "expert4": ["layout.expert=4", "layout.fsdp=1"],
    "pipeline2_expert2": ["layout.pipeline=2", "layout.expert=2", "layout.fsdp=1", "train.micro_batch_size=1"],
}
ALL = [(twin, layout) for twin in TWINS for layout in LAYOUTS]


@pytest.mark.parametrize(("twin", "layout"), cases(ALL, quick=[("deepseek", "expert2_tensor2")]))
def test_losses_are_those_of_one_process(runs, twin, layout):
    words = [f"model=tiny_{twin}", "model.vocab_size=auto", *TWINS[twin]]
    ours = read_rows(runs(*words, *LAYOUTS[layout], size=4))
    theirs = read_rows(runs(*words))
    assert_trained_alike(ours, theirs, RELATIVE)
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=RELATIVE)
