"""What happens between the steps of a run: saving, evaluation, and stopping on a signal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.training.callbacks.checkpointing import Checkpoints
    from orchestrator.training.callbacks.evaluation import Samples, Validation
    from orchestrator.training.callbacks.preemption import StopOnSignal
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "training.callbacks.checkpointing": ["Checkpoints"],
            "training.callbacks.evaluation": ["Samples", "Validation"],
            "training.callbacks.preemption": ["StopOnSignal"],
        },
    )

__all__ = [
    "Checkpoints",
    "Samples",
    "StopOnSignal",
    "Validation",
]
