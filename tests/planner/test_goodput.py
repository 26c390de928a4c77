"""Failures: rates with their marks, Young's and Daly's intervals, and what is left of the time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given as forall
from hypothesis import strategies as st

from orchestrator.chips.load import load_catalogue
from orchestrator.planner.estimate.goodput import (
    FailureOptions,
    daly_interval,
    failure_data,
    failure_rate,
    goodput,
    replace_goodput,
    restart_goodput,
    young_interval,
)
from orchestrator.planner.quantity import given

STEP = given("step", 5.0, "s", "test")


def _goodput(key="h100-sxm", chips=16384, groups=128, state=20e9, **options):
    count = given("chips", float(chips), "chips", "test")
    return goodput(load_catalogue().get(key), count, state, STEP, groups, FailureOptions(**options))


def test_the_worked_example_of_the_data():
    """failures.yaml: 16,384 chips at Llama 3's rate, a blocking save of 60 s and 600 s to be back."""
    example = failure_data()["checkpoint_interval"]["worked_example"]
    inputs = example["inputs"]
    mtbf = 86400 / (inputs["rate_per_gpu_day"] * inputs["chips"])
    assert mtbf == pytest.approx(example["mtbf_s"], rel=1e-3)
    tau = young_interval(inputs["blocking_save_s"], mtbf)
    assert tau == pytest.approx(example["young_tau_s"], rel=1e-3)
    kept = restart_goodput(tau, inputs["blocking_save_s"], mtbf, inputs["detect_plus_restart_s"])
    assert kept == pytest.approx(example["goodput_daly_with_restart"], abs=1e-3)


@pytest.mark.parametrize(("mtbf", "interval"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_dalys_own_examples(mtbf, interval):
    """Figures 3 to 5 of his paper: a save of 5 minutes, times in minutes."""
    assert daly_interval(5, mtbf) == pytest.approx(interval, rel=0.01)


def test_with_an_asynchronous_save_it_is_what_llama_3_reports():
    """Above 90% (arXiv 2407.21783)."""
    assert 0.90 < _goodput(save_stall_seconds=10.0).restart.value < 0.92


@forall(st.floats(0.01, 1e3), st.floats(60.0, 1e7))
def test_dalys_interval_is_the_better_one(stall, mtbf):
    """Of the two, Daly's loses no more time by his own expression, and both agree where saves are cheap."""
    young, daly = young_interval(stall, mtbf), daly_interval(stall, mtbf)
    assert 0 < daly <= mtbf or daly == pytest.approx(mtbf)
    assert restart_goodput(daly, stall, mtbf, 0) >= restart_goodput(young, stall, mtbf, 0) * (1 - 1e-3)
    if stall < 1e-4 * mtbf:
        assert daly == pytest.approx(young, rel=0.02)


@forall(st.floats(0.01, 1e3), st.floats(60.0, 1e7), st.floats(0, 1e4))
def test_goodput_is_a_share_and_falls_with_restarts(stall, mtbf, restart):
    interval = daly_interval(stall, mtbf)
    kept = restart_goodput(interval, stall, mtbf, restart)
    assert 0 < kept <= 1
    assert restart_goodput(interval, stall, mtbf, restart + 60) <= kept
    assert 0 < replace_goodput(stall, mtbf, 1.0, 8, restart) <= 1


@pytest.mark.parametrize(
    ("key", "rate", "marked"),
    [
        ("h100-sxm", 4.736e-4, False),
        ("a100-80", 8.125e-4, False),
        ("b200", 4.736e-4, True),
        ("tpu-v4", 2.0e-4, False),
        ("tpu-v7x", 2.0e-4, True),
        ("trn2", 8.125e-4, True),
        ("mi300x", 8.125e-4, True),
    ],
)
def test_rates_are_measured_or_marked(key, rate, marked):
    found = failure_rate(load_catalogue().get(key))
    assert (found.value, found.estimated) == (rate, marked)
    assert found.sources[0]


def test_a_million_chips_cannot_restart_every_time():
    huge = _goodput(chips=1_000_000, groups=2000)
    assert huge.mtbf.value == pytest.approx(182, rel=0.01)
    assert huge.restart.value < 0.1
    assert huge.recovery == "replace"
    assert huge.fraction.value > 0.5
    assert _goodput(chips=1024).recovery == "restart"
    assert _goodput(chips=1_000_000, groups=1).recovery == "restart", "one group cannot do without itself"
    assert _goodput(chips=1_000_000, recovery="restart").recovery == "restart"


def test_saves_are_no_closer_than_a_write_takes():
    slow = _goodput(state=300e9)
    assert slow.interval.value == pytest.approx(300e9 / 0.15e9)
    assert slow.young.value < slow.interval.value


def test_assumptions_mark_what_is_built_on_them():
    kept = _goodput()
    assert kept.stall.estimated
    assert kept.restart.estimated
    known = _goodput(save_stall_seconds=1.0, restart_seconds=300.0)
    assert not known.stall.estimated
    assert "assumption" in kept.restart.explain()


def test_spares_are_whole_hosts():
    kept = _goodput(chips=16384)
    mean = 4.736e-4 * 16384
    assert kept.spares.value == 8 * math.ceil(mean + 2.33 * math.sqrt(mean))
    assert _goodput(chips=16384, repair_hours=1.0).spares.value < kept.spares.value
