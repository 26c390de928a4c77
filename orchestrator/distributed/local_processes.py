"""Start the processes of a job on this machine and watch over them."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

import psutil

from orchestrator import stopping
from orchestrator.distributed import process_guard, stacks
from orchestrator.distributed.hang_watch import HangWatch, describe_place
from orchestrator.distributed.heartbeat import Beat, make_room, read_beat
from orchestrator.distributed.process_template import ForkedProcess, ProcessTemplate
from orchestrator.distributed.world import World
from orchestrator.errors import DONE, FAILED, STOPPED
from orchestrator.output import Stream

_GRACE_SECONDS = 15.0  # a process whose peer died cannot save: its collectives fail
_SAVE_SECONDS = 120.0  # the others have stopped, and saved
_POLL_SECONDS = 0.1
_LAST_LINES_SECONDS = 5.0
_VMSTAT = Path("/proc/vmstat")
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGSTOP")

Process = subprocess.Popen[bytes] | ForkedProcess
Hear = Callable[[str, Stream], object]


@dataclass(frozen=True)
class Failure:
    """What a job has failed of.

    Attributes:
        kind: `failed` (it ended with an exit code), `killed` (by a signal), `suspended` (SIGSTOP) or `hung`.
        rank: of the process that it began with.
        host: of that process.
        pid: of that process.
        phase: what it was at.
        signal: that has ended it; empty where none did.
        outside: it came from outside of the run: from a person, or from what runs the job.
        noticed_seconds: from the last sign that all was well until it was noticed.
        noticed_at: that moment, as `time.monotonic` has it.
        stacks: the folder with the stacks of all processes; None where none were taken.
    """

    kind: Literal["failed", "killed", "suspended", "hung"]
    rank: int
    host: str
    pid: int
    phase: str
    signal: str = ""
    outside: bool = False
    noticed_seconds: float = 0.0
    noticed_at: float = 0.0
    stacks: Path | None = None


@dataclass(frozen=True)
class Ended:
    """The result of the processes of a job.

    Attributes:
        code: the exit code for the whole job.
        problems: one line for each process that failed or does not react, as a person reads it. What a process says
            of itself, with an exit code of its own, is not repeated.
        step: the last step that a process has completed; None where none has.
        failure: where the code is `FAILED`: of what.
    """

    code: int
    problems: tuple[str, ...] = ()
    step: int | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Supervision:
    """How a job is watched that may be started again.

    Attributes:
        timeout_seconds: a job that does not get on for so long hangs, and is ended.
        stacks: where the stacks of its processes are kept then.
        saw: told of the beats of the processes, several times a second.
        warn: told which process the others have waited for unusually long.
        attempt: number of this start.
        grace_seconds: for the others to end, where one was killed.
        template: the processes are forked from it, and not started, as long as it is there.
    """

    timeout_seconds: float
    stacks: Path
    saw: Callable[[Sequence[Beat | None]], object] = lambda beats: None
    warn: Callable[[str], object] = lambda text: None
    attempt: int = 0
    grace_seconds: float = _GRACE_SECONDS
    template: ProcessTemplate | None = None


def run_local(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    hear: Hear | None = None,
    announce: bool = True,
    worlds: Sequence[World] | None = None,
    supervision: Supervision | None = None,
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
        supervision: to end the job where it hangs; None: it may take as long as it likes.
    """
    processes: list[Process] = []
    with (
        tempfile.TemporaryDirectory(prefix="orchestrator-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as held,
    ):
        store, size = Path(folder) / "store", len(environments)
        make_room(store, size)
        held.enter_context(stopping.listening(announce=announce))
        held.enter_context(stopping.deferred(watched=True))
        grace = _GRACE_SECONDS
        try:
            for rank, extra in enumerate(environments):
                if number := stopping.requested():
                    return Ended(stopping.exit_code(number))
                attempt = supervision.attempt if supervision else 0
                world = worlds[rank] if worlds else World(rank, size, rank, size, f"file:{store}", attempt)
                template = supervision.template if supervision else None
                processes.append(_start(command, {**extra, **world.environment()}, bool(hear), template))
            guard = held.enter_context(_guarded(processes))
            if hear:
                held.enter_context(_heard(processes, hear))
            ended = _Watched(processes, store, supervision, guard).wait()
            if supervision and ended.failure and ended.failure.kind != "failed":
                # Who waits for what was killed has nothing to save, and who hangs ends at no request.
                grace = supervision.grace_seconds if ended.failure.kind == "killed" else 0.0
            return ended
        finally:
            # Some may be stopped, and what they were started for is over.
            _end(processes, grace)


def _start(
    command: Sequence[str], environment: Mapping[str, str], piped: bool, template: ProcessTemplate | None
) -> Process:
    if template and (forked := template.start(environment, piped)):
        return forked
    pipe = subprocess.PIPE if piped else None
    env = {**os.environ, **environment}
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, start_new_session=True)


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


class _Guard:
    """A process beside this one that ends the others should this one be killed."""

    def __init__(self, processes: Sequence[Process]):
        pids = [str(process.pid) for process in processes]
        self._words = [sys.executable, "-I", "-S", process_guard.__file__, *pids]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._words, stdin=subprocess.PIPE, start_new_session=True)

    def keep(self) -> None:
        """Start it again where it was killed: without it the others would outlive this process, and write on."""
        if self.process.poll() is not None:
            self.close()
            self.process = self._start()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def _guarded(processes: Sequence[Process]) -> Iterator[_Guard]:
    guard = _Guard(processes)
    try:
        yield guard
    finally:
        guard.close()


class _Watched:
    """The processes of a job, until the first of them says how it ends."""

    def __init__(self, processes: Sequence[Process], store: Path, supervision: Supervision | None, guard: _Guard):
        self._processes, self._store, self._supervision, self._guard = processes, store, supervision, guard
        self._beats: list[Beat | None] = [None] * len(processes)
        self._seen_at = self._busy_at = now = time.monotonic()
        seconds = supervision.timeout_seconds if supervision else 0.0
        self._hangs = HangWatch(len(processes), seconds, now) if supervision else None
        self._killed_before = _out_of_memory_kills()

    def wait(self) -> Ended:
        """Wait for the end, and pass on a request to stop."""
        processes, passed_on = self._processes, False
        while True:
            codes = [process.poll() for process in processes]
            self._guard.keep()
            self._look()
            step = max((beat.step for beat in self._beats if beat), default=None)
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
                return self._failed(_job_code(failed), step)
            if all(code == DONE for code in codes):
                return Ended(DONE, step=step)
            if self._hangs and (hung := self._hangs.hung(time.monotonic())):
                return self._hung(hung, step)
            time.sleep(_POLL_SECONDS)

    def _look(self) -> None:
        now, watch = time.monotonic(), self._hangs
        look_busy = now - self._busy_at >= 1.0
        for rank, process in enumerate(self._processes):
            beat = read_beat(self._store, rank)
            self._beats[rank] = beat or self._beats[rank]
            if watch and process.poll() is not None:
                watch.over(rank)
            elif watch:
                watch.see(rank, beat, _busy(process.pid) if look_busy and watch.is_long(rank) else None, now)
        if look_busy:
            self._busy_at = now
        if self._supervision and watch:
            self._supervision.saw(self._beats)
            for rank in watch.slow(now):
                waited = f"the others have waited for it for {watch.waited(now):.0f} s"
                self._supervision.warn(f"{self._who(rank)} is slow: {waited}, {describe_place(self._beats, rank)}")
        if all(process.poll() is None for process in self._processes):
            self._seen_at = now

    def _who(self, rank: int) -> str:
        return f"process {rank} of {len(self._processes)} (pid {self._processes[rank].pid})"

    def _failed(self, code: int, step: int | None) -> Ended:
        if code != FAILED:
            return Ended(code, step=step)
        codes = [process.poll() for process in self._processes]
        memory = _out_of_memory_kills() > self._killed_before
        rank = next((rank for rank, code in enumerate(codes) if code is not None and code < 0), None)
        if rank is None:
            rank = next(rank for rank, code in enumerate(codes) if code)
            failure = self._failure("failed", rank)
        else:
            name = _signal_name(-(codes[rank] or 0))
            failure = replace(self._failure("killed", rank), signal=name)
            failure = replace(failure, outside=name in _FROM_OUTSIDE and not memory)
        return Ended(code, tuple(_problems(self._processes, self._store, memory)), step, failure)

    def _hung(self, ranks: Sequence[int], step: int | None) -> Ended:
        """End a job that hangs: say who, and keep the stacks of all."""
        assert self._supervision
        assert self._hangs
        stopped = [rank for rank, process in enumerate(self._processes) if _is_stopped(process)]
        waited = self._hangs.waited(time.monotonic())
        rank = next((rank for rank in ranks if rank in stopped), ranks[0])
        failure = self._failure("suspended" if rank in stopped else "hung", rank)
        heads, problems = [], []
        for other in range(len(self._processes)):
            state = "is suspended (SIGSTOP), and was continued to write this" if other in stopped else "runs"
            place = describe_place(self._beats, other)
            heads.append(f"{self._who(other)} on {failure.host} {state}, {place}")
            if other in ranks:
                state = "is suspended (SIGSTOP)" if other in stopped else "hangs"
                problems.append(f"{self._who(other)} {state}: the job has not got on for {waited:.0f} s; {place}")
        folder = self._supervision.stacks
        living = {rank: process.pid for rank, process in enumerate(self._processes) if process.poll() is None}
        stacks.collect(self._store, living, stopped, folder, heads)
        problems.append(f"the stacks of all processes are in {folder}")
        kept = replace(failure, outside=rank in stopped, noticed_seconds=waited, stacks=folder)
        return Ended(FAILED, tuple(problems), step, kept)

    def _failure(self, kind: Literal["failed", "killed", "suspended", "hung"], rank: int) -> Failure:
        beat = self._beats[rank]
        phase = beat.phase if beat else "starting"
        pid, now = self._processes[rank].pid, time.monotonic()
        return Failure(kind, rank, platform.node(), pid, phase, noticed_seconds=now - self._seen_at, noticed_at=now)


def _busy(pid: int) -> float | None:
    """Return the processor seconds of a process and of those that it has started, such as compilers."""
    try:
        process = psutil.Process(pid)
        times = [member.cpu_times() for member in (process, *process.children(recursive=True))]
    except psutil.Error:
        return None
    return float(sum(time.user + time.system + time.children_user + time.children_system for time in times))


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
