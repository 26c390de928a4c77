"""The processes of a run with islands on this machine, each started again where it is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from orchestrator.distributed import process_guard
from orchestrator.distributed.local_processes import Hear
from orchestrator.errors import DIVERGED, DONE, MISTAKE, STOPPED
from orchestrator.launch.group_launcher import hear_lines
from orchestrator.launch.restarts import MAX_BACKOFF_SECONDS

Process = subprocess.Popen[bytes]


@dataclass
class Kept:
    """A process that is started again where it is lost.

    Attributes:
        name: of it, for people.
        start: starts it.
        newest: what it has saved last: with another save its failures are counted anew.
        restarts: failures in a row after which it stays away.
        backoff_seconds: before the first restart; doubled for each further one.
        process: None while it waits for its restart, or has ended.
        due: when it is started again; None: never.
        failures: in a row.
        code: with which it has ended for good; None: it has not.
    """

    name: str
    start: Callable[[], Process]
    newest: Callable[[], object]
    restarts: int
    backoff_seconds: float
    process: Process | None = None
    due: float | None = None
    failures: int = 0
    code: int | None = None
    _saved: object = None
    _guard: Process | None = field(default=None, repr=False)

    @property
    def runs(self) -> bool:
        """Whether it is there."""
        return self.process is not None and self.process.poll() is None

    @property
    def goes_on(self) -> bool:
        """Whether it is there, or will be again."""
        return self.code is None

    def begin(self) -> None:
        """Start it."""
        self.due, self.process = None, self.start()
        self._guard = guard(self.process)

    def look(self, now: float, stopping: bool) -> str:
        """See what has become of it, and start it again where that is due.

        Args:
            now: by `time.monotonic`.
            stopping: the run was asked to stop: nothing is started again.

        Returns:
            What is to be said; empty: nothing.
        """
        if self.process is None:
            if self.due is not None and stopping:
                self.due, self.code = None, STOPPED[1]
            elif self.due is not None and now >= self.due:
                self.begin()
            return ""
        code = self.process.poll()
        if code is None:
            return ""
        self.process = None
        self._end_guard()
        if code in (DONE, MISTAKE, DIVERGED, *STOPPED) or stopping:
            self.code = code if code >= 0 else 128 - code
            return ""
        return self._lost(code, now)

    def _lost(self, code: int, now: float) -> str:
        saved = self.newest()
        self.failures = 1 if saved != self._saved else self.failures + 1
        self._saved = saved
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
        if self.failures > self.restarts:
            self.code = code if code >= 0 else 128 - code
            return f"{self.name} {how}, and stays away: {self.failures} times in a row without a new save"
        wait = min(MAX_BACKOFF_SECONDS, self.backoff_seconds * 2.0 ** (self.failures - 1))
        self.due = now + wait
        return f"{self.name} {how}; it is started again in {wait:g} s ({self.failures} of {self.restarts})"

    def send(self, number: int) -> None:
        """Send the signal `number`, if the process is there."""
        if self.process is not None and self.runs:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def kill(self) -> None:
        """End it and what it has started, at once."""
        if self.process is not None and self.runs:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        child.kill()
            self.process.kill()
            self.process.wait()
        self._end_guard()

    def _end_guard(self) -> None:
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()
            self._guard = None


def spawn(
    command: Sequence[str],
    variables: Mapping[str, str],
    output: Path | None = None,
    piped: bool = False,
    hear: Hear | None = None,
) -> Process:
    """Start a process in a session of its own.

    Args:
        command: program and arguments.
        variables: of its environment, beside those of this one.
        output: file that what it prints is added to; None: it prints where this one does.
        piped: its standard input is a pipe that ends with this process.
        hear: called with each line that it prints; None: as `output` says.
    """
    stdin = subprocess.PIPE if piped else subprocess.DEVNULL
    environment = {**os.environ, **variables}
    if output is None:
        pipe = subprocess.PIPE if hear else None
        process = subprocess.Popen(
            command, env=environment, stdin=stdin, stdout=pipe, stderr=pipe, start_new_session=True
        )
        if hear:
            hear_lines(process, hear)
        return process
    with open(output, "ab") as file:
        return subprocess.Popen(
            command, env=environment, stdin=stdin, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def guard(process: Process) -> Process:
    """Start what ends a process, with time to save, should this one be killed.

    Args:
        process: to be ended then.
    """
    words: list[Any] = [sys.executable, "-I", "-S", process_guard.__file__, str(process.pid)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)


def wait_for(processes: Sequence[Kept], seconds: float, insisted: Callable[[], bool]) -> None:
    """Wait until processes have ended, then ask them to, then make them.

    Args:
        processes: of the run.
        seconds: that each step of this takes at most.
        insisted: whether somebody wants them to be ended at once.
    """
    for number in (0, signal.SIGTERM, signal.SIGKILL):
        for one in processes:
            if number == signal.SIGKILL:
                one.kill()
            elif number:
                one.send(number)
        deadline = time.monotonic() + seconds
        while any(one.runs for one in processes) and time.monotonic() < deadline and not insisted():
            time.sleep(0.1)
    for one in processes:
        one.look(time.monotonic(), True)
