"""Train one language model on whatever accelerators you can get, from one configuration.

    import orchestrator

    run = orchestrator.train(["model=tiny", "train.max_steps=100"])
    print(run.status, run.metrics[-1]["loss"])

Every run is described by one Hydra configuration (`orchestrator.config`), sharded through one strategy interface
(`orchestrator.strategies`) and saved in checkpoints that move between vendors (`orchestrator.checkpoint`). Nothing is
imported before it is used: `import orchestrator` does not import torch. See docs/python.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api.comparing import compare
    from orchestrator.api.configs import compose
    from orchestrator.api.planning import plan
    from orchestrator.api.rehearsing import rehearse
    from orchestrator.api.runs import Run, load_run
    from orchestrator.api.trained_models import evaluate, generate, load_model
    from orchestrator.api.training import train
    from orchestrator.checkpoint.checkpoint import Checkpoint
    from orchestrator.config.compose import Composed
    from orchestrator.config.schema import RunConfig
    from orchestrator.strategies.dtensor import DTensorStrategy
    from orchestrator.strategies.xla import XlaStrategy
    from orchestrator.training.module import LanguageModule

__version__ = "0.1.0"

# name -> module that has it
_MODULES = {
    "Checkpoint": "checkpoint.checkpoint",
    "Composed": "config.compose",
    "DTensorStrategy": "strategies.dtensor",
    "LanguageModule": "training.module",
    "Run": "api.runs",
    "RunConfig": "config.schema",
    "XlaStrategy": "strategies.xla",
    "compare": "api.comparing",
    "compose": "api.configs",
    "evaluate": "api.trained_models",
    "generate": "api.trained_models",
    "load_model": "api.trained_models",
    "load_run": "api.runs",
    "plan": "api.planning",
    "rehearse": "api.rehearsing",
    "train": "api.training",
}
__all__ = [
    "Checkpoint",
    "Composed",
    "DTensorStrategy",
    "LanguageModule",
    "Run",
    "RunConfig",
    "XlaStrategy",
    "compare",
    "compose",
    "evaluate",
    "generate",
    "load_model",
    "load_run",
    "plan",
    "rehearse",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'orchestrator' has no attribute '{name}'")
    return getattr(importlib.import_module(f"orchestrator.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
