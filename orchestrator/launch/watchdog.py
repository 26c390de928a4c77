"""Ends a process of an engine's job where the job has failed or hangs, so that the engine starts it again.

The product's own launcher watches its processes from outside (`distributed.local_processes`). Under torchrun, srun or
another engine every process watches itself and two others, and what one of them finds out all learn through the store,
within seconds:

- a process that ended with an error has said so;
- a process of the same host that is gone without a word, as after SIGKILL, is looked for by its number;
- a process whose signs of life cease: that of the next rank, which may be on another host, for a minute;
- a job that does not get on for `hardware.timeout_seconds` hangs (`distributed.hang_watch`).

Each then writes its stacks and its flight record below the run directory, and ends with exit code 1. It does not wait
for its main thread for long: that one may be in a collective that never returns.

Time is counted in the watchdog's own rounds. A job whose processes are all suspended, and continued, has lost nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from orchestrator.distributed import stacks, standing
from orchestrator.distributed.hang_watch import HangWatch, describe_place
from orchestrator.distributed.heartbeat import Beat
from orchestrator.errors import FAILED
from orchestrator.output import tell
from orchestrator.runs.attempts import ENDED
from orchestrator.strategies.parallel_strategy import ParallelStrategy

ROUND_SECONDS = 1.0
_OVER, _CLAIMS = "over", "over-claims"
_OWN_WAY_SECONDS = 5.0  # for the main thread to end by itself, with a message of its own
_SILENT_SECONDS = 60.0
_LAST_SECONDS = 3.0  # that rank 0 stays, where it keeps the store, for the others to read in


@dataclass(frozen=True)
class Over:
    """Why a job is over, as one of its processes has found out.

    Attributes:
        ending: `failed`, `killed`, `suspended`, `hung` or `lost`.
        cause: in a sentence.
        rank: of the process that it began with; None where that is not known.
        host: of that process.
        pid: of that process.
        step: the last one that was completed.
        phase: what that process was at.
    """

    ending: str
    cause: str
    rank: int | None = None
    host: str | None = None
    pid: int | None = None
    step: int = 0
    phase: str | None = None


class Watchdog:
    """Watches over the process that it is in.

    Args:
        parallel: a strategy that has joined.
        timeout_seconds: after which a job that does not get on hangs.

    Attributes:
        folder: for the stacks; None as long as there is no run directory.
    """

    def __init__(self, parallel: ParallelStrategy, timeout_seconds: float):
        self.folder: Path | None = None
        self._parallel, self._timeout, self._world = parallel, timeout_seconds, parallel.world
        self._rounds, self._answered, self._next_at, self._next_count = 0, 0, 0, -1
        self._own, self._hung_at = HangWatch(1, timeout_seconds, 0.0), 0
        first = self._world.rank - self._world.local_rank
        here = range(first, first + self._world.local_size)
        self._here = [rank for rank in here if rank != self._world.rank]
        self._next = (self._world.rank + 1) % self._world.size
        self._known: dict[int, Beat] = {}
        self._over: Over | None = None
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to watch, in a thread."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no more: this process ends in order, and says so to the others."""
        self._stopped.set()
        with contextlib.suppress(RuntimeError):
            self._parallel.put(_left(self._world.rank), "")

    def report(self, over: Over) -> None:
        """Tell the others that the job is over. Once: whoever comes first.

        Args:
            over: why.
        """
        with contextlib.suppress(RuntimeError):
            if self._parallel.count(_CLAIMS) == 1:
                self._parallel.put(_OVER, json.dumps(asdict(over)))
        self._keep(over)

    def listen(self) -> None:
        """Exchange with the others through the store. Where that is gone it may take long: the watch goes on."""
        if text := self._parallel.get_now(_OVER):
            self._over = self._over or Over(**json.loads(text))
        elif found := self._look_at_others() or (self._culprit() if self._hung_at else None):
            self.report(found)
            self._over = found
        self._answered = self._rounds

    def _watch(self) -> None:
        """Look at this process alone, without the store, and end it where the job is over."""
        while not self._stopped.wait(ROUND_SECONDS):
            self._rounds += 1
            now, here = self._rounds * ROUND_SECONDS, standing.here
            own = Beat(here.step, "", os.getpid(), self._rounds, here.phase, here.marks)
            self._own.see(0, own, _busy() if self._own.is_long(0) else None, now)
            if not self._hung_at and self._own.hung(now):
                self._hung_at = self._rounds
            over = self._over or self._deaf(now)
            if over is None or (over.ending == "failed" and self._stopped.wait(_OWN_WAY_SECONDS)):
                continue
            self._end(over)

    def _deaf(self, now: float) -> Over | None:
        """Return that the job is over where no other process is left to say so."""
        step, patience = standing.here.step, min(_SILENT_SECONDS, self._timeout)
        if now - self._answered * ROUND_SECONDS > patience:
            return Over("lost", "the place where the processes meet does not answer: its host is gone", step=step)
        if self._hung_at and now - self._hung_at * ROUND_SECONDS > _OWN_WAY_SECONDS:
            return Over("hung", f"the job has not got on for {self._own.waited(now):.0f} s", step=step)
        return None

    def _look_at_others(self) -> Over | None:
        """Return who is gone: a process of this host, or the one of the next rank."""
        if self._next == self._world.rank:
            return None
        for rank in self._here:
            if rank not in self._known:
                beat = self._parallel.beat_of(rank)
                if beat is not None and _process(beat):
                    self._known[rank] = beat
            elif _status(self._known[rank]) in ("", psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) and self._is_there(rank):
                return self._about("killed", rank, "is gone: it was killed")
        beat = self._parallel.beat_of(self._next)
        if beat is None or beat.count != self._next_count:
            self._next_at, self._next_count = self._rounds, beat.count if beat else -1
        silent = (self._rounds - self._next_at) * ROUND_SECONDS
        patience = self._timeout if self._next in self._here else min(_SILENT_SECONDS, self._timeout)
        if beat is not None and silent > patience and self._is_there(self._next):
            return self._about("hung", self._next, f"gives no sign of life for {silent:.0f} s")
        return None

    def _is_there(self, rank: int) -> bool:
        """Whether a process has not said that it ends in order."""
        return self._parallel.get_now(_left(rank)) is None

    def _culprit(self) -> Over | None:
        """Return whom the job waits for. The first that asks looks; the others are told."""
        if self._parallel.count("hang-claims") > 1:
            return None
        job, size, moments = HangWatch(self._world.size, self._timeout, 0.0), self._world.size, (0.0, 100.0)
        for count, moment in enumerate(moments):  # no times: who gives no sign of life between them is silent
            for rank in range(size):
                beat = self._parallel.beat_of(rank)
                mine = beat is not None and rank == self._world.rank
                job.see(rank, replace(beat, count=beat.count + count) if beat and mine else beat, None, moment)
            self._stopped.wait(0.0 if moment else 2.5 * ROUND_SECONDS)
        waited = self._own.waited(self._rounds * ROUND_SECONDS)
        return self._about("hung", job.behind(moments[-1])[0], f"the job has not got on for {waited:.0f} s")

    def _about(self, ending: str, rank: int, said: str) -> Over:
        beat = self._parallel.beat_of(rank)
        if beat is None:
            return Over(ending, f"process {rank}: {said}", rank)
        suspended = rank in self._known and _status(self._known[rank]) == psutil.STATUS_STOPPED
        state = " is suspended (SIGSTOP)" if suspended else ""
        cause = f"process {rank} (host {beat.host}, pid {beat.pid}){state}, {describe_place([beat], 0)}: {said}"
        return Over("suspended" if suspended else ending, cause, rank, beat.host, beat.pid, beat.step, beat.phase)

    def _keep(self, over: Over) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / ENDED).write_text(json.dumps({**asdict(over), "time": time.time()}))

    def _end(self, over: Over) -> None:
        """Write down where this process is, and end it."""
        rank = self._parallel.rank
        head = f"process {rank} of {self._parallel.size} (pid {os.getpid()}), after step {standing.here.step}"
        if self.folder is not None:
            self._keep(over)
            stacks.write_own(self.folder, rank, f"{head}, in {standing.here.phase}. {over.cause}")
        for other, beat in self._known.items():
            # It would stay, and keep its engine waiting: it acts on no other signal.
            if _status(beat) == psutil.STATUS_STOPPED and other != rank:
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)
        if rank == 0 or over.rank == rank or self._over is None:  # nobody else may be left, or be heard, to say it
            tell(f"{over.cause}; the stacks are in {self.folder}", level=logging.ERROR)
        if rank == 0 and not self._world.store_is_kept:
            time.sleep(_LAST_SECONDS)
        os._exit(FAILED)


def _left(rank: int) -> str:
    return f"left{rank}"


def _process(beat: Beat) -> psutil.Process | None:
    """Return the process of a beat, if it is the one that can be seen from here under that number."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(beat.pid)
        if abs(process.create_time() - beat.born) < 1.0:
            return process
    return None


def _status(beat: Beat) -> str:
    process = _process(beat)
    with contextlib.suppress(psutil.Error):
        return str(process.status()) if process else ""
    return ""


def _busy() -> float:
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            spent = child.cpu_times()
            own += spent.user + spent.system
    return own
