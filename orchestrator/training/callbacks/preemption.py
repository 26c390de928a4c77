"""Stop on a signal, at a step boundary that all ranks agree on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning

from orchestrator import stopping
from orchestrator.distributed.coordinator import Vote
from orchestrator.strategies.parallel_strategy import ParallelStrategy


class StopOnSignal(lightning.Callback):
    """Ends training cleanly after SIGTERM or SIGINT to any rank.

    After each step the ranks vote without waiting: the answer of one step is read at the end of the next, so no step
    waits for the slowest rank's signal state.

    Args:
        parallel: the strategy.
        say: prints a line, on the rank that speaks for all.

    Attributes:
        stopped: the signal that ended the training, the same on all ranks; 0 where none did.
    """

    def __init__(self, parallel: ParallelStrategy, say: Callable[[str], None]):
        self._parallel, self._say = parallel, say
        self._vote: Vote | None = None
        self.stopped = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Read the vote of the previous step, and start the next one."""
        if self._vote is not None and (number := self._vote.result()):
            self.stopped = number
            trainer.should_stop = True
            if not stopping.requested():
                self._say(f"stopping   {signal.Signals(number).name} to another process of the job")
        self._vote = self._parallel.start_vote(self._parallel.heard(stopping.requested()))

    def ask(self) -> int:
        """Return the signal that asked any rank to stop; 0 where none did. All ranks call it, after the training."""
        self.stopped = self.stopped or self._parallel.start_vote(stopping.requested()).result()
        return self.stopped

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for the last vote."""
        # The last vote is still under way; its collective must not outlive the process group.
        if self._vote is not None:
            self._vote.result()
            self._vote = None
