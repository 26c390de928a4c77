"""MFU, and the peak rate that it refers to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.chips.chip import Figure
from orchestrator.hardware.target import Target
from orchestrator.observe.gemm import measure_gemm_flops

if TYPE_CHECKING:
    import torch


def mfu(
    tokens_per_second: float | None, flops_per_token: float | None, peak_flops_per_device: float | None, devices: int
) -> float | None:
    """Return the model FLOPs utilisation: the model's arithmetic, without recompute, per peak of the devices.

    The definition of PaLM (arXiv 2204.02311, appendix B). None where a part is unknown.

    Args:
        tokens_per_second: of the whole job.
        flops_per_token: of the model, forward and backward.
        peak_flops_per_device: FLOP/s.
        devices: of the job.
    """
    if tokens_per_second is None or not flops_per_token or not peak_flops_per_device or devices < 1:
        return None
    return tokens_per_second * flops_per_token / (peak_flops_per_device * devices)


def peak_flops(target: Target, figure: Figure | None, precision: str, device: torch.device) -> tuple[float | None, str]:
    """Return the peak rate of one device, and the source of the number.

    Args:
        target: the hardware.
        figure: the catalogue's (`Chip.device_peak_flops`); None where the chip is not in it.
        precision: of the matrix products: `fp32`, `bf16` or `fp8`, which a CPU emulates by products in fp32.
        device: measured where the target is a CPU and no figure is known.

    Returns:
        FLOP/s, or None where nothing is known; and the source in words.
    """
    if figure is not None and figure.value is not None:
        marks = [text for flag, text in ((figure.estimated, "estimated"), (not figure.verified, "unverified")) if flag]
        return figure.value, f"chip catalogue: {figure.source}" + (f" ({', '.join(marks)})" if marks else "")
    if target.device_type != "cpu":
        what = "this chip is not in the catalogue" if figure is None else f"no published {precision} rate of this chip"
        return None, f"unknown: {what}"
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rate = measure_gemm_flops(device, dtype)
    measured = "bf16" if precision == "bf16" else "fp32"
    return rate, f"measured: {measured} matrix products on this CPU, per process"
