"""Say and record which copies of the model take part in the training, where one of them may be lost and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import lightning.pytorch as lightning

from orchestrator.strategies.model_copies import CopyChange
from orchestrator.strategies.parallel_strategy import ParallelStrategy


class CopyWatch(lightning.Callback):
    """Notices after each step whether other copies took part in it than in the one before.

    Args:
        parallel: the strategy.
        say: prints a line, in the process that speaks.

    Attributes:
        record: keeps facts of this leg in run.json, at once.
    """

    def __init__(self, parallel: ParallelStrategy, say: Callable[[str], None]):
        self._parallel, self._say = parallel, say
        self._known: int | None = None
        self.record: Callable[..., None] = lambda **facts: None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Compare with what was known."""
        changes, copies = self._parallel.changes, self._parallel.job_layout.replicate
        first = self._known is None
        if len(changes) == self._known or (first and not self._parallel.replaceable):
            return
        self._known = len(changes)
        facts = [asdict(change) for change in changes]
        self.record(replica_groups={"count": copies, "missing_share": "not trained on", "changes": facts})
        if changes and not first:
            self._say(f"step {changes[-1].step}: {describe(changes[-1], copies)}")


def describe(change: CopyChange, copies: int) -> str:
    """Describe who takes part.

    Args:
        change: the last one.
        copies: of the run.
    """
    came = f"replica group {_listed(change.came)} is back; " if change.came else ""
    if len(change.present) == copies:
        return f"{came}all {copies} take part"
    missing = _listed(number for number in range(copies) if number not in change.present)
    return f"{came}replica group {missing} of {copies} is lost; until it is back its share of a step is not trained on"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
