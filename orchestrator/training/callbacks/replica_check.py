"""Ask every so many steps whether devices that must hold the same bits do: else one of them computes wrongly."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning

from orchestrator.distributed.lane import Lane
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.strategies.replicas import ReplicaComparison, compare


class Corrupted(Exception):
    """Devices that must hold the same bits do not. All ranks raise it at the same step.

    Args:
        step: after which it was found.
        good: the last step after which they did.
        found: what differs, and on which devices.
    """

    def __init__(self, step: int, good: int, found: ReplicaComparison):
        super().__init__(f"copies differ at step {step}")
        self.step, self.good, self.found = step, good, found


class ReplicaCheck(lightning.Callback):
    """Compares the copies of weights and optimizer state, before anything of the step is saved.

    Args:
        parallel: the strategy.
        every: steps between two checks; None: there are none.
        step: optimizer steps completed. What was restored or initialised is the same on all devices.
        lane: to the other processes; None where there are no checks.
        say: prints a line.

    Attributes:
        good: the last step after which the copies were the same.
        seconds: that each check has taken.
    """

    def __init__(
        self,
        parallel: ParallelStrategy,
        every: int | None,
        step: int,
        lane: Lane | None,
        say: Callable[[str], None],
    ):
        self._parallel, self._every, self._lane, self._say = parallel, every, lane, say
        self.good = step
        self.seconds: list[float] = []

    @property
    def trusted_step(self) -> int | None:
        """The last step whose checkpoint is beyond doubt; None where copies are not compared."""
        return self.good if self._lane is not None else None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Compare where a period ends."""
        if self._every and pl_module.step % self._every == 0:
            self._check(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Compare before the last save."""
        if pl_module.step > self.good:
            self._check(pl_module)

    def rewind(self, step: int) -> None:
        """Begin again at a step that was restored.

        Args:
            step: optimizer steps completed.
        """
        self.good = step

    def _check(self, pl_module: Any) -> None:
        if self._lane is None:
            return
        begin = time.perf_counter()
        parts = self._parallel.held_parts(pl_module.model, pl_module.optimizer)
        found = compare(parts, self._lane, socket.gethostname())
        self.seconds.append(time.perf_counter() - begin)
        if found.suspects:
            raise Corrupted(pl_module.step, self.good, found)
        self.good = pl_module.step
        if not found.compared:
            self._lane = None
            self._say(
                "warning: train.check_replicas_every finds nothing to compare: on this layout no two devices hold the "
                "same part of the weights or of the optimizer's state (layout.replicate=2 would be two copies)"
            )
