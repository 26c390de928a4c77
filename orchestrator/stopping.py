"""Requests to stop, by SIGINT or SIGTERM: acknowledged at once, obeyed at a boundary, counted once.

SIGUSR1 means the same as SIGTERM: it is what Slurm's `--signal=USR1@SECONDS` sends, and its default would be to kill.

No other module is imported here, so that the handlers can be in place before anything that takes time.

One request may be delivered several times: a terminal sends Ctrl-C to all processes of a group, and a launcher passes
on what it got. So the first signal is the request, and those that follow say the same again. Only a second SIGINT, from
somebody who has waited for `GRACE_SECONDS`, asks for more: to end at once. A repeated SIGTERM does not: engines that
have lost their patience send SIGKILL.

Python runs a handler between two operations of the main thread, which may be minutes away (a collective, a compiler).
A thread therefore reads the signals from a pipe that Python's own C handler writes to, acknowledges them, and ends the
process where that is asked for.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 3.0


class Stopped(BaseException):
    """The process was asked to stop while nothing has to be completed first.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = exit_code(number)


def exit_code(number: int) -> int:
    """Return the exit code of a process that a signal has ended: 130 for SIGINT, 143 for SIGTERM.

    Args:
        number: of the signal.
    """
    return 128 + number


class _Request:
    """What this process has been asked.

    Attributes:
        number: of the first signal; 0 as long as there was none.
        taken: when that came, by `time.monotonic`.
        grace: seconds from then until the process is ended.
        insisted: a second SIGINT came after the time of grace.
        deferred: a signal is only noted.
        watched: the main thread looks for `insisted` itself.
    """

    def __init__(self) -> None:
        self.pipe: tuple[socket.socket, socket.socket] | None = None
        self.lock = threading.Lock()
        self.reset()

    def reset(self, announce: bool = False) -> None:
        self.number = 0
        self.insisted = self.deferred = self.watched = self.raised = False
        self.announce = announce
        self.first_interrupt: float | None = None
        self.taken: float | None = None
        self.grace: float | None = None

    def take(self, number: int) -> None:
        """Note a signal; the first one is acknowledged."""
        meant = signal.SIGTERM if number == signal.SIGUSR1 else number
        with self.lock:
            first, self.number = not self.number, self.number or meant
            self.taken = time.monotonic() if first else self.taken
        if first and self.announce:
            _say(_acknowledgement(number, self.deferred))


_request = _Request()


def requested() -> int:
    """Return the signal that asked this process to stop; 0 where none did."""
    return _request.number


def allow(seconds: float | None) -> None:
    """Set how long this process lives after a request to stop; of several such times the shortest counts.

    Args:
        seconds: from the request on, after which whoever asked ends the process; None: it is not known.
    """
    if seconds is not None:
        _request.grace = seconds if _request.grace is None else min(_request.grace, seconds)


def seconds_left() -> float | None:
    """Return how long this process still lives; None where it was not asked to stop or nobody has said how long.

    It may be negative: the time is over, and the process still there.
    """
    if _request.taken is None or _request.grace is None:
        return None
    return _request.taken + _request.grace - time.monotonic()


def insisted() -> bool:
    """Whether Ctrl-C was pressed again to end at once."""
    return _request.insisted


def check() -> None:
    """Stop here, if that was asked for.

    Raises:
        Stopped: it was.
    """
    if _request.number:
        _request.raised = True
        raise Stopped(_request.number)


@contextmanager
def listening(announce: bool = True) -> Iterator[None]:
    """Take over SIGINT and SIGTERM. Where nothing else is said (`deferred`) they raise `Stopped` in the main thread.

    Within another `listening` the handlers are put into place again, whatever has replaced them. Outside of the main
    thread nothing can be done and a signal keeps its meaning.

    Args:
        announce: acknowledge a request on standard error. One process of a job does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _request.pipe is not None:
        _take_over(_request.pipe[1])
        yield
        return
    _request.reset(announce)
    previous = [(number, signal.getsignal(number)) for number in SIGNALS]
    reader, writer = _request.pipe = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True)
    thread.start()
    before = _take_over(writer)
    try:
        yield
    finally:
        _request.pipe = None
        for number, handler in previous:
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join(1.0)
        reader.close()
        _request.reset()  # what was asked for is done: the next run of this process has not been asked


@contextmanager
def deferred(watched: bool = False) -> Iterator[None]:
    """Only note a signal, for who asks `requested` at the next boundary.

    Args:
        watched: the caller asks for `insisted`, too, and ends the process then.
    """
    with _as(deferred=True, watched=watched):
        yield


@contextmanager
def at_once() -> Iterator[None]:
    """Within `deferred`: a signal raises `Stopped` after all."""
    with _as(deferred=False, watched=_request.watched):
        yield


@contextmanager
def _as(**values: bool) -> Iterator[None]:
    before = {name: getattr(_request, name) for name in values}
    vars(_request).update(values)
    try:
        yield
    finally:
        vars(_request).update(before)


def _take_over(writer: socket.socket) -> int:
    for number in SIGNALS:
        signal.signal(number, _handle)
    return signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)


def _handle(number: int, frame: FrameType | None) -> None:
    _request.take(number)
    # Once: what follows must not tear the work of the clean-up.
    if not _request.deferred and not _request.raised:
        check()


def _listen(reader: socket.socket) -> None:
    with suppress(OSError):
        while data := reader.recv(64):
            for number in data:
                if number in SIGNALS:
                    _heard(number)


def _heard(number: int) -> None:
    _request.take(number)
    if number != signal.SIGINT:
        return
    now = time.monotonic()
    if _request.first_interrupt is None:
        _request.first_interrupt = now
    elif now - _request.first_interrupt >= GRACE_SECONDS:
        _request.insisted = True
        if not _request.watched:
            if _request.announce:
                _say("ended at once")
            os._exit(exit_code(number))


def _acknowledgement(number: int, deferred: bool) -> str:
    name, again = signal.Signals(number).name, ""
    if number == signal.SIGINT:
        ending = "to end without saving" if deferred else "to end at once"
        again = f"; press Ctrl-C again after {GRACE_SECONDS:g} s {ending}"
    return f"stopping   {name}: {'at the next step, and saving' if deferred else 'in start-up'}{again}"


def _say(text: str) -> None:
    # Not by print: the handler may have interrupted one. A terminal shows ^C or a bar in the line.
    start = "\n" if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{start}{text}\n".encode())


def _forget() -> None:
    """In a forked child: the pipe and the requests are its parent's."""
    if _request.pipe is None:
        return
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    _request.pipe = None
    _request.reset()


os.register_at_fork(after_in_child=_forget)


def end_process(code: int) -> NoReturn:
    """End a process whose work is done, saved and closed: run what libraries do at exit, and no more.

    Taking the interpreter down would let threads of native libraries abort it now and then ("terminate called without
    an active exception"), and a finished run would count as failed.

    Args:
        code: exit code of the process.
    """
    atexit._run_exitfuncs()  # such as torch_xla's, which ends the client of the chips
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # its reader has gone, or it was never there
            stream.flush()
    os._exit(code)
