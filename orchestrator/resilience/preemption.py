"""Stopping on a signal at a step boundary that all ranks agree on."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as lightning

from orchestrator.strategies.base import ParallelStrategy
from orchestrator.strategies.council import Vote

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(lightning.Callback):
    """Ends training cleanly after SIGTERM or SIGINT to any rank; a second signal of the kind ends the process.

    The handler only sets a flag. After each step the ranks vote without waiting: the answer of one step is
    read at the end of the next, so no step waits for the slowest rank's signal state.
    """

    def __init__(self, parallel: ParallelStrategy):
        self._parallel = parallel
        self._vote: Vote | None = None
        self._previous: dict[int, Any] = {}
        self.received: str | None = None
        self.stopped = False

    def install(self) -> None:
        """Take over the signals; they may arrive from now on, before the first step too."""
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number).name

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Lightning's own handler broadcasts from inside the handler and raises without saving.
        trainer._signal_connector.register_signal_handlers = lambda: None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        if self._vote is not None and self._vote.result():
            self.stopped = True
            trainer.should_stop = True
        self._vote = self._parallel.start_vote(self.received is not None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        # The last vote is still under way; its collective must not outlive the process group.
        if self._vote is not None:
            self._vote.result()
            self._vote = None
