"""MFU, and where the peak comes from."""

from __future__ import annotations

import pytest
import torch

from orchestrator.chips.chip import Figure
from orchestrator.chips.load import load_catalogue
from orchestrator.hardware.target_table import get_target
from orchestrator.observe import throughput
from orchestrator.observe.gemm import measure_gemm_flops
from orchestrator.observe.throughput import mfu, peak_flops

CPU = torch.device("cpu")


def test_mfu():
    assert mfu(1000.0, 6e9, 1e13, 2) == pytest.approx(0.3)


@pytest.mark.parametrize("known", [(None, 1.0, 1.0, 1), (1.0, None, 1.0, 1), (1.0, 1.0, None, 1), (1.0, 1.0, 0.0, 1)])
def test_mfu_of_unknown_parts_is_unknown(known):
    assert mfu(*known) is None


def test_peak_of_a_chip_is_the_catalogues():
    value, source = peak_flops(
        get_target("cuda"), load_catalogue().get("h100-sxm").device_peak_flops("bf16"), "bf16", CPU
    )
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
    figure = load_catalogue().get("cpu-generic").peak_flops("bf16")
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
