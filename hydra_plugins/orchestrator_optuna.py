"""Hydra's plugin `hydra/sweeper=optuna`. Hydra imports the modules of this namespace wherever it runs, so: no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction


class OptunaSweeper(Sweeper):
    """Hands all over to `orchestrator.config.optuna_sweeper`.

    Args:
        **settings: keys of `hydra.sweeper`.
    """

    def __init__(self, **settings: Any):
        from orchestrator.config.optuna_sweeper import TrialSweeper

        self._sweeper = TrialSweeper(settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: Any) -> None:
        """Take what Hydra gives."""
        self._sweeper.setup(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials."""
        self._sweeper.sweep(arguments)
