"""A Lightning accelerator for any hardware target.

Lightning's own accelerators decide by vendor whether they are available and refuse custom strategies; ours
is told by the target, so that one class serves every vendor.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator

from orchestrator.hardware.target import Target


class TargetAccelerator(Accelerator):
    """A Lightning accelerator for a hardware target.

    Args:
        target: the hardware.
    """

    def __init__(self, target: Target):
        self.target = target

    def setup_device(self, device: torch.device) -> None:
        """Do nothing: the strategy's `join` has chosen the `device`."""

    def teardown(self) -> None:
        """Do nothing."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Return the bytes in use on `device`, where the target counts them."""
        used = self.target.memory_bytes(device)
        return {} if used is None else {"memory_bytes": used}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """Return `devices` as they are."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> Any:
        """Return a placeholder for each of `devices`: the strategy chooses the device."""
        return [None] * devices

    @staticmethod
    def auto_device_count() -> int:
        """Return 1: Lightning sees one device per process."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Return True: the target has been probed."""
        return True

    @staticmethod
    def name() -> str:
        """Return the name that Lightning shows."""
        return "orchestrator"
