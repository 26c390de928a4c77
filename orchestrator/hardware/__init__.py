"""Hardware targets: CPU, CUDA, ROCm, TPU, Trainium.

One module per target finds its devices and sets precision and process environment. `mesh` orders devices by their
links.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.hardware.mesh import order_devices
    from orchestrator.hardware.target import Probe, Target
    from orchestrator.hardware.target_table import TARGETS, get_target, job_devices, resolve
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "hardware.mesh": ["order_devices"],
            "hardware.target": ["Probe", "Target"],
            "hardware.target_table": ["TARGETS", "get_target", "job_devices", "resolve"],
        },
    )

__all__ = [
    "TARGETS",
    "Probe",
    "Target",
    "get_target",
    "job_devices",
    "order_devices",
    "resolve",
]
