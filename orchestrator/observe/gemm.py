"""Measure the rate of matrix products of a device: the reference of MFU where no published peak applies."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MIN_REPEATS = 3
_MOST_SECONDS = 2.0  # that the products of one shape may take
# (rows, inner, columns): a square, and the up-projection of an MLP over a micro-batch of tokens.
_CPU_SHAPES = ((1024, 1024, 1024), (2048, 512, 1536))
_PROBE_SHAPE = (128, 128, 128)  # tells whether the others can be afforded
_ACCELERATOR_SHAPES = ((8192, 8192, 8192), (16384, 4096, 14336))


def measure_gemm_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of dense matrix products on one device.

    The best of all repetitions and shapes is taken, since it stands for a peak: other work on the machine only
    ever lowers a rate. On a CPU it uses the threads of this process while whatever else runs goes on, so
    processes that measure at the same time see what each of them can have.

    Args:
        device: where the products run.
        dtype: of both factors.
        seconds: about how long to measure, all shapes together.
    """
    shapes = _CPU_SHAPES if device.type == "cpu" else _ACCELERATOR_SHAPES
    best = _best_flops(device, dtype, _PROBE_SHAPE, 0.0)
    for shape in shapes:
        # A CPU without instructions for a dtype takes seconds for one product, at the rate of the small one.
        if (_MIN_REPEATS + 1) * _flops(shape) / best < _MOST_SECONDS:
            best = max(best, _best_flops(device, dtype, shape, seconds / len(shapes)))
    return best


def _flops(shape: tuple[int, int, int]) -> float:
    rows, inner, columns = shape
    return 2.0 * rows * inner * columns


def _best_flops(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], seconds: float) -> float:
    import torch

    rows, inner, columns = shape
    # A generator of its own: the run's random state must not depend on whether the device was measured.
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator).to(device, dtype)
    right = torch.randn(inner, columns, generator=generator).to(device, dtype)
    result = torch.empty(rows, columns, device=device, dtype=dtype)

    def once() -> float:
        started = time.perf_counter()
        torch.mm(left, right, out=result)
        _wait(device)
        return time.perf_counter() - started

    with torch.no_grad():
        once()  # loads the kernels and wakes the threads
        times: list[float] = []
        deadline = time.perf_counter() + seconds
        while len(times) < _MIN_REPEATS or time.perf_counter() < deadline:
            times.append(once())
    return _flops(shape) / min(times)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)
