"""Start the processes of a job on this machine and watch over them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from orchestrator import stopping
from orchestrator.distributed import process_guard
from orchestrator.distributed.heartbeat import read_beat
from orchestrator.distributed.world import World
from orchestrator.errors import DONE, FAILED, STOPPED
from orchestrator.output import Stream

_GRACE_SECONDS = 15.0  # a process whose peer died cannot save: its collectives fail
_SAVE_SECONDS = 120.0  # the others have stopped, and saved
_POLL_SECONDS = 0.1
_LAST_LINES_SECONDS = 5.0
_VMSTAT = Path("/proc/vmstat")

Process = subprocess.Popen[bytes]
Hear = Callable[[str, Stream], object]


@dataclass(frozen=True)
class Ended:
    """The result of the processes of a job.

    Attributes:
        code: the exit code for the whole job.
        problems: one line for each process that failed or does not react, as a person reads it. What a process says
            of itself, with an exit code of its own, is not repeated.
        step: the last step that a process has completed; None where none has.
    """

    code: int
    problems: tuple[str, ...] = ()
    step: int | None = None


def run_local(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    hear: Hear | None = None,
    announce: bool = True,
    worlds: Sequence[World] | None = None,
) -> Ended:
    """Run `command` once per entry of `environments` and wait for all.

    A request to stop is passed on once to each, as SIGTERM; when one process fails the others are ended; when this
    process dies they are ended, too. They have sessions of their own, so that a Ctrl-C reaches them through here alone.

    Args:
        command: program and arguments, the same for each process.
        environments: environment variables of each process, beside those of this one.
        hear: called with each line that a process prints, and whether that is on standard output or standard error;
            from threads, one line at a time. None: the processes print where this one does.
        announce: acknowledge a request to stop on standard error.
        worlds: each process among those of a job of several hosts; None: they are the whole job.
    """
    processes: list[Process] = []
    with (
        tempfile.TemporaryDirectory(prefix="orchestrator-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as held,
    ):
        store = Path(folder) / "store"
        held.enter_context(stopping.listening(announce=announce))
        held.enter_context(stopping.deferred(watched=True))
        try:
            for rank, extra in enumerate(environments):
                size = len(environments)
                world = worlds[rank] if worlds else World(rank, size, rank, size, f"file:{store}")
                env = {**os.environ, **extra, **world.environment()}
                pipe = subprocess.PIPE if hear else None
                processes.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, start_new_session=True))
            held.enter_context(_guarded(processes))
            if hear:
                held.enter_context(_heard(processes, hear))
            return _watch(processes, store)
        finally:
            # Some may be stopped, and what they were started for is over.
            _end(processes, _GRACE_SECONDS)


@contextlib.contextmanager
def _heard(processes: Sequence[Process], hear: Hear) -> Iterator[None]:
    """Hand on what the processes print, all of it before the block is left."""
    lock = threading.Lock()

    def read(pipe: IO[bytes], stream: Stream) -> None:
        with pipe:
            for line in pipe:
                # Whatever becomes of a line, a pipe without a reader would block the process.
                with lock, contextlib.suppress(Exception):
                    hear(line.decode(errors="replace").rstrip("\r\n"), stream)

    threads = []
    for process in processes:
        assert process.stdout is not None
        assert process.stderr is not None
        pipes: list[tuple[IO[bytes], Stream]] = [(process.stdout, "stdout"), (process.stderr, "stderr")]
        threads += [threading.Thread(target=read, args=arguments, daemon=True) for arguments in pipes]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        _end(processes, _GRACE_SECONDS)
        for thread in threads:
            # A process that they left behind may hold the pipe for ever.
            thread.join(_LAST_LINES_SECONDS)


@contextlib.contextmanager
def _guarded(processes: Sequence[Process]) -> Iterator[None]:
    """Run a process beside this one that ends the others should this one be killed."""
    words = [sys.executable, "-I", "-S", process_guard.__file__, *(str(process.pid) for process in processes)]
    watcher = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    assert watcher.stdin is not None
    try:
        yield
    finally:
        watcher.stdin.close()
        watcher.wait()


def _watch(processes: Sequence[Process], store: Path) -> Ended:
    killed_before, passed_on = _out_of_memory_kills(), False
    while True:
        codes = [process.poll() for process in processes]
        beats = (read_beat(store, rank) for rank in range(len(processes)))
        step = max((beat.step for beat in beats if beat), default=None)
        if stopping.insisted():
            _kill(processes)
            return Ended(stopping.exit_code(signal.SIGINT), ("the run was ended without saving, as asked",), step)
        if stopping.requested() and not passed_on:
            # SIGTERM for SIGINT, too: a process whose handlers are not there yet dies of it without a traceback.
            passed_on = True
            _send(processes, signal.SIGTERM)
        obeyed = (*STOPPED, -signal.SIGTERM) if passed_on else STOPPED
        stopped = [code for code in codes if code is not None and code in obeyed]
        failed = [code for code in codes if code and code not in obeyed]
        if stopped and not failed:
            # All stop together and save; one that was alone with its signal takes the others along.
            _end(processes, _SAVE_SECONDS)
            return Ended(stopping.exit_code(stopping.requested()) if passed_on else stopped[0], step=step)
        if failed:
            memory = _out_of_memory_kills() > killed_before
            code = _job_code(failed)
            return Ended(code, tuple(_problems(processes, store, memory)) if code == FAILED else (), step)
        if all(code == DONE for code in codes):
            return Ended(DONE, step=step)
        time.sleep(_POLL_SECONDS)


def _job_code(failed: Sequence[int]) -> int:
    """Return the exit code of the job: of a killed process, which may live when tried again, else the first one."""
    return FAILED if any(code < 0 for code in failed) else failed[0]


def _problems(processes: Sequence[Process], store: Path, memory: bool) -> Iterator[str]:
    for rank, process in enumerate(processes):
        beat = read_beat(store, rank)
        who = f"process {rank} of {len(processes)} (pid {process.pid})"
        at = f", last seen after step {beat.step}" if beat else ""
        code = process.poll()
        if code is not None and code < 0:
            yield f"{who} was ended by {_signal_name(-code)}{at}{_likely_cause(-code, memory)}"
        elif code is None and _is_stopped(process):
            yield f"{who} is stopped (SIGSTOP) and does not react{at}"
        elif code not in (None, DONE):
            yield f"{who} ended with exit code {code}{at}"


def _likely_cause(number: int, memory: bool) -> str:
    if number != signal.SIGKILL:
        return ""
    if memory:
        return ". The likely cause is memory: the kernel has killed a process for want of it meanwhile"
    return ". It was killed from outside: by a person or by what runs the job, such as a container's limit of memory"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _is_stopped(process: Process) -> bool:
    try:
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _out_of_memory_kills() -> int:
    """How many processes the kernel has killed for memory, in whatever group; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in _VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _send(processes: Sequence[Process], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def _end(processes: Sequence[Process], grace_seconds: float) -> None:
    """Ask what still runs to stop, then make it."""
    _send(processes, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or stopping.insisted() or all(map(_is_idle, processes)):
            _kill(processes)
        time.sleep(_POLL_SECONDS)


def _is_idle(process: Process) -> bool:
    """Whether there is nothing to wait for: it has ended, or it is stopped and acts on no signal but SIGKILL."""
    return process.poll() is not None or _is_stopped(process)


def _kill(processes: Sequence[Process]) -> None:
    _send(processes, signal.SIGKILL)
