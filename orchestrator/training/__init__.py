"""One process's part of a run: from the configuration to the job that trains, step by step.

Read `job` first: it builds everything in the order of a run. `module` is one optimizer step; `callbacks` look at the
run between steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.training.check import check_run
    from orchestrator.training.data_module import TokenDataModule
    from orchestrator.training.job import Job, build, make_strategy
    from orchestrator.training.module import LanguageModule
    from orchestrator.training.optimizer_setup import build_optimizer
    from orchestrator.training.resolved import Resolved, resolve_run
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "training.check": ["check_run"],
            "training.data_module": ["TokenDataModule"],
            "training.job": ["Job", "build", "make_strategy"],
            "training.module": ["LanguageModule"],
            "training.optimizer_setup": ["build_optimizer"],
            "training.resolved": ["Resolved", "resolve_run"],
        },
    )

__all__ = [
    "Job",
    "LanguageModule",
    "Resolved",
    "TokenDataModule",
    "build",
    "build_optimizer",
    "check_run",
    "make_strategy",
    "resolve_run",
]
