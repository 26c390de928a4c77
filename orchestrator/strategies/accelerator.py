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
    def __init__(self, target: Target):
        self.target = target

    def setup_device(self, device: torch.device) -> None:
        """The strategy's `join` has chosen the device."""

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        used = self.target.memory_bytes(device)
        return {} if used is None else {"memory_bytes": used}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> Any:
        return [None] * devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "orchestrator"
