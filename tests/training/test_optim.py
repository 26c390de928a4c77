"""The learning rate is a function of the step; the optimizer is complete before its first step."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.config.optimizers import check_schedule
from orchestrator.config.schema import AdamWConfig, MuonConfig, RunConfig, ScheduleConfig
from orchestrator.optim.schedule import learning_rate, schedule_of, warmup_steps
from orchestrator.training.optimizer_setup import build_optimizer

PEAK = 2.0
KINDS = ("cosine", "wsd", "linear", "constant")


def _rates(max_steps: int, **schedule) -> list[float]:
    """Of every step, and one beyond the end."""
    config = ScheduleConfig(**schedule)
    return [learning_rate(step, max_steps, PEAK, config) for step in range(max_steps + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_linear_and_starts_above_zero(kind):
    rates = _rates(100, kind=kind, warmup_steps=4)
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_is_at_the_peak(kind):
    assert _rates(10, kind=kind, warmup_steps=0)[0] == PEAK


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_it_ends_at_the_least_rate_and_stays_there(kind, ratio):
    schedule = ScheduleConfig(kind=kind, warmup_steps=3, min_lr_ratio=ratio)
    for step in (50, 51, 500):
        assert learning_rate(step, 50, PEAK, schedule) == pytest.approx(ratio * PEAK, abs=1e-12)


def test_values_on_the_way():
    cosine = _rates(110, kind="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert cosine[60] == pytest.approx(PEAK * (0.1 + 0.9 * 0.5))
    assert cosine[35] == pytest.approx(PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    linear = _rates(110, kind="linear", warmup_steps=10, min_lr_ratio=0.0)
    assert linear[60] == pytest.approx(PEAK / 2)
    wsd = _rates(100, kind="wsd", warmup_steps=10, min_lr_ratio=0.0, decay_fraction=0.2)
    assert wsd[10:81] == [PEAK] * 71
    assert wsd[90] == pytest.approx(PEAK / 2)
    assert _rates(100, kind="constant", warmup_steps=0) == [PEAK] * 101


SHAPES = ("linear", "cosine", "1-sqrt", "exponential")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_decay_has_a_shape_and_a_length(shape):
    rates = _rates(100, kind="wsd", warmup_steps=10, min_lr_ratio=0.01, decay_steps=40, decay_shape=shape)
    assert rates[9:61] == [PEAK] * 52
    middle = {"linear": 0.505, "cosine": 0.505, "1-sqrt": 0.01 + 0.99 * (1 - math.sqrt(0.5)), "exponential": 0.1}
    assert rates[80] == pytest.approx(PEAK * middle[shape])
    assert rates[100] == pytest.approx(PEAK * 0.01)
    assert rates[60:] == sorted(rates[60:], reverse=True)
    by_fraction = _rates(100, kind="wsd", warmup_steps=10, min_lr_ratio=0.01, decay_fraction=0.4, decay_shape=shape)
    assert by_fraction == rates


def test_a_decay_that_is_left_out_leaves_the_rate_and_can_be_added_later():
    stable = ScheduleConfig(kind="wsd", warmup_steps=10, decay_fraction=0.0)
    branch = ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=20)
    assert all(learning_rate(step, 1000, PEAK, stable) == PEAK for step in range(10, 1000))
    assert learning_rate(400, 420, PEAK, branch) == learning_rate(400, 1000, PEAK, stable)
    assert learning_rate(419, 420, PEAK, branch) == pytest.approx(PEAK * (0.1 + 0.9 * 0.05))


def test_a_horizon_ends_the_schedule_elsewhere():
    assert _rates(50, horizon_steps=200)[:50] == _rates(200)[:50]
    assert _rates(60, horizon_steps=50)[50:] == pytest.approx([PEAK * 0.1] * 11)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 20),
        ({"warmup_fraction": 0.01}, 3),
        ({"warmup_fraction": 0.0}, 0),
        ({"warmup_tokens": 40960}, 10),
        ({"warmup_tokens": 40961}, 11),
    ],
)
def test_the_warm_up_is_given_in_steps_parts_or_tokens(given, steps):
    plain = RunConfig()
    config = replace(plain, optim=replace(plain.optim, schedule=ScheduleConfig(**given)))
    assert warmup_steps(config) == steps
    rates = [schedule_of(config)(step, PEAK) for step in range(30)]
    assert rates.index(PEAK) == max(0, steps - 1)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (ScheduleConfig(warmup_fraction=0.1, warmup_tokens=1), "given twice"),
        (ScheduleConfig(decay_steps=5), "part of the schedule wsd"),
        (ScheduleConfig(decay_shape="1-sqrt"), "part of the schedule wsd"),
        (ScheduleConfig(kind="wsd", decay_shape="exponential", min_lr_ratio=0.0), "never reaches zero"),
    ],
)
def test_keys_that_mean_nothing_are_refused(schedule, said):
    (problem,) = check_schedule(schedule)
    assert said in problem.what


@given(
    st.sampled_from(KINDS),
    st.integers(1, 200),
    st.integers(0, 250),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(1e-6, 1),
)
def test_up_then_down_and_never_outside(kind, max_steps, warmup, ratio, decay, peak):
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, min_lr_ratio=ratio, decay_fraction=decay)
    rates = [learning_rate(step, max_steps, peak, schedule) for step in range(max_steps)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(falling))
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rising)
    assert all(ratio * peak * (1 - 1e-9) <= rate <= peak * (1 + 1e-9) for rate in falling)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))


def test_vectors_do_not_decay(model):
    matrices, vectors = build_optimizer(model, AdamWConfig(weight_decay=0.3), torch.device("cpu")).param_groups
    assert {id(p) for p in matrices["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert {id(p) for p in vectors["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)


def test_a_group_without_parameters_is_left_out():
    (group,) = build_optimizer(nn.Linear(2, 2, bias=False), AdamWConfig(), torch.device("cpu")).param_groups
    assert group["weight_decay"] == AdamWConfig().weight_decay


def test_muon_takes_models_of_matrices_alone():
    """As adapters are."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 4, bias=False)])
    optimizer = build_optimizer(model, MuonConfig(ns_dtype="fp32"), torch.device("cpu"))
    model.blocks[0].weight.grad = torch.ones(4, 4)
    before = model.blocks[0].weight.detach().clone()
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert not torch.equal(model.blocks[0].weight, before)


def test_frozen_parameters_are_not_optimized(model):
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(model, AdamWConfig(), torch.device("cpu"))
    assert model[0].weight not in optimizer.state
    assert len(optimizer.param_groups[0]["params"]) == 1


def test_settings_reach_the_optimizer(model):
    config = replace(AdamWConfig(), lr=0.5, betas=(0.8, 0.99), eps=1e-6)
    for group in build_optimizer(model, config, torch.device("cpu")).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.99), 1e-6)


def test_state_is_allocated_and_zero(model):
    optimizer = build_optimizer(model, AdamWConfig(), torch.device("cpu"))
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 0
        assert state["step"].shape == ()
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()


def test_allocated_state_changes_no_step(model):
    """The same steps, to the bit, as of an optimizer that allocates its state itself."""
    import copy

    twin = copy.deepcopy(model)
    ours = build_optimizer(model, AdamWConfig(lr=0.01), torch.device("cpu"))
    decay = [p for p in twin.parameters() if p.dim() >= 2]
    rest = [p for p in twin.parameters() if p.dim() < 2]
    theirs = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        batch = torch.randn(5, 4, generator=generator)
        for net, optimizer in ((model, ours), (twin, theirs)):
            net(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
