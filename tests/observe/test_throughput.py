"""Rates, MFU, and where the peak comes from."""

from __future__ import annotations

import pytest
import torch

from orchestrator.chips.catalogue import Figure, load
from orchestrator.hardware.registry import get_target
from orchestrator.observe import throughput
from orchestrator.observe.gemm import measure_gemm_flops
from orchestrator.observe.throughput import Throughput, mfu, peak_flops

CPU = torch.device("cpu")


def test_nothing_is_known_before_the_first_step():
    meter = Throughput()
    assert meter.tokens_per_second is None
    assert meter.step_seconds is None


def test_rates():
    meter = Throughput(window=10)
    meter.update(1, 1000, 0.5)
    assert meter.tokens_per_second == pytest.approx(2000)
    meter.update(5, 4000, 0.5)
    assert meter.tokens_per_second == pytest.approx(5000)
    assert meter.step_seconds == pytest.approx(1.0 / 5)


def test_old_steps_leave_the_window():
    meter = Throughput(window=2)
    meter.update(1, 100, 100.0)
    for step in range(2, 6):
        meter.update(step, 100, 1.0)
    assert meter.tokens_per_second == pytest.approx(100)
    assert meter.step_seconds == pytest.approx(1.0)


def test_the_last_update_counts_however_long_it_was():
    meter = Throughput(window=2)
    meter.update(10, 1000, 1.0)
    meter.update(20, 1000, 2.0)
    assert meter.tokens_per_second == pytest.approx(500)


def test_window_must_be_positive():
    with pytest.raises(ValueError, match="window"):
        Throughput(window=0)


def test_mfu():
    assert mfu(1000.0, 6e9, 1e13, 2) == pytest.approx(0.3)


@pytest.mark.parametrize("known", [(None, 1.0, 1.0, 1), (1.0, None, 1.0, 1), (1.0, 1.0, None, 1), (1.0, 1.0, 0.0, 1)])
def test_mfu_of_unknown_parts_is_unknown(known):
    assert mfu(*known) is None


def test_peak_of_a_chip_is_the_catalogues():
    value, source = peak_flops(get_target("cuda"), load().get("h100-sxm").device_peak_flops("bf16"), "bf16", CPU)
    assert value == pytest.approx(989e12)
    assert "stas" in source


def test_unknown_peaks_stay_unknown():
    value, source = peak_flops(get_target("cuda"), Figure(None, "FLOP/s"), "fp32", CPU)
    assert value is None
    assert "no published fp32 rate" in source
    value, source = peak_flops(get_target("cuda"), None, "bf16", CPU)
    assert value is None
    assert "not in the catalogue" in source


def test_an_unverified_peak_says_so():
    figure = load().get("cpu-generic").peak_flops("bf16")
    assert "unverified" in peak_flops(get_target("cpu"), figure, "bf16", CPU)[1]


def test_a_processor_is_measured(monkeypatch):
    monkeypatch.setattr(throughput, "measure_gemm_flops", lambda device, dtype: 1.5e11)
    value, source = peak_flops(get_target("cpu"), None, "fp32", CPU)
    assert value == 1.5e11
    assert "measured" in source


def test_measuring_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    assert 1e8 < measure_gemm_flops(CPU, torch.float32, seconds=0.02) < 1e15
    assert torch.equal(torch.get_rng_state(), before)
