"""What Python programs call: `orchestrator.train(...)` and its like, each in a module of this package.

Errors are exceptions of `orchestrator.errors`; lines for a person go to the logger `orchestrator`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.api.comparing import compare
    from orchestrator.api.configs import compose
    from orchestrator.api.planning import plan
    from orchestrator.api.rehearsing import Rehearsal, rehearse
    from orchestrator.api.runs import Run, load_run
    from orchestrator.api.trained_models import evaluate, generate, generate_many, load_model
    from orchestrator.api.training import train
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "api.comparing": ["compare"],
            "api.configs": ["compose"],
            "api.planning": ["plan"],
            "api.rehearsing": ["Rehearsal", "rehearse"],
            "api.runs": ["Run", "load_run"],
            "api.trained_models": ["evaluate", "generate", "generate_many", "load_model"],
            "api.training": ["train"],
        },
    )

__all__ = [
    "Rehearsal",
    "Run",
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
