"""Time limits for object stores, whose libraries wait for minutes, some without end.

An operation that takes longer is cancelled: what its library would still send is not sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import gcs

DEFAULT_SECONDS = 180.0
_ATTEMPTS, _PAUSE_SECONDS = 3, 0.5
_LAST_SECONDS = 10.0
_UNWIND_SECONDS = 1.0
# Of the limit: an attempt has a third, in which a connection and an answer fit twice.
_CONNECT_SHARE, _READ_SHARE, _LEAST_SECONDS = 1 / 18, 1 / 6, 1.0
# What trying again does not change.
FINAL = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_limit = DEFAULT_SECONDS


def wait_for_stores(seconds: float) -> None:
    """Set the time limit of one operation of a store, all attempts together.

    Args:
        seconds: of waiting, at most.
    """
    global _limit
    _limit = seconds


def store_timeout_seconds() -> float:
    """How long one operation of a store may take, all attempts together."""
    return _limit


def client_options(scheme: str) -> dict[str, Any]:
    """Return the time limits of a store's client for connections and reads, as options of its `fsspec` class.

    What the user has set for `fsspec` counts more. The number of attempts is bounded by the libraries themselves.

    Args:
        scheme: of the store's URLs, such as `s3`.
    """
    connect, read = (max(_LEAST_SECONDS, share * _limit) for share in (_CONNECT_SHARE, _READ_SHARE))
    if scheme in ("s3", "s3a"):
        return _unless_set(scheme, "config_kwargs", {"connect_timeout": connect, "read_timeout": read})
    if scheme in gcs.SCHEMES:
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=connect, sock_read=read)
        # With each request it says anew how long to wait: without end, unless told.
        requests = _settings(scheme).get("requests_timeout", timeout)
        return {"requests_timeout": requests, **_unless_set(scheme, "session_kwargs", {"timeout": timeout})}
    return {}


def _settings(scheme: str) -> Mapping[str, Any]:
    from fsspec.config import conf

    found: Mapping[str, Any] = conf.get(scheme, {})
    return found


def _unless_set(scheme: str, option: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    theirs = _settings(scheme).get(option, {})
    return {option: {**ours, **theirs}} if isinstance(theirs, Mapping) else {}


def retried(action: Callable[[], Any], operation: str, path: Path) -> Any:
    """Call `action`; retry it a few times after an error of the store, as long as the operation's time lasts.

    Args:
        action: what to do; called again as a whole.
        operation: list, read, write, commit or remove, for the error.
        path: of the store, for the error.

    Returns:
        What `action` returns.

    Raises:
        TimeoutError: the store has not answered in time.
        OSError: it keeps failing; whatever a store's library raises is one.
    """
    deadline = time.monotonic() + _limit
    for attempt in range(_ATTEMPTS):
        # One that fails at once leaves its time to the next ones.
        share = max(0.0, deadline - time.monotonic()) / (_ATTEMPTS - attempt)
        try:
            return within(action, share)
        except NotImplementedError:
            raise
        except Exception as error:
            said = as_os_error(error)
            if isinstance(said, FINAL) or attempt == _ATTEMPTS - 1 or time.monotonic() >= deadline:
                raise (_silent(operation, path) if isinstance(error, _Late) else said) from error
            time.sleep(_PAUSE_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


def as_os_error(error: Exception) -> OSError:
    """Return the system's error that an error of a store's library stands for.

    Args:
        error: what was raised.
    """
    said = gcs.understood(error) or error
    return said if isinstance(said, OSError) else OSError(f"{type(said).__name__}: {said}")


def within(action: Callable[[], Any], seconds: float) -> Any:
    """Call `action` and return its result; cancel what it has its library do when the time is over.

    Args:
        action: the operation.
        seconds: the time limit.

    Raises:
        TimeoutError: it does not.
        Exception: what it raises.
    """
    outcome: list[tuple[Any, BaseException | None]] = []
    call = _Call()

    def run() -> None:
        _CALL.set(call)
        try:
            outcome.append((action(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    # What ends from here on ends because it is cancelled, and counts for nothing.
    if not outcome:
        call.cancel()
        thread.join(_UNWIND_SECONDS)
        raise _Late(errno.ETIMEDOUT, f"the store has not answered within {seconds:.3g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


class _Late(TimeoutError):
    """An attempt took longer than its share."""


def _silent(operation: str, path: Path, seconds: float | None = None) -> TimeoutError:
    seconds = _limit if seconds is None else seconds
    return TimeoutError(
        errno.ETIMEDOUT,
        f"the store has not answered within {seconds:g} s ({operation} {path}; "
        f"checkpoint.store_timeout_seconds sets how long it is waited for)",
    )


class _Call:
    """An operation, and what a store's library runs for it in the event loop of `fsspec`.

    Without a stop there, a library goes on trying when the caller has given up: an object could appear late.
    """

    def __init__(self) -> None:
        from fsspec.asyn import get_loop

        self._loop: asyncio.AbstractEventLoop = get_loop()
        self._lock = threading.Lock()
        self._tasks: list[asyncio.Task[Any]] = []
        self._over = False
        if self._loop.get_task_factory() is None:
            self._loop.set_task_factory(_make_task)

    def follow(self, task: asyncio.Task[Any]) -> None:
        """Cancel `task` with the operation. Called in the event loop."""
        with self._lock:
            self._tasks = [one for one in self._tasks if not one.done()] + [task]
            over = self._over
        if over:
            task.cancel()

    def cancel(self) -> None:
        with self._lock:
            self._over, tasks = True, list(self._tasks)
        for task in tasks:
            self._loop.call_soon_threadsafe(task.cancel)


_CALL: ContextVar[_Call | None] = ContextVar("call", default=None)


def _make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    task = asyncio.Task(coroutine, loop=loop, **options)
    call = _CALL.get()
    # What a task starts, it cancels itself. A task that others wait for as well must outlive it.
    if call is not None and asyncio.current_task(loop) is None:
        call.follow(task)
    return task


class PatientFile:
    """A file of a store that is being written, with a time limit on each operation.

    Args:
        file: as `fsspec` opens it.
        path: of it, for errors.
    """

    def __init__(self, file: Any, path: Path):
        self._file, self._path = file, path

    def write(self, data: Any) -> None:
        """Write bytes-like `data`, within the time limit of the store."""
        self._within(lambda: self._file.write(data), _limit)

    def close(self) -> None:
        """Close the file, within the time limit of the store."""
        self._within(self._file.close, _limit)

    def give_up(self) -> None:
        """End an upload in parts, for which a store that answers no more is not waited for long."""
        with contextlib.suppress(Exception):
            within(self._file.discard, min(_limit, _LAST_SECONDS))
        # Nothing makes an object of what there is: closing would, and so would the destructor.
        with contextlib.suppress(Exception):
            self._file.closed = True

    def _within(self, action: Callable[[], Any], seconds: float) -> None:
        try:
            within(action, seconds)
        except _Late as error:
            raise _silent("write", self._path) from error


def briefly(action: Callable[[], Any]) -> Any:
    """Call `action` and return its result, without waiting long for a store that may not answer any more.

    Raises:
        Exception: what it raises, or that it took too long.
    """
    return within(action, min(_limit, _LAST_SECONDS))
