"""A Slurm cluster of two nodes on one machine: see scripts/cluster. Only the standard library."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
MARK = "orchestrator-cluster"  # file that says whose a folder is
_SECONDS = 30.0
# A requeued job waits for as long as a credential lives. A node is taken for lost after SlurmdTimeout.
CONFIGURATION = """\
ClusterName=orchestrator
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=3
MessageTimeout=5
KillWait=10
InactiveLimit=0
MinJobAge=3600
MailProg=/bin/true
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=1000 State=UNKNOWN\n"


class ClusterError(Exception):
    """The cluster cannot be had here; the message says why."""


def unusable() -> str:
    """Say why no cluster can be started here; nothing where it can."""
    if sys.platform != "linux":
        return "Slurm runs on Linux"
    if os.geteuid() != 0:
        return "its daemons want to be root"
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing and shutil.which("apt-get") is None:
        return f"{', '.join(missing)} are missing, and this is no Debian"
    return ""


def install() -> None:
    """Install what is missing by apt."""
    if all(_program(name) for name in PROGRAMS):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "--quiet", *words], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ClusterError(f"apt-get {words[0]} fails: {(done.stderr or done.stdout).strip()[-500:]}")


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """The cluster of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Start it, and wait until both nodes take jobs."""
        if reason := unusable():
            raise ClusterError(f"there can be no Slurm cluster here: {reason}")
        install()
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            raise ClusterError(f"{self.folder} is there already: stop it first, or name another folder") from None
        (self.folder / MARK).touch()
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(0o400)
        key.write_bytes(secrets.token_bytes(128))
        host, ports = socket.gethostname().partition(".")[0], _free_ports(1 + len(NODES))
        text = CONFIGURATION.format(host=host, folder=self.folder, ports=ports)
        text += "".join(NODE.format(name=n, host=host, port=p) for n, p in zip(NODES, ports[1:], strict=True))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        munge = [f"--{name}={self.folder}/munge.{end}" for name, end in _MUNGE.items()]
        self._run("munged", "--force", *munge)
        _wait(lambda: (self.folder / "munge.socket").exists(), "munged does not answer")
        self._run("slurmctld")
        for node in NODES:
            self.boot(node)
        self.wait_idle()

    def wait_idle(self) -> None:
        """Wait until both nodes take jobs."""
        _wait(lambda: self._sinfo().count("idle") == len(NODES), f"the nodes do not come up: see {self.folder}/*.log")

    def boot(self, node: str) -> None:
        """Start a node's daemon."""
        self._run("slurmd", "-N", node)

    def kill(self, node: str) -> None:
        """End a node's daemon and all processes of its jobs at once."""
        pids = self._of_node(node)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)  # so that none can tell of another's end
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def status(self) -> str:
        """Return what Slurm says of nodes and jobs."""
        jobs = subprocess.run(["squeue"], capture_output=True, text=True, env=self.environment).stdout
        return f"{self._sinfo()}{jobs}\nexport SLURM_CONF={self.folder}/slurm.conf"

    def stop(self) -> None:
        """End everything that was started, and remove the folder."""
        if not (self.folder / MARK).is_file():
            raise ClusterError(f"{self.folder} is no cluster of scripts/cluster")
        pids = [pid for node in NODES for pid in self._of_node(node)]
        daemons = [self._pid(name) for name in ("slurmctld.pid", "munge.pid")]
        for pid in [*pids, *(pid for pid in daemons if pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder)

    def _sinfo(self) -> str:
        words = ["sinfo", "--Node", "--noheader", "--format=%N %T"]
        return subprocess.run(words, capture_output=True, text=True, env=self.environment).stdout

    def _run(self, name: str, *words: str) -> None:
        done = subprocess.run([_program(name) or name, *words], env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"{name} does not start: {(done.stderr or done.stdout).strip()[-500:]}")

    def _pid(self, name: str) -> int | None:
        try:
            return int((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def _of_node(self, node: str) -> list[int]:
        """Return the daemon, and the processes of its jobs with the step daemons above them."""
        found = {}
        daemon = self._pid(f"slurmd-{node}.pid")
        if daemon and self._is_ours(daemon):
            found[daemon] = None
        for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
            if self._is_ours(pid) and _environ(pid).get("SLURMD_NODENAME") == node:
                found[pid] = None
                parent = _parent(pid)
                if parent and self._is_ours(parent) and _command(parent).startswith("slurmstepd"):
                    found[parent] = None
        return list(found)

    def _is_ours(self, pid: int) -> bool:
        return _environ(pid).get("SLURM_CONF") == self.environment["SLURM_CONF"]


_MUNGE = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def _environ(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return {name: value for name, _, value in (entry.partition("=") for entry in text.split("\0"))}


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait(condition: Callable[[], bool], problem: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(problem)
        time.sleep(0.1)


def main(words: list[str]) -> int:
    """Run a command of scripts/cluster."""
    commands = {"start": 0, "status": 0, "stop": 0, "kill": 1, "boot": 1}
    kind, command, *rest = [*words, "", ""][:2] + words[2:]
    if kind != "slurm" or command not in commands or len(rest) - commands[command] not in (0, 1):
        print("usage: scripts/cluster slurm start|status|stop [FOLDER], or kill|boot NODE [FOLDER]", file=sys.stderr)
        return 2
    arguments, folder = rest[: commands[command]], rest[commands[command] :]
    cluster = Cluster(Path(*folder) if folder else Path(tempfile.gettempdir()) / MARK)
    if arguments and arguments[0] not in NODES:
        print(f"error: there is no node {arguments[0]}: {', '.join(NODES)}", file=sys.stderr)
        return 2
    try:
        getattr(cluster, command)(*arguments) if command != "status" else print(cluster.status())
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if command == "start":
        print(cluster.status())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
