"""One host of a job whose hosts an engine has started, each with one command: it starts the processes of its devices.

Where an engine starts a container or a command per host, how many processes a host needs is known only there: eight
for eight GPUs, 64 for a trn2.48xlarge, one where a process drives all chips. `launch` sets these variables in what it
renders (Kubernetes, SkyPilot, Ray):

    ORCHESTRATOR_HOST         number of this host, from 0; with slices: within its slice
    ORCHESTRATOR_HOSTS        hosts of the job
    ORCHESTRATOR_STORE        tcp:NAME:PORT, where the processes meet: on the first host
    ORCHESTRATOR_ATTEMPT      starts of the job before this one, the same number on all hosts
    ORCHESTRATOR_SLICE        number of this host's slice, with ORCHESTRATOR_SLICE_HOSTS, the hosts of a slice
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.distributed.world import OWN_PREFIX, World
from orchestrator.errors import HardwareError

HOST, HOSTS, STORE, ATTEMPT, SLICE, SLICE_HOSTS = (
    OWN_PREFIX + name for name in ("HOST", "HOSTS", "STORE", "ATTEMPT", "SLICE", "SLICE_HOSTS")
)
VARIABLES = (HOST, HOSTS, STORE, ATTEMPT, SLICE, SLICE_HOSTS)
_STORE = re.compile(r"tcp:[^:\s]+:[0-9]{1,5}")


@dataclass(frozen=True)
class JobHost:
    """This host among those of the job.

    Attributes:
        number: of this host, from 0.
        count: hosts of the job.
        store: where the processes of all hosts meet, `tcp:<host>:<port>`.
        attempt: starts of the job before this one.
    """

    number: int
    count: int
    store: str
    attempt: int = 0

    def world(self, local_rank: int, local_size: int) -> World:
        """Return a process of this host among those of the job; every host has as many.

        Args:
            local_rank: number of the process on this host.
            local_size: processes of this host.
        """
        return World(
            rank=self.number * local_size + local_rank,
            size=self.count * local_size,
            local_rank=local_rank,
            local_size=local_size,
            store=self.store,
            attempt=self.attempt,
            engine="orchestrator",
        )


def job_host(environ: Mapping[str, str]) -> JobHost | None:
    """Return this host among those of the job; None where the job has no other, or says nothing of hosts.

    Args:
        environ: environment variables of this process.

    Raises:
        HardwareError: they are incomplete, no numbers, or contradict each other.
    """
    if not environ.get(HOSTS):
        return None
    try:
        count, host, attempt = int(environ[HOSTS]), int(environ[HOST]), int(environ.get(ATTEMPT) or 0)
        if index := int(environ.get(SLICE) or 0):
            host += index * int(environ[SLICE_HOSTS])
        if not (0 <= host < count and attempt >= 0):
            raise ValueError(f"host {host} of {count}, attempt {attempt}")
        if count == 1:
            return None
        if not _STORE.fullmatch(environ[STORE]):
            raise ValueError(f"{STORE}={environ[STORE]!r}")
        return JobHost(host, count, environ[STORE], attempt)
    except (LookupError, ValueError) as error:
        raise HardwareError(
            "the variables that say which host of the job this is are incomplete or contradict each other",
            got=f"{error.args[0]} is not set" if isinstance(error, KeyError) else str(error),
            allowed=f"{HOST} from 0 to {HOSTS} - 1, and {STORE}=tcp:NAME:PORT",
            fix="start the job by python -m orchestrator launch, or set all three on every host",
        ) from error
