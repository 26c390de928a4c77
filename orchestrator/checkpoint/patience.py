"""How long an object store is waited for. Their libraries wait for minutes, some without end.

An operation is abandoned where it takes longer: its thread is left to end by itself, and nothing waits for it.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import Any

DEFAULT_SECONDS = 180.0
_LAST_SECONDS = 10.0
_limit = DEFAULT_SECONDS


def wait_for_stores(seconds: float) -> None:
    """Set how long this process waits for one operation of a store, all attempts together."""
    global _limit
    _limit = seconds


def store_timeout_seconds() -> float:
    """How long one operation of a store may take, all attempts together."""
    return _limit


class Patience:
    """What is left of the time of one operation, shared out among its attempts."""

    def __init__(self, attempts: int):
        self._attempts, self._deadline = attempts, time.monotonic() + _limit

    def attempt(self, action: Callable[[], Any]) -> Any:
        """What `action` returns; an attempt that fails at once leaves its time to the next ones.

        Raises:
            TimeoutError: it takes longer than its share.
            Exception: what `action` raises.
        """
        left = max(0.0, self._deadline - time.monotonic())
        share, self._attempts = left / max(1, self._attempts), self._attempts - 1
        return within(action, share)

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._deadline


def within(action: Callable[[], Any], seconds: float | None = None) -> Any:
    """What `action` returns, if it does so in time.

    Args:
        seconds: by default those of one operation.

    Raises:
        TimeoutError: it does not.
        Exception: what it raises.
    """
    seconds = _limit if seconds is None else seconds
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((action(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(errno.ETIMEDOUT, f"the store has not answered within {seconds:.3g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


class PatientFile:
    """A file of a store that is written, each step of it in time.

    Args:
        file: as `fsspec` opens it.
    """

    def __init__(self, file: Any):
        self._file = file

    def write(self, data: Any) -> None:
        within(lambda: self._file.write(data))

    def close(self) -> None:
        within(self._file.close)

    def discard(self) -> None:
        """End an upload in parts, for which a store that answers no more is not waited for long."""
        within(self._file.discard, min(_limit, _LAST_SECONDS))

    def abandon(self) -> None:
        """See to it that nothing makes an object of what there is: closing would, and so would the destructor."""
        self._file.closed = True
