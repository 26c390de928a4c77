"""Start the replica groups of a run on this machine, and start again those that are lost, without touching the others.

Each group has a supervisor process of its own (`worker group`), which starts the group's ranks and ends them all when
one is lost. The launcher watches over the supervisors, and over the lighthouse where the groups meet.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
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
from typing import IO

import psutil

from orchestrator import stopping
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.config.schema import RunConfig
from orchestrator.distributed.local_processes import Ended, Failure, Hear, Supervision, run_local
from orchestrator.distributed.replica_group import LIGHTHOUSE, ReplicaGroup
from orchestrator.errors import (
    DIVERGED,
    DONE,
    FAILED,
    MISTAKE,
    STOPPED,
    CheckpointError,
    ConfigError,
    MissingExtraError,
)
from orchestrator.output import Stream, tell
from orchestrator.runs import run_directory
from orchestrator.runs.attempts import HANGS
from orchestrator.runs.messages import warn
from orchestrator.training.resolved import Resolved

_POLL_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 60.0
_GRACE_SECONDS = 2.0  # of ranks whose group is lost
_PATIENCE = 2.0  # a group is given up when it has not got on for so many times hardware.timeout_seconds
_LAST_SECONDS = 30.0  # when one group has come to its end, the others have, too
_SAVE_SECONDS = 120.0
_WORKER = [sys.executable, "-m", "orchestrator.launch.worker"]
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "HIP_VISIBLE_DEVICES"}  # a group sees its own devices alone
_QUIET = {"RUST_LOG": "error"}  # torchft's native part tells of each message

Process = subprocess.Popen[bytes]
Start = Callable[[ReplicaGroup], Process]


@dataclass(frozen=True)
class Limits:
    """When a lost group is started again.

    Attributes:
        restarts: failures of a group in a row, without a new checkpoint between them, after which it stays away.
        backoff_seconds: before the first restart; doubled for each further one.
        newest: returns the newest checkpoint; None where there is none.
        timeout_seconds: a group that does not get on for so long hangs, and is ended.
        stacks: where the stacks of such a group are kept.
    """

    restarts: int
    backoff_seconds: float
    newest: Callable[[], object]
    timeout_seconds: float = 600.0
    stacks: Path = Path()


def check_groups(config: RunConfig, own_launcher: bool) -> None:
    """See that a run of replica groups can be started here, if it is one.

    Args:
        config: of the run.
        own_launcher: no engine has started this process.

    Raises:
        MissingExtraError: torchft is not installed.
        ConfigError: an engine has started the processes.
    """
    if config.launch.fault_tolerance != "torchft":
        return
    if importlib.util.find_spec("torchft") is None:
        raise MissingExtraError("torchft", "torchft", "launch.fault_tolerance=torchft")
    if not own_launcher:
        raise ConfigError(
            "replica groups are started, and started again, by the product's own launcher on one machine",
            got="launch.fault_tolerance=torchft in a process that an engine has started",
            allowed="launch.fault_tolerance=restart",
            fix="start it without the engine, or leave launch.fault_tolerance at restart: the engine restarts the run",
        )


def start_groups(
    resolved: Resolved,
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    hear: Hear | None = None,
    announce: bool = True,
) -> Ended:
    """Run the processes of a run in the groups that its layout says, each on its own devices of this machine.

    Args:
        resolved: the run, whose directory is open.
        command: program and arguments, the same for each process.
        environments: variables of each process.
        hear: as `run_groups` has it.
        announce: likewise.
    """
    launch, place, count = resolved.config.launch, resolved.place, resolved.layout.replicate

    def newest() -> object:
        with contextlib.suppress(CheckpointError):
            return next(iter(committed(place.checkpoints)), None)
        return None

    size, visible = len(environments) // count, _VISIBLE.get(resolved.target().name)
    placed = [dict(variables) for variables in environments]
    if visible is not None:
        names = os.environ.get(visible, "").split(",") if os.environ.get(visible) else []
        names = names or [str(number) for number in range(len(environments))]
        for rank, variables in enumerate(placed):
            group = rank // size
            variables[visible] = ",".join(names[group * size : (group + 1) * size])
    # A group that waits for another one that hangs does not hang itself: it goes on as soon as that one is ended.
    seconds, stacks = _PATIENCE * resolved.config.hardware.timeout_seconds, place.run_dir / HANGS
    limits = Limits(launch.max_restarts, launch.backoff_seconds, newest, seconds, stacks)
    ended = run_groups(command, placed, count, limits, hear, announce)
    if ended.code == DONE and run_directory.read_run(place.run_dir).get("status") == "running":
        # The group that was to say so was lost when everything was done and saved.
        run_directory.mark_ended(place.run_dir, "finished", resolved.config.train.max_steps)
    return ended


def run_groups(
    command: Sequence[str],
    environments: Sequence[dict[str, str]],
    count: int,
    limits: Limits,
    hear: Hear | None = None,
    announce: bool = True,
) -> Ended:
    """Run `command` once per entry of `environments`, in `count` groups, until the run has ended.

    Args:
        command: program and arguments, the same for each process.
        environments: variables of each process; those of the first group come first.
        count: groups.
        limits: when a lost group is started again.
        hear: called with each line that a process prints; None: the processes print where this one does.
        announce: acknowledge a request to stop on standard error.
    """
    size = len(environments) // count
    with tempfile.TemporaryDirectory(prefix="orchestrator-", ignore_cleanup_errors=True) as folder:
        address = Path(folder) / "lighthouse"

        def start(group: ReplicaGroup) -> Process:
            mine = environments[group.number * size : (group.number + 1) * size]
            plan = Path(folder) / f"group-{group.number}.json"
            stacks = str(limits.stacks / f"group-{group.number}")
            watched = {"timeout_seconds": limits.timeout_seconds, "stacks": stacks}
            plan.write_text(json.dumps({"command": list(command), "environments": mine, **watched}))
            return _start([*_WORKER, "group", str(plan)], group.environment(), hear)

        with _lighthouse(address, hear), stopping.listening(announce), stopping.deferred(watched=True):
            groups = Groups(count, start, limits, str(address))
            try:
                return groups.run()
            finally:
                groups.kill()


def _start(command: Sequence[str], variables: Mapping[str, str], hear: Hear | None) -> Process:
    pipe = subprocess.PIPE if hear else None
    environment = {**_QUIET, **os.environ, **variables}
    # Standard input is a pipe that ends with this process: however it goes, the groups save and stop.
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=pipe, stderr=pipe, start_new_session=True
    )
    if hear:
        hear_lines(process, hear)
    return process


def hear_lines(process: Process, hear: Hear) -> None:
    """Hand on what a process prints, from threads.

    Args:
        process: whose standard output and error are pipes.
        hear: called with each line.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    for lines, stream in ((process.stdout, "stdout"), (process.stderr, "stderr")):
        threading.Thread(target=_read, args=(lines, stream, hear), daemon=True).start()


def _read(lines: IO[bytes], stream: Stream, hear: Hear) -> None:
    with lines:
        for line in lines:
            with contextlib.suppress(Exception):
                hear(line.decode(errors="replace").rstrip("\r\n"), stream)


@contextlib.contextmanager
def _lighthouse(address: Path, hear: Hear | None) -> Iterator[None]:
    """Keep a lighthouse, unless the environment names one."""
    if LIGHTHOUSE in os.environ:
        yield
        return
    process = _start([*_WORKER, "lighthouse", str(address)], {}, hear)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@dataclass
class _Group:
    """A group, as the launcher sees it.

    Attributes:
        process: its supervisor; None while it waits for its restart, or stays away.
        due: when it is started again; None: never.
        failures: in a row.
        newest: checkpoint at its last failure.
        code: with which it has ended for good.
    """

    group: ReplicaGroup
    process: Process | None
    due: float | None = None
    failures: int = 0
    newest: object = None
    code: int | None = None


class Groups:
    """The groups of a run and their restarts.

    Args:
        count: of them.
        start: starts a group.
        limits: when a lost one is started again.
        address_file: where the lighthouse writes its address.
    """

    def __init__(self, count: int, start: Start, limits: Limits, address_file: str):
        self._start, self._limits = start, limits
        named = [ReplicaGroup(number, address_file=address_file) for number in range(count)]
        self._groups = [_Group(group, start(group)) for group in named]
        self._problems: list[str] = []
        self._passed_on = False

    def run(self) -> Ended:
        """Watch until the run has ended."""
        while True:
            if stopping.insisted():
                self.kill()
                return Ended(stopping.exit_code(signal.SIGINT), ("the run was ended without saving, as asked",))
            if stopping.requested() and not self._passed_on:
                self._passed_on = True
                self._send(signal.SIGTERM)
            for group in self._groups:
                self._look_at(group)
            codes = [group.code for group in self._groups if group.code is not None]
            final = next((code for code in (DONE, *STOPPED, MISTAKE, DIVERGED) if code in codes), None)
            if final is not None:
                return self._conclude(final)
            if not any(_goes_on(group) for group in self._groups):
                problems = (*self._problems[-len(self._groups) :], "no replica group is left that could go on")
                about = Failure("killed", 0, platform.node(), os.getpid(), "training", outside=True)
                return Ended(FAILED, problems, failure=replace(about, noticed_at=time.monotonic()))
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """End what still runs, at once."""
        for group in self._groups:
            if group.process is not None and group.process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    for child in psutil.Process(group.process.pid).children(recursive=True):
                        with contextlib.suppress(psutil.Error):
                            child.kill()
                group.process.kill()
                group.process.wait()

    def _send(self, number: int) -> None:
        for group in self._groups:
            if group.process is not None and group.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    group.process.send_signal(number)

    def _look_at(self, group: _Group) -> None:
        if group.process is None:
            if group.due is not None and time.monotonic() >= group.due and not stopping.requested():
                group.group.joined_file.unlink(missing_ok=True)
                group.due, group.process = None, self._start(group.group)
            return
        code = group.process.poll()
        if code is None:
            return
        group.process = None
        if code in (DONE, *STOPPED) or (self._passed_on and code == -signal.SIGTERM):
            group.code = code if code >= 0 else stopping.exit_code(signal.SIGTERM)
        elif code in (MISTAKE, DIVERGED) and not (group.group.rejoins and self._others(group)):
            group.code = code
        else:
            self._lost(group, code)

    def _others(self, group: _Group) -> bool:
        return any(_goes_on(one) for one in self._groups if one is not group)

    def _lost(self, group: _Group, code: int) -> None:
        newest = self._limits.newest()
        group.failures = 1 if newest != group.newest else group.failures + 1
        group.newest, group.group = newest, replace(group.group, rejoins=True)
        what = f"replica group {group.group.number} of {len(self._groups)} was lost (exit code {code})"
        self._problems.append(what)
        if not self._others(group):
            return
        if group.failures > self._limits.restarts or code == MISTAKE:
            tell(f"{what}, and stays away; the others go on without it", level=logging.ERROR)
            return
        wait = min(_LONGEST_BACKOFF_SECONDS, self._limits.backoff_seconds * 2 ** (group.failures - 1))
        group.due = time.monotonic() + wait
        count = f"{group.failures} of {self._limits.restarts}"
        tell(f"restart    {what}; the others go on, and it is started again in {wait:g} s ({count})")

    def _conclude(self, final: int) -> Ended:
        """Let the other groups end, which come to the same end, and return that."""
        seconds = _SAVE_SECONDS if final in STOPPED else _LAST_SECONDS
        deadline = time.monotonic() + seconds
        while any(group.process and group.process.poll() is None for group in self._groups):
            if time.monotonic() > deadline or stopping.insisted():
                self.kill()
            time.sleep(_POLL_SECONDS)
        return Ended(final)


def _goes_on(group: _Group) -> bool:
    """Whether a group runs and has the state of the run, which one that comes back has only when it has joined."""
    return group.process is not None and (not group.group.rejoins or group.group.joined_file.exists())


def group_worker(words: list[str]) -> int:
    """Be the supervisor of one group: `group FILE`, which holds the command and the environments of its ranks.

    Args:
        words: the file.
    """
    threading.Thread(target=stop_with_launcher, daemon=True).start()
    plan = json.loads(Path(words[0]).read_text())
    supervision = Supervision(plan["timeout_seconds"], Path(plan["stacks"]), warn=warn, grace_seconds=_GRACE_SECONDS)
    ended = run_local(plan["command"], plan["environments"], announce=False, supervision=supervision)
    for problem in ended.problems:
        tell(problem, level=logging.ERROR)
    return ended.code


def stop_with_launcher() -> None:
    """Ask this process to stop when its standard input ends: the launcher at the other end has gone."""
    while sys.stdin.buffer.read(4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
