"""Estimates of one layout from the shapes alone: operations, bytes, seconds, failures, money."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.planner.estimate.flops import flops_per_token
    from orchestrator.planner.estimate.goodput import FailureOptions, Goodput
    from orchestrator.planner.estimate.memory import estimate_memory, step_memory
    from orchestrator.planner.estimate.time import estimate_time, step_time
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "planner.estimate.flops": ["flops_per_token"],
            "planner.estimate.goodput": ["FailureOptions", "Goodput"],
            "planner.estimate.memory": ["estimate_memory", "step_memory"],
            "planner.estimate.time": ["estimate_time", "step_time"],
        },
    )

__all__ = [
    "FailureOptions",
    "Goodput",
    "estimate_memory",
    "estimate_time",
    "flops_per_token",
    "step_memory",
    "step_time",
]
