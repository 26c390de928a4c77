"""A run with `optim.transfer` is the same on every layout, resumes to the bit, and exports as what it computes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.interop.exporting import export_hf
from orchestrator.runs.stored_model import model_of, stored_config
from tests.lab.runs import assert_trained_alike, checkpoint, losses, read_rows, small_config, train
from tests.lab.slow import cases
from tests.lab.tensors import read_all

# Four times as wide as the base, twice as deep, and with wider heads.
BASE = ("optim.transfer=completep", "optim.base.dim=16", "optim.base.layers=1", "optim.base.head_dim=8")
MUON = ("optim=muon", "optim.ns_dtype=fp32", "optim.adjust_lr=match_rms_adamw", "optim.lr=3e-3")
LAYOUTS = {
    "fsdp2_tensor2": (4, "layout.fsdp=2", "layout.tensor=2"),
    "muon_fsdp2_tensor2": (4, "layout.fsdp=2", "layout.tensor=2", *MUON),
    "int8_fsdp2": (2, "layout.fsdp=2", "optim.state_dtype=int8"),
    "pipeline2": (2, "layout.pipeline=2", "train.micro_batch_size=2"),
    "ring2": (2, "layout.context=2", "layout.context_kind=ring"),
    "expert2": (2, "layout.expert=2", "model.moe.experts=4", "model.moe.mlp_dim=48"),
}


@pytest.mark.parametrize("name", cases(LAYOUTS, quick=["fsdp2_tensor2"]))
def test_losses_norms_and_evaluation_are_those_of_one_process(runs, name):
    size, *words = LAYOUTS[name]
    ours = read_rows(runs(*BASE, *words, size=size))
    theirs = read_rows(runs(*BASE, *(word for word in words if not word.startswith(("layout.", "train.")))))
    if "int8" in name:  # two layouts differ by what a sum in another order tips
        np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-3)
    else:
        assert_trained_alike(ours, theirs, 1e-5)
    assert losses(ours)[-1] < losses(ours)[0]


def test_what_it_changes_is_in_the_checkpoint_and_a_resumed_run_ends_bitwise_the_same(runs, tmp_path):
    run_dir = runs(*BASE)
    config = stored_config(Checkpoint(checkpoint(run_dir)))
    assert (config.model.logit_scale, config.model.residual_scale) == (1 / 4, 1 / 2)
    assert config.model.attention_scale == 8**-0.5 / 2
    train(small_config(runs.tmp, *BASE), 1, tmp_path / "again", checkpoint(run_dir, 10))
    before, after = read_all(checkpoint(run_dir)), read_all(checkpoint(tmp_path / "again"))
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_its_model_is_exported_with_the_factors(runs, tmp_path):
    source = Checkpoint(checkpoint(runs(*BASE)))
    export_hf(source, str(tmp_path / "hf"), "stored", 1 << 30, lambda size: None)
    keys = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert keys["model_type"] == "granite"
    assert (keys["logits_scaling"], keys["residual_multiplier"]) == (4.0, 0.5)
    assert keys["attention_multiplier"] == pytest.approx(model_of(source).attention_scale)


def test_initial_weights_are_the_bases_spread_at_this_size(runs):
    """Matrices of the blocks go by the root of the width; what writes to the stream starts as in the base."""
    words = ("train.max_steps=1", "optim.lr=1e-12", "checkpoint.every_steps=1", "optim.schedule.warmup_steps=0")
    weights = read_all(checkpoint(runs(*BASE, *words), 1))
    std = {name.removeprefix("model."): float(one.std()) for name, one in weights.items() if one.dim() == 2}
    assert std["embed.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["layers.0.attn.q.weight"] == pytest.approx(0.02 / 2, rel=0.05)
    assert std["layers.1.mlp.down.weight"] == pytest.approx(0.02 / 2 / math.sqrt(2 * 1), rel=0.05)
