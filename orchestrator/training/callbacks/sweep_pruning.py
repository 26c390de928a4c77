"""End a run of a sweep early that falls behind the others, as its sweep's pruner says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning

from orchestrator.runs.messages import warn
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.sweeps.running_trial import RunningTrial, is_trial
from orchestrator.training.callbacks.evaluation import Validation


class SweepPruning(lightning.Callback):
    """Reports each validation loss to the sweep, and ends the run where the sweep has no more use for it.

    Rank 0 asks; all ranks do what it hears. A study that cannot be written or read ends no training.

    Args:
        parallel: the strategy.
        evaluation: whose losses are reported; it has to see a step before this one does.
        max_steps: of the run; after the last one there is nothing to end.
        say: prints a line.

    Attributes:
        pruned: the run was ended.
    """

    def __init__(self, parallel: ParallelStrategy, evaluation: Validation, max_steps: int, say: Callable[[str], None]):
        self._parallel, self._evaluation, self._max_steps, self._say = parallel, evaluation, max_steps, say
        self._trial: RunningTrial | None = None
        self._asks, self.pruned = is_trial(), False
        if self._asks and parallel.rank == 0:
            self._trial = self._guarded(RunningTrial.of, None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Report what was evaluated after this step, if anything was."""
        step, loss = self._evaluation.latest
        if not self._asks or step != pl_module.step or step >= self._max_steps:
            return
        trial = self._trial
        behind = trial is not None and self._guarded(lambda: trial.report(step, loss), False)
        if self._parallel.broadcast(behind):
            self.pruned = trainer.should_stop = True
            self._say(f"pruned     validation loss {loss:.4f} at step {step} falls behind the sweep's other runs")

    def _guarded(self, ask: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return ask()
        except Exception as error:
            warn(f"the sweep cannot be asked whether the run falls behind, so it goes on: {error!r}")
            return otherwise
