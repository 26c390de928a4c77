"""Train one language model on whatever accelerators you can get, from one configuration.

    import orchestrator

    run = orchestrator.train(["model=tiny", "train.max_steps=100"])
    print(run.status, run.metrics[-1]["loss"])

Every run is described by one Hydra configuration (`orchestrator.config`), sharded through one strategy interface
(`orchestrator.strategies`) and saved in checkpoints that move between vendors (`orchestrator.checkpoint`). Nothing is
imported before it is used: `import orchestrator` does not import torch. See docs/python.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.api.comparing import compare
    from orchestrator.api.configs import compose
    from orchestrator.api.planning import plan
    from orchestrator.api.rehearsing import rehearse
    from orchestrator.api.runs import Run, load_run
    from orchestrator.api.trained_models import evaluate, generate, generate_many, load_model
    from orchestrator.api.training import train
    from orchestrator.checkpoint.checkpoint import Checkpoint
    from orchestrator.config.compose import Composed
    from orchestrator.config.schema import RunConfig
    from orchestrator.strategies.dtensor import DTensorStrategy
    from orchestrator.strategies.xla import XlaStrategy
    from orchestrator.training.data_module import TokenDataModule
    from orchestrator.training.module import LanguageModule
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "api.comparing": ["compare"],
            "api.configs": ["compose"],
            "api.planning": ["plan"],
            "api.rehearsing": ["rehearse"],
            "api.runs": ["Run", "load_run"],
            "api.trained_models": ["evaluate", "generate", "generate_many", "load_model"],
            "api.training": ["train"],
            "checkpoint.checkpoint": ["Checkpoint"],
            "config.compose": ["Composed"],
            "config.schema": ["RunConfig"],
            "strategies.dtensor": ["DTensorStrategy"],
            "strategies.xla": ["XlaStrategy"],
            "training.data_module": ["TokenDataModule"],
            "training.module": ["LanguageModule"],
        },
    )

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "Composed",
    "DTensorStrategy",
    "LanguageModule",
    "Run",
    "RunConfig",
    "TokenDataModule",
    "XlaStrategy",
    "compare",
    "compose",
    "evaluate",
    "generate",
    "generate_many",
    "load_model",
    "load_run",
    "plan",
    "rehearse",
    "train",
]
