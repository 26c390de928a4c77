"""torchrun: in the foreground of this terminal; on several hosts the same command is given on each."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NoReturn, cast

from orchestrator.config.launch_schema import TorchrunLaunch
from orchestrator.engines.engine import Engine, EngineStatus, Rendered, State
from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.submission import Submission
from orchestrator.engines.torchrun_command import (
    torchrun_environment,
    torchrun_problems,
    torchrun_script,
    torchrun_words,
)
from orchestrator.errors import ConfigError, LaunchError, UserError, shown
from orchestrator.installing import importable

SCRIPT = "torchrun.sh"
_ENDPOINT = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_STATES: dict[str, State] = {"finished": "finished", "failed": "failed", "diverged": "failed"}


class TorchrunEngine(Engine):
    """torchrun on this machine, one agent per host."""

    name = "torchrun"
    state = "ran on CPU processes of one host; never on several real hosts"
    clients: ClassVar[tuple[str, ...]] = ()
    in_foreground = True

    def render(self, job: EngineJob) -> Rendered:
        """See `Engine`."""
        launch = cast(TorchrunLaunch, job.config.launch)
        words = torchrun_words(job, sys.executable, launch.endpoint)
        script = torchrun_script(words, {**importable(), **torchrun_environment(job)}, os.getcwd())
        return Rendered({SCRIPT: script}, ("sh", str(job.folder / SCRIPT)))

    def problems(self, job: EngineJob, rendered: Rendered) -> Sequence[UserError]:
        """See `Engine`."""
        endpoint = cast(TorchrunLaunch, job.config.launch).endpoint
        found: list[UserError] = list(torchrun_problems(job))
        if job.nodes > 1 and endpoint is None:
            what, fix = "several hosts need a place to meet", "launch.endpoint=FIRST_HOST:29500, the same on all"
            found.append(ConfigError(what, got=f"launch.nodes={job.nodes}", fix=fix))
        if job.nodes > 1 and job.config.run_id is None:
            what, fix = "the hosts have to call the run by one name", "run_id=NAME, the same on all hosts"
            found.append(ConfigError(what, got="run_id=null", fix=fix))
        match = None if endpoint is None else _ENDPOINT.fullmatch(endpoint)
        if endpoint is not None and not (match and 0 < int(match[2]) < 1 << 16):
            found.append(ConfigError("'launch.endpoint' is no HOST:PORT", got=shown(endpoint)))
        return found

    def submit(self, job: EngineJob, rendered: Rendered) -> NoReturn:
        """Become torchrun: its signals, lines and exit code are those of this process."""
        os.execvp(rendered.submit[0], rendered.submit)

    def status(self, submitted: Submission) -> EngineStatus:
        """See `Engine`."""
        from orchestrator.runs import run_directory  # with NumPy, which --help does without

        host, _, pid = submitted.id.rpartition(":")
        if host == socket.gethostname() and _runs(int(pid), submitted.run_id):
            return EngineStatus("running", f"process {pid}", (host,))
        status = str(run_directory.read_run(submitted.folder.parent).get("status", "unknown"))
        return EngineStatus(_STATES.get(status, "unknown"), f"run.json: {status}", (host,))

    def lines(self, submitted: Submission, follow: bool) -> Iterator[str]:
        """See `Engine`."""
        raise LaunchError(
            "the lines of torchrun are on the terminal that it was started from",
            got=submitted.id,
            fix=f"python -m orchestrator watch {submitted.folder.parent}",
        )

    def cancel(self, submitted: Submission) -> None:
        """See `Engine`."""
        host, _, pid = submitted.id.rpartition(":")
        if host != socket.gethostname() or not _runs(int(pid), submitted.run_id):
            raise LaunchError("there is no such process on this host", got=submitted.id, fix=f"look on {shown(host)}")
        os.kill(int(pid), signal.SIGTERM)


def _runs(pid: int, run_id: str) -> bool:
    """Whether the process is still the agent of this run, and not another one that got its number."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return f"--rdzv-id={run_id}" in words
