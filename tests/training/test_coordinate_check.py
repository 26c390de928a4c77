"""Activations keep their size over widths and depths where a rule says so, and grow where none does."""

from __future__ import annotations

import json

import pytest
import torch

from orchestrator.config.compose import compose
from orchestrator.errors import ConfigError, ConfigErrors
from orchestrator.training.coordinate_check import FLAT, KINDS, at_width, curve, run_check, sized, spreads
from tests.lab.cli import run as run_cli
from tests.lab.runs import write_corpus
from tests.lab.slow import cases, slow

WORDS = (
    *("model=tiny", "model.dim=64", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.mlp_dim=160"),
    *("data.tokenizer.kind=bytes", "train.seq_len=32", "train.global_batch_tokens=256", "hardware=cpu"),
)
MODELS = {
    "adamw": (),
    "untied, biases": ("model.tied_embeddings=false", "model.attention_bias=true", "model.mlp_bias=true"),
    "muon": ("optim=muon", "optim.lr=0.02"),
    "muon as adamw": ("optim=muon", "optim.lr=3e-3", "optim.adjust_lr=match_rms_adamw"),
    "experts": ("model.moe.experts=4", "model.moe.mlp_dim=64", "model.moe.shared_mlp_dim=64"),
    "qk norm": ("model.qk_norm=true", "model.qk_norm_over=width"),
    "bf16 moments": ("optim.state_dtype=bf16",),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("check")
    places = (f"data.cache_dir={tmp / 'cache'}", f"data.sources=[{{path:'{write_corpus(tmp / 'corpus')}',weight:1}}]")
    return lambda *words: compose([*WORDS, *places, *words]).config


def _check(config, rules, axis, sizes, steps=5):
    return run_check(config, rules, axis, sizes, steps, 1, torch.device("cpu"), lambda scales: None)


@pytest.mark.parametrize("name", cases(MODELS, quick=["adamw"]))
def test_they_are_flat_in_width_under_mup_and_not_under_the_standard(config, name):
    measured = _check(config(*MODELS[name]), ["none", "mup"], "width", [64, 256])
    found = spreads(measured, 5)
    assert max(found["mup"].values()) <= FLAT, found
    assert max(found["none"].values()) > FLAT, found
    # Both train, and the base is the same model under either rule.
    assert all(one.loss < 4.5 for one in measured if one.step == 5 and one.rule == "mup")
    for kind in KINDS:
        assert curve(measured, "none", kind, 5)[64] == curve(measured, "mup", kind, 5)[64]


def test_they_are_flat_in_depth_under_completep_and_not_under_the_standard(config):
    measured = _check(
        config("model.dim=32", "model.heads=2", "optim.lr=6e-3"), ["none", "completep"], "layers", [2, 16]
    )
    found = spreads(measured, 5)
    assert max(found["completep"].values()) <= FLAT, found
    assert found["none"]["stream"] > FLAT, found


def test_widths_keep_proportions_and_heads(config):
    model = at_width(config("model.moe.experts=4", "model.moe.mlp_dim=48").model, 256)
    assert (model.dim, model.heads, model.kv_heads, model.mlp_dim, model.head_width) == (256, 16, 8, 640, 16)
    assert model.moe.mlp_dim == 192
    with pytest.raises(ConfigError, match=r"no whole number of model\.heads"):
        at_width(config().model, 72)
    with pytest.raises(ConfigError, match="AdamW and Muon alone"):
        sized(config("optim=sgd"), "mup", 128)
    with pytest.raises(ConfigErrors, match="latent"):
        sized(config("model.mla.kv_lora_rank=16", "model.kv_heads=4"), "mup", 128)


@slow
def test_the_verb_writes_table_figure_and_numbers(tmp_path, config):
    words = [
        *WORDS,
        f"data.cache_dir={tmp_path / 'cache'}",
        f"data.sources=[{{path:'{write_corpus(tmp_path / 'c')}',weight:1}}]",
    ]
    result = run_cli("coordinate-check", "widths=32,128", "steps=3", f"output={tmp_path / 'out'}", *words)
    assert result.returncode == 0, result.stderr
    assert "mup: flat" in result.stdout
    data = json.loads((tmp_path / "out" / "check.json").read_text())
    assert data["flat"] == {"none": False, "mup": True}
    assert {one["size"] for one in data["measured"]} == {32, 128}
    assert (tmp_path / "out" / "check.svg").read_text().count('class="line') == 15
    wrong = run_cli("coordinate-check", "widths=64", "steps=0")
    assert wrong.returncode == 2
    assert "two sizes or more" in wrong.stderr
    assert "'steps' is out of range" in wrong.stderr
