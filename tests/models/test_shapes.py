"""Names and shapes from the description alone are those of the model that is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from orchestrator.config.convert import from_dict
from orchestrator.config.schema import MLAConfig, ModelConfig, MoEConfig
from orchestrator.models.decoder import Decoder
from orchestrator.models.shapes import parameter_shapes
from orchestrator.planner.estimate.flops import parameter_count

PRESETS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
FEATURES = (
    {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    {"norm": "layer", "activation": "gelu", "positions": "learned"},
    {"qk_norm": True, "head_dim": 48, "kv_heads": 2},
    {"tied_embeddings": True},
    {"mla": MLAConfig(16, 24, 12, 4, 8), "attention_bias": True, "output_bias": True, "kv_heads": 4},
    {"mla": MLAConfig(16), "kv_heads": 4},
    {"norm": "rms_offset", "norm_placement": "both", "activation": "geglu", "qk_norm": True},
    {"norm_placement": "post", "qk_norm": True, "qk_norm_over": "width", "kv_heads": 2},
    {"norm": "layer_no_bias", "residual": "parallel_one_norm", "activation": "gelu_erf"},
    {"norm": "rms_plain", "qk_norm": True, "activation": "relu2"},
    {"attention_sinks": True, "windows": (4, None)},
    {"layer_heads": (4, 8, 2), "layer_kv_heads": (4, 2, 1), "head_dim": 16},
    {"moe": MoEConfig(experts=4, dense_layers=1, router_bias=True, expert_bias=True, balance_bias=True)},
    {"moe": MoEConfig(experts=4, mlp_dim=24, shared_mlp_dim=20, shared_gate=True), "mlp_bias": True},
)


def _check(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Decoder(config)
    assert parameter_count(config).total == sum(parameter.numel() for parameter in model.parameters())
    assert dict(parameter_shapes(config)) == {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_of_every_preset(path):
    data = yaml.safe_load(path.read_text())
    data.pop("defaults", None)
    config = from_dict(ModelConfig, data)
    _check(replace(config, layers=2, vocab_size=96 if config.vocab_size == "auto" else config.vocab_size))


@pytest.mark.parametrize("features", FEATURES, ids=lambda features: "-".join(features))
def test_of_every_feature(features):
    _check(replace(ModelConfig(vocab_size=96, layers=3), **features))
