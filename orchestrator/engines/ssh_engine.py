"""ssh: an agent of torchrun on each host, that goes on when this terminal has gone."""

from __future__ import annotations

import os
import queue
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar, cast

from orchestrator.config.launch_schema import SshLaunch
from orchestrator.engines.client import call_client, client_lines
from orchestrator.engines.engine import Engine, EngineStatus, Rendered, State
from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.submission import Submission
from orchestrator.engines.torchrun_command import torchrun_environment, torchrun_problems, torchrun_words
from orchestrator.errors import ConfigError, LaunchError, UserError, shown
from orchestrator.installing import importable

COMMANDS = "ssh.sh"
_INSTALL = "install OpenSSH's client (Debian: apt-get install openssh-client)"
_HOST = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*@)?([A-Za-z0-9_][A-Za-z0-9_.-]*|[0-9A-Fa-f:]+)")
_OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15")
_GRACE_SECONDS = 120.0
_POLL_SECONDS = 1.0
_CANCELLED = "cancelled"  # a file of this name tells that a job was cancelled: torchrun ends with 1 then


class SshEngine(Engine):
    """Hosts without a scheduler."""

    name = "ssh"
    state = "ran through a real sshd on one host, two agents; never on several real hosts"
    clients: ClassVar[tuple[str, ...]] = ("ssh",)

    def render(self, job: EngineJob) -> Rendered:
        """See `Engine`."""
        launch = cast(SshLaunch, job.config.launch)
        starts = [
            shlex.join([*_ssh(launch.ssh_config), host, _start(job, number)])
            for number, host in enumerate(launch.hosts)
        ]
        text = "\n".join(["#!/bin/sh", "# What starts the agents; each prints its process id.", *starts])
        return Rendered({COMMANDS: text + "\n"}, ("sh", str(job.folder / COMMANDS)))

    def problems(self, job: EngineJob, rendered: Rendered) -> Sequence[UserError]:
        """See `Engine`."""
        launch = cast(SshLaunch, job.config.launch)
        found: list[UserError] = list(torchrun_problems(job))
        if not launch.hosts:
            found.append(ConfigError("no host is named", got="launch.hosts=[]", fix="launch.hosts=[host-a,host-b]"))
        elif len(launch.hosts) != job.nodes:
            got = f"launch.nodes={job.nodes} with {len(launch.hosts)} launch.hosts"
            fix = f"set launch.nodes={len(launch.hosts)}"
            found.append(ConfigError("the number of hosts is not that of the nodes", got=got, fix=fix))
        for host in launch.hosts:
            if not _HOST.fullmatch(host):
                allowed = "a name or an address, also USER@HOST; ports and keys go into launch.ssh_config"
                found.append(ConfigError("no name of a host", got=shown(host), allowed=allowed))
        if len(set(launch.hosts)) < len(launch.hosts):
            found.append(ConfigError("a host is named twice", got=", ".join(map(shown, launch.hosts))))
        if not 0 < launch.port < 1 << 16:
            found.append(ConfigError("'launch.port' is out of range", got=launch.port, allowed="1 to 65535"))
        if launch.directory is not None and not launch.directory.startswith("/"):
            what = "'launch.directory' is a folder of other machines"
            found.append(ConfigError(what, got=shown(launch.directory), allowed="an absolute path"))
        if launch.address is not None and not _HOST.fullmatch(launch.address):
            found.append(ConfigError("'launch.address' is no name and no address", got=shown(launch.address)))
        return found

    def submit(self, job: EngineJob, rendered: Rendered) -> str:
        """See `Engine`."""
        launch = cast(SshLaunch, job.config.launch)
        started: list[str] = []
        try:
            for number, host in enumerate(launch.hosts):
                said = call_client([*_ssh(launch.ssh_config), host, _start(job, number)], _INSTALL).split()
                if not (said and said[-1].isdigit()):
                    raise LaunchError(f"{shown(host)} has answered with no process id", got=shown(" ".join(said)))
                started.append(said[-1])
        except LaunchError:
            for host, pid in zip(launch.hosts, started, strict=False):
                _signal(launch.ssh_config, host, pid, job.run_id, "KILL")
            raise
        return ",".join(started)

    def status(self, submitted: Submission) -> EngineStatus:
        """See `Engine`."""
        hosts, config = submitted.options["hosts"], submitted.options["ssh_config"]
        script = "ps -ww -o args= -p {pid} | grep -qF -e {mark} && echo running || cat {code} 2>/dev/null || echo gone"
        said = []
        for number, (host, pid) in enumerate(_agents(submitted)):
            code = shlex.quote(f"{_place(submitted.folder, number)}.code")
            text = script.format(pid=int(pid), mark=shlex.quote(_mark(submitted.run_id)), code=code)
            said.append(call_client([*_ssh(config), host, text], _INSTALL).strip())
        states = [_state(one) for one in said]
        order: tuple[State, ...] = ("running", "failed", "unknown", "finished")
        words = [f"{shown(host)}: {_word(one)}" for host, one in zip(hosts, said, strict=True)]
        state = next(one for one in order if one in states)
        if state != "running" and (submitted.folder / _CANCELLED).exists():
            state = "cancelled"
        return EngineStatus(state, ", ".join(words), tuple(hosts))

    def lines(self, submitted: Submission, follow: bool) -> Iterator[str]:
        """See `Engine`."""
        config, agents = submitted.options["ssh_config"], _agents(submitted)
        several = len(agents) > 1
        found: queue.Queue[str | LaunchError | None] = queue.Queue()

        def read(number: int, host: str, pid: str) -> None:
            path = shlex.quote(f"{_place(submitted.folder, number)}.log")
            text = f"tail -n +1 --pid={int(pid)} -F {path} 2>/dev/null" if follow else f"cat {path}"
            try:
                for line in client_lines([*_ssh(config), host, text], _INSTALL):
                    found.put(f"{host}: {line}" if several else line)
            except LaunchError as error:
                found.put(error)
            found.put(None)

        for number, (host, pid) in enumerate(agents):
            threading.Thread(target=read, args=(number, host, pid), daemon=True).start()
        left = len(agents)
        while left:
            one = found.get()
            left -= one is None
            if isinstance(one, LaunchError):
                raise one
            if one is not None:
                yield one

    def cancel(self, submitted: Submission) -> None:
        """See `Engine`."""
        config, agents = submitted.options["ssh_config"], _agents(submitted)
        (submitted.folder / _CANCELLED).touch()
        for host, pid in agents:
            _signal(config, host, pid, submitted.run_id, "TERM")
        deadline = time.monotonic() + _GRACE_SECONDS
        while self.status(submitted).state == "running":
            if time.monotonic() > deadline:
                for host, pid in agents:
                    _signal(config, host, pid, submitted.run_id, "KILL")
                return
            time.sleep(_POLL_SECONDS)


def _ssh(config: str | None) -> list[str]:
    return ["ssh", *_OPTIONS, *(["-F", config] if config else [])]


def _mark(run_id: str) -> str:
    return f"--rdzv-id={run_id}"


def _place(folder: Any, number: int) -> str:
    return str(PurePosixPath(folder) / f"host-{number}")


def _agents(submitted: Submission) -> list[tuple[str, str]]:
    return list(zip(submitted.options["hosts"], submitted.id.split(","), strict=True))


def _start(job: EngineJob, number: int) -> str:
    """Return what the shell of a host is given: it starts the agent, and prints its process id."""
    launch = cast(SshLaunch, job.config.launch)
    address = launch.address or launch.hosts[0].rpartition("@")[2]
    endpoint = f"[{address}]:{launch.port}" if ":" in address else f"{address}:{launch.port}"
    words = torchrun_words(job, launch.python or sys.executable, endpoint, is_host=number == 0)
    environment: Mapping[str, str] = {**({} if launch.python else importable()), **torchrun_environment(job)}
    folder, place = shlex.quote(str(job.folder)), _place(job.folder, number)
    variables = [f"{name}={value}" for name, value in environment.items()]
    # The agent is a session of its own, so that it outlives this connection, and is ended with all its processes.
    agent = f"{shlex.join(['env', *variables, *words])}; echo $? >{shlex.quote(f'{place}.code')}"
    start = f"setsid sh -c {shlex.quote(agent)} </dev/null >{shlex.quote(f'{place}.log')} 2>&1"
    here = shlex.quote(launch.directory or os.getcwd())
    return f"cd {here} && mkdir -p {folder} && {{ {start} & echo $!; }}"


def _signal(config: str | None, host: str, pid: str, run_id: str, name: str) -> None:
    """Signal the agent, or with KILL its whole session, if it is still that of this run."""
    whole = "-" if name == "KILL" else ""
    # The shell above the agent has the number of the session; the agent itself is the one that is asked to stop.
    found = f"ps -ww -o args= -p {int(pid)} | grep -qF -e {shlex.quote(_mark(run_id))}"
    kill = f"kill -s {name} -- {whole}{int(pid)}" if whole else f"pkill -{name} -P {int(pid)}"
    call_client([*_ssh(config), host, f"{found} && {kill}; true"], _INSTALL)


def _state(said: str) -> State:
    if said == "running":
        return "running"
    return "finished" if said == "0" else "unknown" if said == "gone" else "failed"


def _word(said: str) -> str:
    return {"running": "running", "gone": "no such process any more"}.get(said, f"exit code {shown(said)}")
