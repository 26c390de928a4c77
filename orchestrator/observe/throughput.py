"""Tokens per second, step time and MFU."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from orchestrator.chips.catalogue import Figure
from orchestrator.hardware.base import Target
from orchestrator.observe.gemm import measure_gemm_flops

if TYPE_CHECKING:
    import torch


class Throughput:
    """Rates over the last steps.

    Args:
        window: steps that the rates are taken over.
    """

    def __init__(self, window: int = 50):
        if window < 1:
            raise ValueError("window must be at least 1")
        self._window = window
        self._entries: deque[tuple[int, int, int, float]] = deque()  # step, steps since the last entry, tokens, seconds
        self._step: int | None = None

    def update(self, step: int, tokens: int, seconds: float) -> None:
        """Count the work since the last update.

        Args:
            step: completed so far.
            tokens: of all devices, since the last update.
            seconds: of training since the last update, without evaluation and checkpoints.
        """
        steps = 1 if self._step is None or step <= self._step else step - self._step
        self._step = step
        self._entries.append((step, steps, tokens, seconds))
        while len(self._entries) > 1 and self._entries[0][0] <= step - self._window:
            self._entries.popleft()

    @property
    def tokens_per_second(self) -> float | None:
        """None before the first update."""
        seconds = self._seconds()
        return sum(entry[2] for entry in self._entries) / seconds if seconds > 0 else None

    @property
    def step_seconds(self) -> float | None:
        """Mean time of a step; None before the first update."""
        seconds = self._seconds()
        return seconds / sum(entry[1] for entry in self._entries) if seconds > 0 else None

    def _seconds(self) -> float:
        return sum(entry[3] for entry in self._entries)


def mfu(
    tokens_per_second: float | None, flops_per_token: float | None, peak_flops_per_device: float | None, devices: int
) -> float | None:
    """Model FLOPs utilisation: the share of the devices' peak that the model's arithmetic takes, without recompute.

    The definition of PaLM (arXiv 2204.02311, appendix B). None where a part is unknown.
    """
    if tokens_per_second is None or not flops_per_token or not peak_flops_per_device or devices < 1:
        return None
    return tokens_per_second * flops_per_token / (peak_flops_per_device * devices)


def peak_flops(target: Target, figure: Figure | None, precision: str, device: torch.device) -> tuple[float | None, str]:
    """The peak rate of one device, and where the number is from.

    Args:
        figure: the catalogue's (`Chip.device_peak_flops`); None where the chip is not in it.
        precision: of the matrix products, `fp32` or `bf16`.
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
    return rate, f"measured: {precision} matrix products on this CPU, per process"
