"""Optimizers, their learning rate schedule, and the optimizers of users."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.optim.adafactor import Adafactor
    from orchestrator.optim.combined import CombinedOptimizer
    from orchestrator.optim.muon import Muon
    from orchestrator.optim.own import build_own
    from orchestrator.optim.schedule import schedule_of
    from orchestrator.optim.sgd import SGD
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "optim.adafactor": ["Adafactor"],
            "optim.combined": ["CombinedOptimizer"],
            "optim.muon": ["Muon"],
            "optim.own": ["build_own"],
            "optim.schedule": ["schedule_of"],
            "optim.sgd": ["SGD"],
        },
    )

__all__ = [
    "SGD",
    "Adafactor",
    "CombinedOptimizer",
    "Muon",
    "build_own",
    "schedule_of",
]
