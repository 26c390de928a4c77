"""The rate of matrix products: measured, and not waited for where a dtype is slow."""

from __future__ import annotations

import torch

from orchestrator.observe import gemm

CPU = torch.device("cpu")


def test_a_rate_is_measured():
    assert gemm.measure_gemm_flops(CPU, torch.float32, seconds=0.02) > 1e6


def test_the_best_shape_counts(monkeypatch):
    rates = {gemm._PROBE_SHAPE: 2e10, **dict(zip(gemm._CPU_SHAPES, (7e10, 5e10), strict=True))}
    monkeypatch.setattr(gemm, "_best_flops", lambda device, dtype, shape, seconds: rates[shape])
    assert gemm.measure_gemm_flops(CPU, torch.float32) == 7e10


def test_products_of_seconds_are_left_out(monkeypatch):
    """A CPU without instructions for bf16: the large shapes would hold the run up for the better part of a minute."""
    tried = []

    def slow(device, dtype, shape, seconds):
        tried.append(shape)
        return 5e8

    monkeypatch.setattr(gemm, "_best_flops", slow)
    assert gemm.measure_gemm_flops(CPU, torch.bfloat16) == 5e8
    assert tried == [gemm._PROBE_SHAPE]
