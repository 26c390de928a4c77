"""Estimates of a training job, without a device.

Memory, step time, failures, energy and cost of a layout, and the search for the best one, in pure Python and NumPy.
`calibration.yaml` holds the constants that were fitted to published runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.planner.fleet import Fleet
    from orchestrator.planner.job_plan import FleetPlan, Request, pareto, plan_fleet
    from orchestrator.planner.search import Candidate, Space
    from orchestrator.planner.spec import Cluster, JobSpec, MemoryEstimate, ModelShape, ParallelPlan, TimeEstimate
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "planner.fleet": ["Fleet"],
            "planner.job_plan": ["FleetPlan", "Request", "pareto", "plan_fleet"],
            "planner.search": ["Candidate", "Space"],
            "planner.spec": ["Cluster", "JobSpec", "MemoryEstimate", "ModelShape", "ParallelPlan", "TimeEstimate"],
        },
    )

__all__ = [
    "Candidate",
    "Cluster",
    "Fleet",
    "FleetPlan",
    "JobSpec",
    "MemoryEstimate",
    "ModelShape",
    "ParallelPlan",
    "Request",
    "Space",
    "TimeEstimate",
    "pareto",
    "plan_fleet",
]
