"""A progress bar for long work other than training steps."""

from __future__ import annotations

import threading
from typing import Any

from orchestrator.output import is_printed


class Bar:
    """A progress bar on standard error, where that is a terminal. Thread-safe.

    Args:
        title: in front of the bar.
        total: amount of work; None where unknown.
        shown: whether it is to be shown.
        unit: of the work, such as `B` for bytes.
    """

    def __init__(self, title: str, total: int | None, shown: bool, unit: str = "B"):
        from tqdm import tqdm

        # disable=None: no bar where standard error is no terminal.
        hide = None if shown and is_printed() else True
        self._bar: Any = tqdm(desc=title, total=total, unit=unit, unit_scale=True, disable=hide, leave=False)
        self._lock = threading.Lock()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()

    def add(self, done: int) -> None:
        """Advance by `done`."""
        with self._lock:
            self._bar.update(done)

    def at(self, done: int, total: int) -> None:
        """Set the bar to `done` of `total`."""
        with self._lock:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
