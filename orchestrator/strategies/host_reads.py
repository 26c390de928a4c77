"""Reads of a device's scalars that do not stop the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def read_later(value: Tensor, pin: bool) -> Callable[[], float]:
    """Copy a scalar to the host, and return a function that waits for that copy and gives the number.

    Args:
        value: a scalar on a device. A plain read of it would wait for all that was started since.
        pin: copy to pinned memory.
    """
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=pin)
    host.copy_(value, non_blocking=True)
    copied = torch.Event(device=value.device)
    copied.record()

    def read() -> float:
        copied.synchronize()
        return float(host.item())

    return read
