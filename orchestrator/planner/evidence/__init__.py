"""What the estimates rest on: published runs, the constants fitted to them, and how far the estimates are off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.planner.evidence.accuracy import Checked
    from orchestrator.planner.evidence.calibration import Calibration
    from orchestrator.planner.evidence.published import held_out_families, shipped
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "planner.evidence.accuracy": ["Checked"],
            "planner.evidence.calibration": ["Calibration"],
            "planner.evidence.published": ["held_out_families", "shipped"],
        },
    )

__all__ = [
    "Calibration",
    "Checked",
    "held_out_families",
    "shipped",
]
