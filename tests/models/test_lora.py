"""What a model with adapters is: names, shapes, initial values, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from orchestrator.config.schema import LoraConfig, RunConfig, TrainConfig
from orchestrator.config.validate import validate
from orchestrator.errors import ConfigError
from orchestrator.models.decoder import Decoder
from orchestrator.models.init import draw_slice
from orchestrator.models.lora import apply_lora
from orchestrator.models.shapes import adapter_shapes, trained_share
from orchestrator.planner.estimate.own_memory import native_memory
from orchestrator.planner.evidence.calibration import Calibration
from orchestrator.planner.spec import JobSpec, ModelShape, ParallelPlan
from tests.lab.models import MODELS, model_config


def adapted(kind, lora):
    with torch.device("meta"):
        model = Decoder(model_config(kind))
    apply_lora(model, lora)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_trained_is_what_the_description_says(kind):
    lora = LoraConfig(rank=3)
    model = adapted(kind, lora)
    trained = {name: tuple(one.shape) for name, one in model.named_parameters() if one.requires_grad}
    assert trained == dict(adapter_shapes(model.config, lora))
    assert trained.keys() <= model.logical_axes().keys() == model.initializers().keys()
    whole = sum(one.numel() for one in model.parameters() if not one.requires_grad)
    assert trained_share(model.config, lora) == sum(map(math.prod, trained.values())) / whole


def test_initial_adapters_are_pefts_in_distribution_and_add_nothing():
    model = adapted("llama", LoraConfig(rank=8, target_modules=("q", "down")))
    initializers = model.initializers()
    names = [name for name in initializers if "lora" in name]
    assert {name.split(".")[-2] for name in names} == {"q", "down"}
    for name in names:
        shape = tuple(model.get_parameter(name).shape)
        value = draw_slice(initializers[name], name, 0, shape, tuple(slice(0, size) for size in shape))
        if name.endswith("lora_b"):
            assert not value.any()
            continue
        bound = 1 / math.sqrt(shape[1])  # of torch's kaiming_uniform_ with a = sqrt(5)
        assert value.abs().max() <= bound
        assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        part = draw_slice(initializers[name], name, 0, shape, (slice(2, 5), slice(1, 9)))
        assert torch.equal(part, value[2:5, 1:9])


@pytest.mark.parametrize("targets", [("qq",), ("q", "head"), ("embed",), ("router",)])
def test_what_no_adapter_lies_beside_is_refused(targets):
    with pytest.raises(ConfigError, match="target_modules") as caught:
        adapted("mixtral", LoraConfig(rank=2, target_modules=targets))
    assert "k, o, q, v" in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        (LoraConfig(rank=0), "rank"),
        (LoraConfig(rank=2, alpha=0.0), "alpha"),
        (LoraConfig(rank=2, dropout=1.0), "dropout"),
        (LoraConfig(rank=2, target_modules=()), "target_modules"),
    ],
)
def test_ranges(lora, key):
    (problem,) = validate(RunConfig(train=TrainConfig(lora=lora)))
    assert f"train.lora.{key}" in str(problem)


def test_the_memory_of_a_run_of_adapters_is_far_below_that_of_all_weights():
    shape, plan = ModelShape.of(model_config("llama", dim=512, mlp_dim=1024, layers=8)), ParallelPlan(micro_batch=1)
    constants = Calibration("orchestrator", "cpu", eager_kept=2.0, fused_norms=True, context_bytes=0)
    whole, adapters = (
        native_memory(JobSpec(shape, 64, 64, precision="fp32", trained=share), plan, constants, None)
        for share in (1.0, 0.01)
    )
    assert adapters.optimizer == pytest.approx(0.01 * whole.optimizer)
    assert adapters.gradients < 0.02 * whole.gradients
    assert adapters.parameters == pytest.approx(1.01 * whole.parameters)
