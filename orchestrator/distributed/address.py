"""Resolve the address of the first process of a job, where its name alone does not resolve."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping

from orchestrator.errors import HardwareError

_POLL_SECONDS = 1.0
_SCONTROL_SECONDS = 10.0


def reachable(host: str, environ: Mapping[str, str], wait_seconds: float, say: Callable[[str], object]) -> str:
    """Return a name of the host that resolves: itself, or else the address that Slurm knows of it.

    A name of Kubernetes may resolve only when its pod runs, so it is asked for again; Slurm's nodes are what they are.

    Args:
        host: name or address.
        environ: environment variables of this process.
        wait_seconds: how long a name is asked for.
        say: told once that the name does not resolve yet.

    Raises:
        HardwareError: it does not resolve.
    """
    if resolves(host):
        return host
    in_slurm = "SLURM_JOB_ID" in environ
    if in_slurm:
        for address in _slurm_addresses(host, environ):
            if resolves(address):
                say(f"the name '{host}' does not resolve here: taking {address}, which Slurm has for it")
                return address
    else:
        say(f"the name '{host}' does not resolve here: trying for {wait_seconds:g} s (hardware.timeout_seconds)")
        deadline = time.monotonic() + wait_seconds
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            if resolves(host):
                return host
    slurm = " and Slurm has no other address of it (scontrol show node)" if in_slurm else ""
    raise HardwareError(
        f"the name of the job's first host does not resolve on this one{slurm}",
        got=host,
        fix="give it an entry in DNS or /etc/hosts, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_PORT "
        "and MASTER_ADDR=<its address> for every process",
    )


def await_listener(host: str, port: int, wait_seconds: float) -> None:
    """Wait until a process listens at the address.

    Args:
        host: name or address.
        port: of the listener.
        wait_seconds: for how long.

    Raises:
        TimeoutError: none does in time; with the reason of the last attempt.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(_POLL_SECONDS, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody answers at {host}:{port}: {error.strerror or error}") from error
            time.sleep(min(_POLL_SECONDS, 0.2))


def resolves(host: str) -> bool:
    """Return whether this machine knows an address of the name.

    Args:
        host: name or address.
    """
    try:
        return bool(socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):
        return False


def _slurm_addresses(host: str, environ: Mapping[str, str]) -> Iterator[str]:
    # Cloud nodes: name:address:host name, ...
    for alias in environ.get("SLURM_NODE_ALIASES", "").split(","):
        name, _, rest = alias.partition(":")
        if name == host and rest:
            yield rest.partition(":")[0].strip("[]")
    if shutil.which("scontrol"):
        try:
            words = ["scontrol", "show", "node", "--oneliner", host]
            done = subprocess.run(words, capture_output=True, text=True, timeout=_SCONTROL_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return
        yield from re.findall(r"\bNode(?:Addr|HostName)=(\S+)", done.stdout)
