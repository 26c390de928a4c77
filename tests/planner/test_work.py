"""Counts of elements and operations, against published models and against the product's own counts."""

from __future__ import annotations

import pytest

from orchestrator.config.compose import compose, conf_dir
from orchestrator.config.schema import ModelConfig
from orchestrator.config.words import group_options
from orchestrator.planner.estimate.flops import flops_per_token, parameter_count
from orchestrator.planner.estimate.stages import stage_costs
from orchestrator.planner.estimate.work import (
    layer_elements,
    layer_products,
    mean_attended,
    model_flops_per_token,
    parameters,
    sparse_layers,
)
from orchestrator.planner.spec import ModelShape
from tests.planner.shapes import DEEPSEEK_V3, LLAMA_8B, LLAMA_70B, MIXTRAL


@pytest.mark.parametrize(
    ("shape", "published"),
    [(LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496), (MIXTRAL, 46_702_792_704)],
)
def test_parameters_of_published_models(shape, published):
    assert parameters(shape) == published


def test_parameters_of_deepseek_v3():
    """671B in all and 37B per token, by the model's card; its few small norms are not counted."""
    assert parameters(DEEPSEEK_V3) == pytest.approx(671e9, rel=1e-3)
    per_token = model_flops_per_token(DEEPSEEK_V3, 2) / 6
    assert per_token + DEEPSEEK_V3.vocab * DEEPSEEK_V3.dim == pytest.approx(37e9, rel=0.03)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window", [None, 100])
def test_a_configured_model_counts_as_the_product_counts_it(activation, tied, window):
    config = ModelConfig(
        vocab_size=512, dim=64, layers=3, heads=4, kv_heads=2, head_dim=24, mlp_dim=96,
        activation=activation, tied_embeddings=tied, sliding_window=window,
    )  # fmt: skip
    shape = ModelShape.of(config)
    assert model_flops_per_token(shape, 256) == pytest.approx(flops_per_token(config, 256))
    count = parameter_count(config)
    assert parameters(shape) == count.embedding + count.attention + count.mlp + count.norms + count.head


@pytest.mark.parametrize("shape", [LLAMA_8B, MIXTRAL, DEEPSEEK_V3])
@pytest.mark.parametrize("tensor", [1, 4])
def test_products_multiply_each_element_once_per_token(shape, tensor):
    sparse = bool(shape.experts)
    kind = layer_elements(shape, sparse)
    active = kind.experts * shape.experts_per_token / shape.experts if sparse else 0
    dense, grouped = layer_products(shape, 1000, tensor, 1, sparse)
    flops = sum(product.flops for product in dense + grouped)
    whole = kind.attention + kind.mlp + active
    # What has no head of its own (the down-projections of latent attention) every device computes.
    shared = shape.dim * (shape.latent_q + shape.latent_kv + shape.rope_dim) if shape.latent_kv else 0
    assert flops == pytest.approx(2 * 1000 * ((whole - shared) / tensor + shared))


def test_experts_over_devices_multiply_as_much_on_each():
    alone = sum(product.flops for product in layer_products(MIXTRAL, 4096, 1, 1, True)[1])
    spread = layer_products(MIXTRAL, 4096, 1, 8, True)[1]
    assert sum(product.flops for product in spread) == pytest.approx(alone)
    assert spread[0].copies == 1
    assert spread[0].rows == 8 * 4096 * 2 / 8


def test_positions_seen():
    assert mean_attended(LLAMA_8B, 8192) == 4096
    assert mean_attended(LLAMA_8B, 8192, causal=False) == 8192
    windowed = ModelShape("w", 4, 64, 128, 4, 4, 16, 100, window=128)
    assert mean_attended(windowed, 8192) == pytest.approx(128 - 128**2 / 16384)
    assert mean_attended(windowed, 8192, block=512) == pytest.approx(640 - 128**2 / 16384)
    half = ModelShape("h", 4, 64, 128, 4, 4, 16, 100, window=128, global_layers=2)
    assert mean_attended(half, 8192) == pytest.approx((4096 + 128 - 128**2 / 16384) / 2)
    assert mean_attended(windowed, 64, block=512) == 32, "a window longer than the sequence sees all before it"


def test_layers_with_experts():
    assert sparse_layers(DEEPSEEK_V3) == 58
    assert sparse_layers(LLAMA_8B) == 0


@pytest.mark.parametrize("name", group_options([conf_dir()])["model"])
def test_a_preset_has_the_parameters_and_operations_of_its_description(name):
    """But for biases and the like, which a shape does not have."""
    config = compose([f"model={name}"]).config.model
    shape = ModelShape.of(config, 4096)
    count = parameter_count(config, None if isinstance(config.vocab_size, int) else 4096)
    assert parameters(shape) == pytest.approx(count.total, rel=0.005)
    flops = flops_per_token(config, 1024, shape.vocab)
    assert model_flops_per_token(shape, 1024) == pytest.approx(flops, rel=0.02)
    costs = stage_costs(shape, 1024)
    assert sum(costs.layers) + costs.first + costs.last == pytest.approx(model_flops_per_token(shape, 1024), rel=1e-9)
