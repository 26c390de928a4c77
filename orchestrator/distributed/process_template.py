"""Processes that need not import anything: forked from one that has imported it all and done nothing else.

An import of torch and its friends takes seconds of a processor, for each process, at each start. A template process
does it once for a launcher, and is asked over a socket for one process after the other. It has touched no device and
started no thread, so that what is forked from it is as if new. Linux alone: elsewhere, and where the template has gone,
processes are started as always.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, NoReturn

import psutil

from orchestrator import stopping

_BYTES = 1 << 17
_ANSWER_SECONDS = 120.0  # an import on a busy machine
_POLL_SECONDS = 0.1
_OF_THE_LAUNCHER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the template ends when the launcher does


class ForkedProcess:
    """A process of a template, with what of `subprocess.Popen` a launcher uses.

    Args:
        pid: of the process.
        look: notes which processes have ended, and how.
        ended: exit codes by pid.

    Attributes:
        stdout: what it prints, if that was asked for.
        stderr: likewise.
    """

    def __init__(self, pid: int, look: Callable[[], bool], ended: Mapping[int, int]):
        self.pid, self._look, self._ended = pid, look, ended
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, as `Popen.poll` does; None while it runs."""
        if self._code is None:
            there = self._look()
            self._code = self._ended.get(self.pid)
            if self._code is None and not there and not psutil.pid_exists(self.pid):
                self._code = -signal.SIGKILL  # nobody was left to be told
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended.

        Args:
            number: of the signal.
        """
        if self.poll() is None:
            os.kill(self.pid, number)


class ProcessTemplate:
    """A process that others are forked from.

    Args:
        command: program and arguments of the template; it calls `serve`. The number of its socket is appended.
        environment: environment variables, beside those of this process.
        silent: what the template itself prints is dropped.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], silent: bool):
        self._ended: dict[int, int] = {}
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        if sys.platform != "linux":
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if silent else None,
                stderr=subprocess.DEVNULL if silent else None,
                start_new_session=True,
            )
        except OSError:
            self.close()
        finally:
            theirs.close()

    def start(self, environment: Mapping[str, str], piped: bool) -> ForkedProcess | None:
        """Fork a process. Returns None where the template has gone, or this process was asked to stop meanwhile.

        Args:
            environment: variables, beside those of the template.
            piped: what it prints can be read from its `stdout` and `stderr`; otherwise it prints where this one does.
        """
        pipes = [os.pipe(), os.pipe()] if piped else []
        ends = [write for _, write in pipes] or [1, 2]
        pid = self._ask(json.dumps(dict(environment)).encode(), ends)
        for _, write in pipes:
            os.close(write)
        if pid is None:
            for read, _ in pipes:
                os.close(read)
            return None
        process = ForkedProcess(pid, self._look, self._ended)
        if piped:
            process.stdout, process.stderr = (os.fdopen(read, "rb") for read, _ in pipes)
        return process

    def _ask(self, message: bytes, ends: Sequence[int]) -> int | None:
        if self._socket is None:
            return None
        try:
            with self._lock:
                socket.send_fds(self._socket, [message], list(ends))
                deadline = time.monotonic() + _ANSWER_SECONDS
                while time.monotonic() < deadline and not stopping.requested():
                    if select.select([self._socket], [], [], _POLL_SECONDS)[0] and (pid := self._read()) is not None:
                        return pid
        except OSError:
            pass
        self.close()
        return None

    def _look(self) -> bool:
        """Note who has ended. Returns whether the template is there to tell."""
        with self._lock:
            try:
                while self._socket is not None and select.select([self._socket], [], [], 0)[0]:
                    self._read()
            except OSError:
                self.close()
        return self._socket is not None

    def _read(self) -> int | None:
        assert self._socket is not None
        data = self._socket.recv(_BYTES)
        if not data:
            raise ConnectionResetError
        answer = json.loads(data)
        if "ended" in answer:
            self._ended[answer["ended"]] = answer["code"]
            return None
        return int(answer["pid"])

    def close(self) -> None:
        """Let the template end."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            with contextlib.suppress(AttributeError, subprocess.TimeoutExpired):
                self._process.wait(0)


def serve(number: int, work: Callable[[], NoReturn]) -> None:
    """Be a template: fork a process for each request, and tell how each has ended, until the launcher has gone.

    Args:
        number: of the socket.
        work: what a forked process does, in the environment that was asked for.
    """
    launcher = socket.socket(fileno=number)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for ignored in _OF_THE_LAUNCHER:
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *unused: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    gc.collect()
    gc.freeze()  # or the first collection of each process copies all pages
    try:
        _serve(launcher, reader, writer, work)
    except OSError:
        pass  # the launcher has gone
    finally:
        # One that is killed last must not be told of through a socket that is closed.
        signal.set_wakeup_fd(-1)


def _serve(launcher: socket.socket, reader: socket.socket, writer: socket.socket, work: Callable[[], NoReturn]) -> None:
    while True:
        ready, _, _ = select.select([launcher, reader], [], [])
        if reader in ready:
            reader.recv(4096)
        _tell_ended(launcher)
        if launcher not in ready:
            continue
        message, ends, _, _ = socket.recv_fds(launcher, _BYTES, 2)
        if not message:
            return
        # What a new process is sent before it has its handlers waits for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_LAUNCHER)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)  # before its other end is closed
            for end in (launcher, reader, writer):
                end.close()
            _begin(json.loads(message), ends)
            work()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_LAUNCHER)
        for end_number in ends:
            os.close(end_number)
        try:
            launcher.send(json.dumps({"pid": pid}).encode())
        except OSError:  # nobody waits for it any more
            os.kill(pid, signal.SIGKILL)
            raise


def _tell_ended(launcher: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            launcher.send(json.dumps({"ended": found[0], "code": os.waitstatus_to_exitcode(found[1])}).encode())


def _begin(environment: Mapping[str, str], ends: Sequence[int]) -> None:
    """Become a process of its own, as one that was just started."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_LAUNCHER)
    for target, end in enumerate(ends, start=1):
        os.dup2(end, target)
        os.close(end)
    os.environ.update(environment)
