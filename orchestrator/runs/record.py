"""Keep run.json up to date while its run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.observe.sink import Channel, SideChannels
from orchestrator.runs import run_directory
from orchestrator.runs.messages import warn
from orchestrator.runs.time_book import TimeBook, booked

LAST_TRIES_SECONDS = 10.0
_POLL_SECONDS = 0.5


class Record:
    """Facts of a run and its legs, kept in run.json by the one process that writes there.

    Args:
        run_dir: where it is.
        facts: of the run, with the `legs` before this one.
        leg: of this start.
        channels: those of the run.
        main: whether this process may write.
        book: of the run's time.
        speaks: whether it writes now.

    Attributes:
        legs: all of the run, this one last.
    """

    def __init__(
        self,
        run_dir: Path,
        facts: Mapping[str, Any],
        leg: Mapping[str, Any],
        channels: SideChannels,
        main: bool,
        book: TimeBook | None = None,
        speaks: Callable[[], bool] = lambda: True,
    ):
        self._leg, self._speaks = dict(leg), speaks
        self.legs = [*facts["legs"], self._leg]
        self._facts = {key: value for key, value in facts.items() if key != "left_out"}
        self._book = book or TimeBook()
        self._channel: Channel[dict[str, Any]] | None = None
        if main:
            self._channel = channels.open(
                run_directory.RUN, lambda states: run_directory.write_run(run_dir, states[-1]), unit=None
            )

    def begin(self) -> None:
        """Set the run's status to `running`."""
        self._leg.setdefault("started", time.time())
        self._put({"status": "running"})

    def note(self, **facts: Any) -> None:
        """Add facts of this leg, which are written when it ends.

        Args:
            facts: by name.
        """
        self._leg.update(facts)

    def publish(self, **facts: Any) -> None:
        """Add facts of this leg, and write them now.

        Args:
            facts: by name.
        """
        self.note(**facts)
        self._put({"status": "running"})

    def end(self, status: str, step: int, left_out: list[str]) -> None:
        """Write how the run has ended. On a full disk this retries for some seconds.

        Args:
            status: finished, interrupted, pruned, failed or diverged.
            step: the last one.
            left_out: what a resume may still do.
        """
        self._book.ends_as = "waiting" if status == "failed" else "stopped"
        self._book.beat()  # for the report
        self._leg.update(ended=time.time(), end_step=step)
        self._put({"status": status, **({"left_out": left_out} if left_out else {})})
        if self._channel is None or not self._channel.waiting:
            return
        warn(f"the status '{status}' cannot be written to {run_directory.RUN}; trying for {LAST_TRIES_SECONDS:g} s")
        deadline = time.monotonic() + LAST_TRIES_SECONDS
        while self._channel.waiting and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            self._channel.retry(now=True)

    def _put(self, state: Mapping[str, Any]) -> None:
        if self._channel is not None and self._speaks():
            self._channel.put([booked({**self._facts, **state, "legs": self.legs}, self._book.book())])
