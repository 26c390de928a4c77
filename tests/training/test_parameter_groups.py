"""Which parameters share a rate and a decay, and that each entry of `optim.groups` is for something."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from orchestrator.config.optimizers import check_optimizer
from orchestrator.config.registry import permit
from orchestrator.config.schema import (
    AdafactorConfig,
    AdamWConfig,
    ModelConfig,
    MoEConfig,
    MuonConfig,
    OptimGroupConfig,
    OwnOptimConfig,
    SGDConfig,
)
from orchestrator.errors import ConfigError
from orchestrator.models.decoder import Decoder
from orchestrator.training.optimizer_setup import PEAK, build_optimizer
from orchestrator.training.parameter_groups import describe_groups, trained

EXPERTS = MoEConfig(experts=4, top_k=2, mlp_dim=32, expert_bias=True)
CONFIG = ModelConfig(
    vocab_size=64, dim=32, layers=2, heads=2, kv_heads=2, mlp_dim=48, norm="layer", attention_bias=True, moe=EXPERTS
)
GROUPS = (
    OptimGroupConfig("layers.0.attn.q.*", lr_factor=0.5),
    OptimGroupConfig("layers.*.attn.q.*", lr_factor=0.25, weight_decay=0.7),
    OptimGroupConfig("embed.weight", lr_factor=0.0),
)
CONFIGS = (
    AdamWConfig(),
    MuonConfig(ns_dtype="fp32"),
    AdafactorConfig(weight_decay=0.1),
    SGDConfig(weight_decay=0.1),
    OwnOptimConfig(_target_="torch.optim.RAdam"),
)


@pytest.fixture(autouse=True)
def _permitted():
    permit(["torch.optim.RAdam"])


def _settings(model: Decoder, config) -> dict[str, tuple[float, float]]:
    """Peak rate over the optimizer's own, and decay, by name."""
    optimizer = build_optimizer(model, config, torch.device("cpu"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group[PEAK], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_optimizer_has_the_rates_of_its_groups(config):
    model = Decoder(CONFIG)
    before, after = _settings(model, config), _settings(model, replace(config, groups=GROUPS))
    assert before.keys() == after.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (rate, decay) in after.items():
        factor = 0.5 if ".0.attn.q." in name else 0.25 if ".attn.q." in name else 0.0 if name == "embed.weight" else 1.0
        assert rate == before[name][0] * factor, name
        assert decay == (0.7 if factor == 0.25 else before[name][1]), name


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda config: config.name)
def test_vectors_are_not_decayed_whatever_their_number_of_dims(config):
    for name, (_, decay) in _settings(Decoder(CONFIG), config).items():
        assert (decay == 0) == ("bias" in name or "norm" in name), name
    assert "layers.1.mlp.experts.gate_bias" in _settings(Decoder(CONFIG), config)


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda config: config.name)
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_decay_reaches_norms_and_leaves_out_embeddings_where_asked(config, positions):
    model = Decoder(replace(CONFIG, positions=positions, tied_embeddings=positions == "learned"))
    keys = {"decay_norm_and_bias": True, "decay_embeddings": False}
    muon = isinstance(config, MuonConfig)
    config = replace(config, adamw=replace(config.adamw, **keys)) if muon else replace(config, **keys)
    found = _settings(model, config)
    assert ("positions.weight" in found) == (positions == "learned")
    for name, (_, decay) in found.items():
        assert (decay == 0) == (name in ("embed.weight", "positions.weight")), name
    embedding = OptimGroupConfig("embed.weight", weight_decay=0.3)
    assert _settings(model, replace(config, groups=(embedding,)))["embed.weight"][1] == 0.3


def test_what_matches_nothing_is_said_and_what_matches_is_shown():
    model = Decoder(CONFIG)
    lines = describe_groups(trained(model, GROUPS))
    assert lines[0] == "embed.weight: 1 tensors, 2,048 parameters, lr x 0"
    assert lines[2] == "layers.*.attn.q.*: 2 tensors, 1,056 parameters, lr x 0.25, weight decay 0.7"
    with pytest.raises(ConfigError, match=r"matches no parameter(.|\n)*layer.0(.|\n)*embed.weight"):
        trained(model, (OptimGroupConfig("layer.0"),))
    with pytest.raises(ConfigError, match="an earlier entry has left"):
        trained(model, (OptimGroupConfig("layers.*"), OptimGroupConfig("layers.0.*")))
    assert trained(model, (OptimGroupConfig("layers.7.*"),), everything=False)  # of another stage of the pipeline


def test_numbers_are_checked():
    found = check_optimizer(AdamWConfig(groups=(OptimGroupConfig("", lr_factor=-1.0),)))
    assert [problem.what for problem in found] == [
        "'optim.groups[0].lr_factor' is out of range",
        "'optim.groups[0].match' names no parameter",
    ]
