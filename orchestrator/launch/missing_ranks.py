"""Find the process that is missing when a collective fails or waits in vain."""

from __future__ import annotations

import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from orchestrator import stopping
from orchestrator.distributed import stacks, standing
from orchestrator.distributed.heartbeat import Beat
from orchestrator.errors import FAILED, LostPeerError, UserError
from orchestrator.launch.watchdog import Over, Watchdog
from orchestrator.runs.messages import warn
from orchestrator.strategies.parallel_strategy import ParallelStrategy

BEAT_SECONDS = 1.0
_ROLL_CALL_SECONDS = 6.0
_POLL_SECONDS = 0.1
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|timed out after|Socket Timeout|wait timeout"
    r"|pair closure|(Read|Connect) timeout|failed to (send|recv)|Socket is not connected|connection was closed",
    re.IGNORECASE,
)


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective or the store has failed because another process is gone or does not answer.

    Args:
        error: the exception.
    """
    # gloo raises RuntimeError for everything; a defect of ours, such as unequal sizes, says nothing of a connection.
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


class RankMonitor:
    """This process's sign of life, and the roll call of the others after a collective has failed.

    A collective that fails says nothing of the rank for which it failed, and a rank that noticed late looks as dead as
    one that is. So all that notice post it, and the first of them waits for the others for a while. Who has not posted
    is missing; if signs of life of some of those have ceased as well, it is these.

    Args:
        parallel: a strategy that has joined.
        timeout_seconds: in the job of an engine: after which one that does not get on is ended. None: another watches.
    """

    def __init__(self, parallel: ParallelStrategy, timeout_seconds: float | None = None):
        self._parallel, self._count = parallel, 0
        self._host, self._pid, self._born = platform.node(), os.getpid(), psutil.Process().create_time()
        self._watchdog = Watchdog(parallel, timeout_seconds) if timeout_seconds is not None else None
        # torchrun's agent, should it be killed, leaves its workers behind; others take theirs along.
        self._agent = os.getppid() if parallel.world.engine == "torchrun" else None
        kind, _, path = parallel.world.store.partition(":")
        self._store = Path(path) if kind == "file" else None
        self._ended = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Give signs of life, and say of a failed collective whom it lacked.

        Raises:
            LostPeerError: in place of the library's error.
        """
        standing.here.step = 0
        standing.enter(standing.STARTING)
        if self._store:
            # A few microseconds. So the step of a process is known that was killed right after it.
            standing.here.heard.append(self._beat)
        thread = threading.Thread(target=self._beat_on, name="beat", daemon=True)
        thread.start()
        if self._watchdog:
            self._watchdog.start()
        try:
            with self.explained():
                yield
        finally:
            if self._watchdog:
                self._watchdog.stop()
            self._ended.set()
            thread.join(BEAT_SECONDS)
            standing.here.heard.clear()
            self._beat()  # with the last step, for who looks at what has become of this process

    @contextmanager
    def explained(self) -> Iterator[None]:
        """As `watched`, around a part after which something waits for the others."""
        try:
            yield
        except LostPeerError:
            raise
        except Exception as error:
            if not is_lost_peer(error):
                self._say(error)
                raise
            with stopping.at_once():
                try:
                    stopping.check()  # a request that came before the collective failed
                    lost = self._explain(error)
                except stopping.Stopped as stop:
                    # The launcher ends those that are left. Nothing was saved, and it says what has happened.
                    stop.exit_code = FAILED
                    raise
                raise lost from error

    def keep_stacks_in(self, folder: Path) -> None:
        """Say where this process is to write its stacks, should it have to be ended.

        Args:
            folder: below the run directory.
        """
        if self._watchdog:
            self._watchdog.folder = folder

    def _say(self, error: Exception) -> None:
        """Tell the others of an error of this process."""
        rank, said, here = self._parallel.rank, _first_line(error), standing.here
        with suppress(RuntimeError):
            self._parallel.put(f"failed{rank}", said)
        if self._watchdog:
            cause = f"process {rank} (host {self._host}, pid {self._pid}) ended with: {said}"
            self._watchdog.report(Over("failed", cause, rank, self._host, self._pid, here.step, here.phase))

    def _beat_on(self) -> None:
        recorded = False
        while True:
            self._beat()
            if self._agent not in (None, os.getppid()):
                self._agent = None
                warn("torchrun's agent has gone: what it has started is saved and ends")
                os.kill(os.getpid(), signal.SIGTERM)
            if self._watchdog:
                with suppress(RuntimeError):
                    self._watchdog.listen()
            elif self._store and not recorded and stacks.wanted(self._store):
                recorded = True
                stacks.leave_record(self._store, self._parallel.rank)
            if self._ended.wait(BEAT_SECONDS):
                return

    def _beat(self) -> None:
        self._count += 1
        here = standing.here
        beat = Beat(here.step, self._host, self._pid, self._count, here.phase, here.marks, self._born)
        with suppress(RuntimeError):
            self._parallel.beat(beat.to_text())

    def _explain(self, error: Exception) -> LostPeerError:
        rank, size = self._parallel.rank, self._parallel.size
        what = f"process {rank} of {size} lost the others: {_first_line(error)}"
        try:
            self._parallel.put(f"lost{rank}", "")
            if self._parallel.count("lost") > 1:
                # Another one asks. Without this process it may lack the store, or take it for missing.
                self._wait(lambda: self._parallel.get_now("named") is not None, 2 * _ROLL_CALL_SECONDS)
                return LostPeerError(what, got=self._parallel.get_now("named"))
            missing = self._call_roll()
            self._parallel.put("named", "; ".join(missing))
            if self._watchdog and missing:
                self._watchdog.report(Over("failed", f"the job has lost {'; '.join(missing)}", step=standing.here.step))
        except RuntimeError:
            missing = ["process 0, which keeps the place where all meet"]
        return LostPeerError(
            f"the job has lost {'; '.join(missing)}" if missing else what,
            got=f"{_first_line(error)} (process {rank} of {size}, after step {standing.here.step})",
            fix="look for what that process or its host says; then go on from the newest checkpoint with resume=",
        )

    def _call_roll(self) -> list[str]:
        others = [rank for rank in range(self._parallel.size) if rank != self._parallel.rank]
        before = {rank: self._parallel.beat_of(rank) for rank in others}
        begin = time.monotonic()
        self._wait(lambda: not self._missing(others), _ROLL_CALL_SECONDS)
        missing = self._missing(others)
        # Their signs of life may come once more within that time, and not again.
        time.sleep(max(0.0, begin + 3 * BEAT_SECONDS - time.monotonic()) if missing else 0.0)
        after = {rank: self._parallel.beat_of(rank) for rank in missing}
        silent = [rank for rank in missing if before[rank] == after[rank]]
        return [self._describe(rank, after[rank], rank in silent) for rank in silent or missing]

    def _missing(self, ranks: Sequence[int]) -> list[int]:
        return [rank for rank in ranks if self._parallel.get_now(f"lost{rank}") is None]

    def _describe(self, rank: int, beat: Beat | None, silent: bool) -> str:
        where = f" (host {beat.host}, pid {beat.pid})" if beat else ""
        if said := self._parallel.get_now(f"failed{rank}"):
            return f"process {rank}{where}, which ended with: {said}"
        state = "gives no sign of life" if silent else "runs, but did not come"
        at = f", last seen after step {beat.step}" if beat else ""
        return f"process {rank}{where}, which {state}{at}"

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


def _first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    # gloo and torch put the place in their source in front.
    text = re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", text)
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
