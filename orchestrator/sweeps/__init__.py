"""Sweeps: the search space, the study that a sweep is stored in, pruning, and the record that pages are drawn from.

Optuna is imported here alone, and only by a sweep that asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.sweeps.running_trial import RunningTrial
    from orchestrator.sweeps.space import Between, Choices
    from orchestrator.sweeps.study import StoredStudy, SweepPlan
    from orchestrator.sweeps.sweep_record import SweepJob, SweepRecord
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "sweeps.sweep_record": ["SweepJob", "SweepRecord"],
            "sweeps.running_trial": ["RunningTrial"],
            "sweeps.space": ["Between", "Choices"],
            "sweeps.study": ["StoredStudy", "SweepPlan"],
        },
    )

__all__ = [
    "Between",
    "Choices",
    "RunningTrial",
    "StoredStudy",
    "SweepJob",
    "SweepPlan",
    "SweepRecord",
]
