"""Side channels: outputs of a run for people. A failure of one is reported and never ends the run.

Metrics, samples, TensorBoard, W&B, run.json and the lines on the terminal all go through a `Channel`. It hands what it
is given to a function that writes. Where that raises (a full disk, a quota, a reader that has gone) the items wait, the
fault is said once, and later calls try again; so a row is lost only where a fault lasts beyond `limit` rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")
ROWS_KEPT = 10_000
_SHARE_OF_TIME = 10.0  # the pause after a failed attempt is so many times what that took: W&B may wait for a minute
_PAUSE_SECONDS = (1.0, 60.0)


class Channel(Generic[T]):
    """Passes items in order to a sink that may fail, and never raises. Thread-safe.

    Args:
        name: of the sink, for messages.
        write: writes some items, all of them or none; raises any exception where it cannot.
        warn: told when the sink begins to fail, when it works again, and at the end what was lost.
        unit: what the items are called in messages; None where each one replaces those before it.
        limit: items that wait at most; the oldest are dropped for newer ones, and counted.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Sequence[T]], object],
        warn: Callable[[str], object],
        unit: str | None = "rows",
        limit: int = ROWS_KEPT,
    ):
        self._name, self._write, self._warn, self._unit = name, write, warn, unit
        self._waiting: deque[T] = deque(maxlen=limit if unit else 1)
        self._lock = threading.RLock()  # a warning may come back here, and so may a signal's handler
        self._writing = False
        self._next_try = 0.0
        self.dropped = 0
        self.problem: Exception | None = None

    @property
    def waiting(self) -> int:
        """Items that could not be written yet."""
        return len(self._waiting)

    def put(self, items: Iterable[T]) -> None:
        """Write `items` after those that wait, or let them wait, too."""
        with self._lock:
            for item in items:
                self.dropped += len(self._waiting) == self._waiting.maxlen
                self._waiting.append(item)
            self.retry()

    def retry(self, now: bool = False) -> None:
        """Try to write what waits, unless the last attempt was a moment ago.

        Args:
            now: try even then.
        """
        with self._lock:
            if not self._waiting or self._writing or (self.problem and not now and time.monotonic() < self._next_try):
                return
            self._writing, begin, items = True, time.monotonic(), list(self._waiting)
            try:
                self._write(items)
            except Exception as error:
                self._failed(error, time.monotonic() - begin)
            else:
                for _ in items:
                    self._waiting.popleft()
                self._worked(len(items))
            finally:
                self._writing = False

    def close(self) -> None:
        """Try once more, and say what is lost."""
        with self._lock:
            self.retry(now=True)
            lost = self.dropped + (len(self._waiting) if self.problem else 0)
            if self._unit and lost:
                self._warn(f"{self._name}: {lost} {self._unit} are lost: {reason(self.problem)}")
            elif not self._unit and self.problem:
                self._warn(f"{self._name} could not be written to the end: {reason(self.problem)}")
            self._waiting.clear()
            self.dropped, self.problem = 0, None

    def _failed(self, error: Exception, seconds: float) -> None:
        least, most = _PAUSE_SECONDS
        self._next_try = time.monotonic() + min(most, max(least, _SHARE_OF_TIME * seconds))
        first, self.problem = self.problem is None, error
        if first:
            kept = f", the last {self._waiting.maxlen:,} {self._unit} are kept" if self._unit else ""
            self._warn(f"{self._name} cannot be written: {reason(error)}; the run goes on{kept} and it is tried again")

    def _worked(self, count: int) -> None:
        if self.problem is None:
            return
        self.problem = None
        text = f"{self._name} is written again"
        if self._unit:
            text += f", with {count} {self._unit} that waited"
            text += f"; {self.dropped} {self._unit} are lost" if self.dropped else ""
        self._warn(text)
        self.dropped = 0


class SideChannels:
    """All the side channels of a run.

    Args:
        warn: as of `Channel`.
    """

    def __init__(self, warn: Callable[[str], object]):
        self._warn = warn
        self._channels: list[Channel[Any]] = []
        self._closers: list[Callable[[], object]] = []

    def open(
        self,
        name: str,
        write: Callable[[Sequence[Any]], object],
        *,
        unit: str | None = "rows",
        close: Callable[[], object] | None = None,
    ) -> Channel[Any]:
        """Open a channel; `close` is called when the run ends, and may fail as `write` may.

        Args:
            name: for messages.
            write: called with what was put into the channel.
            unit: what is written, for messages; None: not counted.
            close: called when the run ends; None: nothing.
        """
        channel: Channel[Any] = Channel(name, write, self._warn, unit)
        self._channels.append(channel)
        if close is not None:
            self._closers.append(close)
        return channel

    def retry(self) -> None:
        """Try again what could not be written."""
        for channel in self._channels:
            channel.retry()

    def close(self) -> None:
        """Write what can be written, and say what is lost."""
        for channel in self._channels:
            channel.close()
        for closer in self._closers:
            try:
                closer()
            except Exception as error:
                self._warn(f"a side channel could not be closed: {reason(error)}")
        self._channels, self._closers = [], []


def reason(error: BaseException | None) -> str:
    """Return an exception in a few words, for a message.

    Args:
        error: the exception.
    """
    text = getattr(error, "strerror", None) or (str(error).partition("\n")[0] if error else "") or repr(error)
    return str(text)[:300]


class Appended:
    """A file that is appended to by whole pieces: one that does not fit leaves nothing behind. Opened for each piece.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: Path):
        self._path = path

    def append(self, data: bytes, newline_before: bool = False) -> None:
        """Write `data` at the end.

        Args:
            data: whole lines.
            newline_before: where a line was cut by a crash, begin a new one.

        Raises:
            OSError: nothing was written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(file).st_size
            if newline_before and size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            try:
                write_all(file, data)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, size)
                raise
        finally:
            os.close(file)


class JsonLines:
    """Writes a row of JSON per line.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self._file = Appended(path)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows.

        Args:
            rows: by rising step.

        Raises:
            OSError: none was.
        """
        self._file.append(
            b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows), newline_before=True
        )


def write_all(file: int, data: bytes) -> None:
    """Write all of `data` to a file descriptor.

    Args:
        file: the file descriptor.
        data: what to write.

    Raises:
        OSError: some of it, or nothing, was written.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
