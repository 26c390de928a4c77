"""Each recipe of a published training composes to what its source says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.schema import RunConfig
from orchestrator.config.validate import validate
from orchestrator.models.shapes import parameter_shapes
from orchestrator.optim.schedule import schedule_of, warmup_steps

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(name: str) -> RunConfig:
    config = compose([f"experiment={name}"], config_dir=str(RECIPES)).config
    assert validate(config) == []
    return config


def parameters(config: RunConfig) -> int:
    return sum(math.prod(shape) for _, shape in parameter_shapes(config.model))


def test_smollm_decays_to_zero_behind_a_stable_stretch():
    config = recipe("smollm_135m")
    rate = schedule_of(config)
    assert parameters(config) == 134_515_008
    assert rate(1_999, 3e-3) == rate(1_600_000, 3e-3) == 3e-3
    assert rate(1_800_000, 3e-3) == pytest.approx(1.5e-3)
    assert rate(2_000_000, 3e-3) == 0.0
    assert sum(source.weight for source in config.data.sources) == pytest.approx(1.0)


def test_olmo_warms_up_in_tokens_and_ends_before_its_cosine():
    config = recipe("olmo2_1b_stage1")
    rate = schedule_of(config)
    assert warmup_steps(config) == 4_000
    assert rate(config.train.max_steps, 1.0) == pytest.approx(0.1 + 0.9 * 0.0956, abs=1e-3)
    assert (config.optim.decay_norm_and_bias, config.optim.decay_embeddings) == (True, False)
    assert config.train.z_loss == 1e-5


def test_torchtitan_is_linear_to_zero():
    config = recipe("torchtitan_llama3_8b")
    assert schedule_of(config)(600, 1.0) == pytest.approx(0.5)
    assert parameters(config) == 8_030_261_248
    assert config.model.init_depth == "layer"


def test_nanochat_decays_over_most_of_its_steps():
    rate = schedule_of(recipe("nanochat_schedule"))
    assert rate(104, 1.0) == 1.0
    assert rate(300, 1.0) == pytest.approx(0.05)
