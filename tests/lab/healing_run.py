"""A run of the product that heals itself, with something beside it that stands for an engine and for nobody else.

The engine gives the same command line again when its process has gone (`resume=auto`), and knows exit codes: what they
call a mistake needs a person, and a campaign counts that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.run_checkpoints import committed, step_of
from orchestrator.checkpoint.storage import AnyPath, is_remote, locate
from orchestrator.errors import DIVERGED, MISTAKE
from tests.lab.forked_product import HURRY, STEP_LOG, fork_agent, fork_launcher
from tests.lab.runs import SMALL, TINY, write_corpus

RANKS = 2
TIMEOUT_SECONDS = 4
"""The declared time after which a run that does not get on hangs."""
STEPS = 300
EVERY = 5
LIMIT_SECONDS = 120.0
WORDS = (
    *SMALL,
    *TINY,
    f"checkpoint.every_steps={EVERY}",
    f"hardware.timeout_seconds={TIMEOUT_SECONDS}",
    "checkpoint.store_timeout_seconds=6",
    "logger.every_steps=10",
    "layout.fsdp=2",
    "resume=auto",
    "run_id=it",
    "name=run",
)
_ENGINE_TRIES = 5
_DISKS = "orchestrator-campaign"


class NeedsPerson(Exception):
    """The run does not go on by itself."""


class Lost(Exception):
    """Something is gone, or not what it should be."""


class HealingRun:
    """A run in a folder of its own.

    Args:
        folder: of the run.
        engine: `launcher` or `torchrun`.
        environment: variables of its processes.
        enter: called first in its processes.
        checkpoints: where it keeps them; None for the run directory.
        steps: of the run.

    Attributes:
        folder: of the run.
        starts: how often the engine has started it.
        code: its last exit code; None while it runs.
        lived: when it was started first and when it ended, in seconds since the epoch.
        delays: seconds from the last step of a save to its commit, of commits that were looked at.
    """

    def __init__(
        self,
        folder: Path,
        engine: str = "launcher",
        environment: Mapping[str, str] | None = None,
        enter: Callable[[], object] = lambda: None,
        checkpoints: str | None = None,
        steps: int = STEPS,
    ):
        self.folder, self.engine, self._enter, self.last_step = folder, engine, enter, steps
        self.steps, self.log = folder / "steps", folder / "log"
        self.steps.mkdir(parents=True)
        self.run_dir = folder / "runs" / "run" / "it"
        corpus = write_corpus(folder / "corpus")
        self._words = [
            *WORDS,
            f"runs_dir={folder / 'runs'}",
            f"data.cache_dir={folder / 'cache'}",
            f"data.sources=[{{path:'{corpus}',weight:1}}]",
            f"train.max_steps={steps}",
            *([f"hardware.devices={RANKS}"] if engine == "launcher" else []),  # else they are the agent's processes
            *([f"checkpoint.dir={checkpoints}"] if checkpoints else []),
        ]
        self.kept: AnyPath = locate(checkpoints) / "run" / "it" if checkpoints else self.run_dir / "checkpoints"
        self._environment = {**(environment or {}), STEP_LOG: str(self.steps)}
        self.pid, self.starts, self.code, self.started_at = 0, 0, None, 0.0
        self._tries, self._tried_at, self.best = 0, -1, 0
        self.lived, self.delays = (0.0, 0.0), list[float]()

    def start(self) -> None:
        """Give the command."""
        self.starts, self.code, self.started_at = self.starts + 1, None, time.monotonic()
        if self.starts == 1:
            self.lived = (time.time(), 0.0)
        if self.engine == "torchrun":
            self.pid = fork_agent(self._words, self._environment, self.log, RANKS, restarts=3)
        else:
            self.pid = fork_launcher(self._words, self._environment, self.log, self._enter)

    def attend(self) -> bool:
        """Do what an engine does: start it again if it has ended. Returns whether it has come to its end.

        Raises:
            NeedsPerson: an engine would not start it again.
        """
        if self.code is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.code = os.waitstatus_to_exitcode(status) if pid else None
                self.lived = (self.lived[0], time.time())
        if self.code is None or self.code == 0:
            return self.code == 0
        if self.code in (MISTAKE, DIVERGED):
            raise NeedsPerson(f"exit {self.code}: {self.said()}")
        reached = self.reached()
        self._tries = self._tries + 1 if reached == self._tried_at else 1
        self._tried_at = reached
        if self._tries > _ENGINE_TRIES:
            raise NeedsPerson(f"{_ENGINE_TRIES} starts without a step: {self.said()}")
        self.start()
        return False

    def wait(self, condition: Callable[[], Any], seconds: float = LIMIT_SECONDS) -> Any:
        """Attend to the run until `condition` is true, or the run has ended. Returns what it returned.

        Raises:
            NeedsPerson: neither has come.
        """
        deadline = time.monotonic() + seconds
        while not (found := condition()) and not self.attend():
            if time.monotonic() > deadline:
                raise NeedsPerson(f"nothing has happened in {seconds:g} s: {self.said()}")
            time.sleep(0.02)
        return found

    def lines(self, rank: int = 0) -> list[tuple[int, float, int]]:
        """Return step, time and process of each step that a rank has completed, in the order of time."""
        with contextlib.suppress(OSError):
            return [tuple(json.loads(line)) for line in (self.steps / f"steps-{rank}").read_text().splitlines()]
        return []

    def reached(self) -> int:
        """Return the last step."""
        return max((step for step, _, _ in self.lines()), default=0)

    def worker(self, rank: int) -> tuple[int, float]:
        """Return process number and start of the present worker of a rank; zeros where there is none yet."""
        with contextlib.suppress(OSError, ValueError):
            pid, begun = json.loads((self.steps / f"pid-{rank}").read_text())
            return int(pid), float(begun)
        return 0, 0.0

    def workers(self) -> list[int]:
        """Return the process numbers of the present workers."""
        return [self.worker(rank)[0] for rank in range(RANKS)]

    def signal(self, number: int, *pids: int) -> None:
        """Send a signal to processes; one that is gone already is no error."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def check_commits(self) -> int:
        """Look at what is committed, and return the step of the newest.

        Raises:
            Lost: a commit is gone, or not whole.
        """
        found = committed(self.kept)
        newest = step_of(found[0]) if found else 0
        if newest < self.best:
            raise Lost(f"the commit of step {self.best} is gone: the newest is of step {newest}")
        if found:
            try:
                Checkpoint(found[0]).verify()
            except Exception as error:
                if step_of(committed(self.kept)[0]) == newest:  # else it was pruned while it was read
                    raise Lost(f"{found[0]}: {error}") from error
        if newest > self.best and not is_remote(found[0]):
            self._measure_delay(found[0], newest)
        self.best = newest
        return newest

    def _measure_delay(self, commit: AnyPath, step: int) -> None:
        with contextlib.suppress(OSError):  # it was pruned
            made = commit.stat().st_mtime - (time.time() - time.monotonic())
            completed = [line[1] for line in self.lines() if line[0] == step and line[1] < made]
            self.delays += [made - completed[-1]] if completed else []

    def hurry(self) -> None:
        """Let it come to its end as fast as it can."""
        (self.steps / HURRY).touch()

    def said(self) -> str:
        """Return the end of what it has printed."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else "nothing was said"

    def facts(self) -> dict[str, Any]:
        """Return run.json."""
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.run_dir / "run.json").read_text())
            return found
        return {}

    def end(self) -> None:
        """Kill what is left."""
        if self.pid and self.code is None:
            self.signal(signal.SIGKILL, self.pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
        self.signal(signal.SIGKILL, *[pid for pid in self.workers() if pid and _is_ours(pid)])


def _is_ours(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).cmdline() == psutil.Process().cmdline()  # forked from here
    except psutil.Error:
        return False


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """Mount a file system of its own; those of programs that were killed are taken away.

    Raises:
        PermissionError: this machine does not permit it.
    """
    unmount_stale()
    place.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", f"{_DISKS}-{os.getpid()}", str(place)]
    if (done := subprocess.run(words, capture_output=True, text=True)).returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def unmount_stale() -> None:
    """Unmount the small disks of programs that are gone: their process number is in the name of the file system."""
    import psutil

    for line in Path("/proc/mounts").read_text().splitlines():
        name, place = line.split()[:2]
        owner = name.removeprefix(f"{_DISKS}-")
        if owner != name and owner.isdigit() and not psutil.pid_exists(int(owner)):
            where = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)  # as the kernel writes blanks
            subprocess.run(["umount", "-l", where], check=True)


def fill(disk: Path) -> Path:
    """Fill a file system to the last page. Returns the file that does."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * (1 << 16))
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    return filler
