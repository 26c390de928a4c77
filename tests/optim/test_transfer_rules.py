"""`optim.transfer`: what muP and CompleteP scale, against the published tables, and that the base stays as it is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from orchestrator.config.compose import compose
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.optimizers import check_optimizer
from orchestrator.config.schema import (
    AdamWConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MuonConfig,
    RunConfig,
    TransferBaseConfig,
)
from orchestrator.config.transfer import check_transfer, describe_transfer, model_factors, settle_transfer
from orchestrator.models.decoder import Decoder
from orchestrator.optim.transfer_rules import Factors, transfer_factors
from orchestrator.training.optimizer_setup import PEAK, build_optimizer
from orchestrator.training.parameter_groups import trained
from orchestrator.training.placed_model import factors_of

MODEL = ModelConfig(vocab_size=96, dim=64, layers=4, heads=8, kv_heads=4, mlp_dim=128, attention_bias=True)
EXPERTS = MoEConfig(experts=4, top_k=2, mlp_dim=32, shared_mlp_dim=64, shared_gate=True)
WIDTH, DEPTH = TransferBaseConfig(dim=16), TransferBaseConfig(dim=16, layers=2)


def _config(optim: AdamWConfig | MuonConfig, model: ModelConfig = MODEL) -> RunConfig:
    config = RunConfig(optim=optim, model=model)
    assert check_transfer(config) == []
    return settle_transfer(config)


def _factors(config: RunConfig) -> dict[str, Factors]:
    return factors_of(config, Decoder(config.model))


def test_mup_is_table_8_for_adam_with_decay_and_epsilon_as_published():
    config = _config(AdamWConfig(transfer="mup", base=WIDTH))
    found, layer = _factors(config), "layers.3."
    assert found["embed.weight"] == found["head.weight"] == found["norm.weight"] == Factors(eps=1 / 4)
    assert found[f"{layer}attn_norm.weight"] == found[f"{layer}attn.q.bias"] == Factors(eps=1 / 4)
    for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"):
        assert found[f"{layer}{name}.weight"] == Factors(init=1 / 2, lr=1 / 4, decay=4.0, eps=1 / 4), name
    assert (config.model.logit_scale, config.model.residual_scale, config.model.attention_scale) == (0.25, 1.0, None)


def test_completep_scales_branches_and_the_epsilon_of_the_blocks_with_depth():
    config = _config(AdamWConfig(transfer="completep", base=DEPTH))
    found = _factors(config)
    assert found["embed.weight"] == found["head.weight"] == found["norm.weight"] == Factors(eps=1 / 4)
    assert found["layers.0.attn.q.weight"] == Factors(init=1 / 2, lr=1 / 4, decay=4.0, eps=1 / 8)
    assert found["layers.0.mlp_norm.weight"] == Factors(eps=1 / 8)
    # What writes to the stream starts as in the base: the model's own 1 / sqrt(2 layers) is taken back.
    assert found["layers.0.attn.o.weight"] == Factors(init=math.sqrt(2) / 2, lr=1 / 4, decay=4.0, eps=1 / 8)
    assert config.model.residual_scale == 0.5


def test_a_matrix_goes_by_its_own_columns_and_heads_by_their_width():
    base = TransferBaseConfig(dim=16, heads=4, head_dim=2, mlp_dim=64)
    config = _config(AdamWConfig(transfer="mup", base=base))
    found = _factors(config)
    assert found["layers.0.mlp.down.weight"] == Factors(init=math.sqrt(1 / 2), lr=1 / 2, decay=2.0, eps=1 / 4)
    assert found["layers.0.mlp.up.weight"] == Factors(init=1 / 2, lr=1 / 4, decay=4.0, eps=1 / 2)
    assert found["layers.0.attn.o.weight"].lr == 1 / 8  # 64 columns over 4 heads x 2
    assert config.model.attention_scale == pytest.approx(2**-0.5 * 2 / 8)  # 1 / d, equal to 1 / sqrt(d) at the base's d


def test_experts_are_matrices_and_routers_are_outputs():
    model = replace(MODEL, moe=EXPERTS)
    for base, rate in ((WIDTH, 1 / 4), (replace(WIDTH, expert_dim=32), 1.0)):
        found = _factors(_config(AdamWConfig(transfer="mup", base=base), model))
        assert found["layers.0.mlp.experts.up"].lr == 1 / 4
        assert found["layers.0.mlp.experts.down"].lr == rate
        assert found["layers.0.mlp.shared.down.weight"].lr == 1 / 4
        for name in ("router", "shared_gate"):
            assert found[f"layers.0.mlp.{name}.weight"] == Factors(init=1 / 4, lr=1 / 4, decay=4.0, eps=1.0)


@pytest.mark.parametrize(("adjust", "rate"), [("original", 1.0), ("match_rms_adamw", 1 / 2)])
def test_muons_updates_are_as_large_as_features_need_them(adjust, rate):
    """Of equal proportions Muon's own factor does; AdamW's size in its place grows with the root of the width."""
    optim = MuonConfig(transfer="completep", base=DEPTH, adjust_lr=adjust)
    found = _factors(_config(optim, replace(MODEL, moe=EXPERTS)))
    for name in ("attn.q.weight", "attn.o.weight", "mlp.experts.up", "mlp.experts.down", "mlp.shared.up.weight"):
        factors = found[f"layers.1.{name}"]
        assert (factors.lr, factors.decay) == (rate, 1 / rate), name
    # AdamW's part goes by AdamW's rules.
    assert found["layers.1.mlp.router.weight"].lr == 1 / 4
    assert found["embed.weight"] == Factors(eps=1 / 4)
    # Of other proportions than the base's the rate makes up for what Muon's own factor leaves out.
    found = _factors(_config(MuonConfig(transfer="mup", base=replace(WIDTH, mlp_dim=128))))
    assert found["layers.1.mlp.up.weight"].lr == math.sqrt(1 / 4) * math.sqrt(128 / 16) / math.sqrt(128 / 64)
    assert found["layers.1.mlp.down.weight"].lr == math.sqrt(4 / 1) * 1 / 1


@pytest.mark.parametrize("optim", [AdamWConfig(), AdamWConfig(state_dtype="bf16"), MuonConfig(ns_dtype="fp32")])
def test_the_optimizer_has_them_and_the_base_changes_nothing(optim):
    def settings(optim, model) -> dict[str, dict]:
        config = _config(optim, model)
        made = Decoder(config.model)
        members = trained(made, config.optim.groups, factors=factors_of(config, made))
        optimizer = build_optimizer(made, config.optim, torch.device("cpu"), members=members)
        names = {parameter: name for name, parameter in made.named_parameters()}
        keys = (PEAK, "weight_decay", "eps")
        return {names[p]: {k: group[k] for k in keys} for group in optimizer.param_groups for p in group["params"]}

    plain = settings(optim, MODEL)
    rule = replace(optim, transfer="completep", base=DEPTH)
    for name, scaled in settings(rule, MODEL).items():
        factors = transfer_factors(rule, MODEL, {name: Decoder(MODEL).logical_axes()[name]}, _shapes(name))[name]
        assert scaled[PEAK] == plain[name][PEAK] * factors.lr
        assert scaled["weight_decay"] == plain[name]["weight_decay"] * factors.decay
        assert scaled["eps"] == plain[name]["eps"] * factors.eps
    here = TransferBaseConfig(dim=64, layers=4, heads=8, head_dim=8, mlp_dim=128)
    assert settings(replace(optim, transfer="completep", base=here), MODEL) == plain
    assert _config(replace(optim, transfer="completep", base=here)).model == MODEL


def _shapes(name: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(Decoder(MODEL).get_parameter(name).shape))]


def test_what_is_settled_stays_settled_also_through_yaml():
    config = _config(AdamWConfig(transfer="completep", base=replace(DEPTH, head_dim=2, logit_scale=0.3)))
    assert settle_transfer(from_dict(RunConfig, to_dict(config))) == config
    assert check_transfer(config) == []
    assert config.model.logit_scale == pytest.approx(0.3 / 4)
    said = "completep: width 64 (4 x the base's), layers 4 (2 x the base's), logit_scale 0.075, residual_scale 0.5, "
    assert describe_transfer(config.optim, config.model)[0].startswith(said)


@pytest.mark.parametrize(
    ("optim", "model", "said"),
    [
        ({"transfer": "mup"}, {}, "needs the width"),
        ({"base": WIDTH}, {}, "nothing is transferred"),
        ({"transfer": "mup", "base": DEPTH}, {}, "for width alone"),
        ({"transfer": "mup", "base": WIDTH}, {"logit_scale": 0.5}, "optim.base.logit_scale"),
        ({"transfer": "mup", "base": WIDTH}, {"_target_": "mine.Model"}, "the product's own model"),
        ({"transfer": "mup", "base": WIDTH}, {"mla": MLAConfig(kv_lora_rank=8)}, "latent"),
        ({"transfer": "mup", "base": replace(WIDTH, heads=2)}, {"layer_heads": (8, 8, 4, 8)}, "by their width alone"),
    ],
)
def test_what_has_no_rule_is_said(optim, model, said):
    problems = check_transfer(RunConfig(optim=AdamWConfig(**optim), model=replace(MODEL, **model)))
    assert len(problems) == 1
    assert said in str(problems[0])


def test_weights_of_another_training_keep_their_factors():
    config = RunConfig(optim=AdamWConfig(transfer="mup", base=WIDTH), model=MODEL)
    config = replace(config, train=replace(config.train, init_from="somewhere"))
    (problem,) = check_transfer(config)
    assert "would compute something else" in str(problem)
    assert check_transfer(replace(config, model=replace(MODEL, logit_scale=1 / 4))) == []


def test_sizes_of_the_base_are_checked():
    (problem,) = check_optimizer(AdamWConfig(transfer="mup", base=replace(WIDTH, mlp_dim=0)))
    assert problem.what == "'optim.base.mlp_dim' is out of range"


def test_a_run_is_composed_with_it():
    config = compose(["optim=muon", "optim.transfer=mup", "optim.base.dim=32", "model=tiny_moe"]).config
    assert config.optim.base.dim == 32
    assert model_factors(config.optim, config.model)["logit_scale"] == 32 / config.model.dim
