"""Detect which process of a job this is, from the variables of the engine that started it.

Recognised by their environment are the product's own launcher, torchrun, whoever sets the variables that
torch.distributed reads, Slurm's srun, and MPI's launchers. Each is one function in `_DETECTORS`. Where none of them
has started the process, the hosts of a TPU slice know each other by Google's variables: `tpu_world`, which the target
asks for when it is to drive the chips.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from orchestrator.errors import HardwareError

OWN_PREFIX = "ORCHESTRATOR_"
LAUNCHED = OWN_PREFIX + "LAUNCHED"  # the engine by which `launch` has started this process
DEFAULT_PORT = 29500  # where MASTER_PORT says no other; torchrun's usual one


@dataclass(frozen=True)
class World:
    """This process among those of the job.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its host.
        local_size: number of processes on its host.
        store: where the processes meet: `file:<path>`, `tcp:<host>:<port>`, or empty for a process that is alone.
        attempt: restarts so far; keeps a restarted job apart from processes of the last attempt.
        engine: who started the processes.
        store_is_kept: the engine keeps the store at that address, for all its starts of the job; else the first
            process opens it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: str = ""
    attempt: int = 0
    engine: str = "none"
    store_is_kept: bool = False

    @property
    def hosts(self) -> int:
        """Number of hosts; at least 1."""
        return max(1, self.size // self.local_size)

    def environment(self) -> dict[str, str]:
        """Return the variables that the product's own launcher sets so that `detect` finds the same world."""
        fields = ("rank", "size", "local_rank", "local_size", "store", "attempt")
        return {OWN_PREFIX + field.upper(): str(getattr(self, field)) for field in fields}


def detect(environ: Mapping[str, str]) -> World | None:
    """Detect the world that the environment describes; None where no engine has started several processes.

    Args:
        environ: environment variables of this process.

    Raises:
        HardwareError: an engine is there and its variables are incomplete, no numbers, or contradict each other.
    """
    for engine, detector in _DETECTORS.items():
        try:
            world = detector(environ)
            if world is not None:
                _check(world)
        except (LookupError, ValueError) as error:
            raise HardwareError(
                f"the environment of {engine} is incomplete or contradicts itself",
                got=f"{error.args[0]} is not set" if isinstance(error, KeyError) else str(error),
                fix="start the job through torchrun or srun, or unset their variables",
            ) from error
        if world is not None:
            return world
    return None


def first_process() -> bool:
    """Whether this process speaks for the job: of those that an engine started, it is the first."""
    try:
        world = detect(os.environ)
    except HardwareError:
        return True  # said where the world is asked for
    return world is None or world.rank == 0


def _check(world: World) -> None:
    if not (0 <= world.rank < world.size and 0 <= world.local_rank < world.local_size <= world.size):
        raise ValueError(f"rank {world.rank} of {world.size}, on this host {world.local_rank} of {world.local_size}")


def _orchestrator(env: Mapping[str, str]) -> World | None:
    if OWN_PREFIX + "RANK" not in env:
        return None

    def number(field: str) -> int:
        return int(env[OWN_PREFIX + field])

    return World(
        number("RANK"),
        number("SIZE"),
        number("LOCAL_RANK"),
        number("LOCAL_SIZE"),
        store=env[OWN_PREFIX + "STORE"],
        attempt=number("ATTEMPT"),
        engine="orchestrator",
    )


def _torchrun(env: Mapping[str, str]) -> World | None:
    if "TORCHELASTIC_RUN_ID" not in env:
        return None
    # TORCHELASTIC_RESTART_COUNT is each agent's own: one that joined later has counted less. With a store of the
    # agents' the processes of one start find each other without it (`ProcessCoordinator`); another store is new at
    # every start.
    kept = env.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    return replace(_by_torch_variables(env), engine="torchrun", store_is_kept=kept)


def _variables(env: Mapping[str, str]) -> World | None:
    return _by_torch_variables(env) if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(env) else None


def _by_torch_variables(env: Mapping[str, str]) -> World:
    """Read the variables of torch.distributed's `env://`, which Kubeflow, SageMaker and wrappers set."""
    return World(
        rank=int(env["RANK"]),
        size=int(env["WORLD_SIZE"]),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        local_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
        store=f"tcp:{env['MASTER_ADDR']}:{env['MASTER_PORT']}",
        engine=BY_VARIABLES,
    )


def _slurm(env: Mapping[str, str]) -> World | None:
    # A batch script or an interactive shell has a job and no step: there the product starts its own processes.
    # In an interactive step (salloc) SLURM_NTASKS is the job's, and only SLURM_STEP_NUM_TASKS says that it is one.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    if "SLURM_STEP_ID" not in env or tasks < 2 or env.get("SLURM_STEP_NODELIST") is None:
        return None
    port = 20000 + int(env["SLURM_JOB_ID"]) % 20000
    return World(
        rank=int(env["SLURM_PROCID"]),
        size=tasks,
        local_rank=int(env["SLURM_LOCALID"]),
        local_size=_tasks_on_node(env["SLURM_STEP_TASKS_PER_NODE"], int(env["SLURM_NODEID"])),
        store=f"tcp:{first_host(env['SLURM_STEP_NODELIST'])}:{port}",
        attempt=int(env.get("SLURM_RESTART_COUNT", "0")),
        engine="slurm",
    )


# rank, size, rank and processes on this host: Open MPI; Intel MPI and MPICH, of which the first has the last two.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def _mpi(env: Mapping[str, str]) -> World | None:
    for names in _MPI:
        if int(env.get(names[1], "1")) > 1:
            rank, size, local_rank, local_size = (int(env[name]) for name in names)
            # MPI gives no address. On one host none is needed.
            address = "localhost" if local_size == size else env["MASTER_ADDR"]
            store = f"tcp:{env.get('MASTER_ADDR', address)}:{int(env.get('MASTER_PORT', DEFAULT_PORT))}"
            return World(rank, size, local_rank, local_size, store, engine="mpirun")
    return None


BY_VARIABLES = "the variables RANK, WORLD_SIZE and MASTER_ADDR"
_DETECTORS: dict[str, Callable[[Mapping[str, str]], World | None]] = {
    "orchestrator": _orchestrator,
    "torchrun": _torchrun,
    BY_VARIABLES: _variables,
    "slurm": _slurm,
    "mpirun": _mpi,
}


def tpu_world(env: Mapping[str, str]) -> World | None:
    """One process per host, over the hosts of a TPU slice and over the slices; None for a single host.

    Ranks go through one slice after the other, and the coordinator between the slices is on the first host of the
    first one, as jax's `cloud_tpu_cluster.py` has it.

    Args:
        env: TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, within the slice; MEGASCALE_NUM_SLICES, MEGASCALE_SLICE_ID and
            MEGASCALE_COORDINATOR_ADDRESS where there are several slices.

    Raises:
        HardwareError: they are incomplete, no numbers, or contradict each other.
    """
    try:
        hosts = [name.strip() for name in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()]
        per_slice, slices = max(1, len(hosts)), int(env.get("MEGASCALE_NUM_SLICES", "1"))
        if per_slice * slices == 1:
            return None
        worker = int(env["TPU_WORKER_ID"]) if per_slice > 1 else 0
        index, first = 0, hosts[0] if hosts else ""
        if slices != 1:
            index = int(env["MEGASCALE_SLICE_ID"])
            first = env["MEGASCALE_COORDINATOR_ADDRESS"].partition(":")[0]
        if not (first and 0 <= worker < per_slice and 0 <= index < slices):
            raise ValueError(f"host {worker} of {per_slice} in slice {index} of {slices}, which meet at '{first}'")
        store = f"tcp:{first}:{int(env.get('MASTER_PORT', DEFAULT_PORT))}"
    except (LookupError, ValueError) as error:
        raise HardwareError(
            "the variables of the TPU slice (TPU_WORKER_*, MEGASCALE_*) are incomplete or contradict each other",
            got=repr(error),
            fix="set them as the machine's metadata or GKE has them, or for a single host only: "
            "TPU_WORKER_HOSTNAMES=localhost TPU_WORKER_ID=0, and no MEGASCALE_*",
        ) from error
    return World(index * per_slice + worker, slices * per_slice, store=store, engine="tpu")


def first_host(nodelist: str) -> str:
    """Return the first name of a Slurm host list: `gpu[03-07,9],x1` -> `gpu03`.

    Args:
        nodelist: as `SLURM_JOB_NODELIST` has it.
    """
    head = re.match(r"(?:[^,\[\]]|\[[^\],-][^\]]*\])+(?=,|$)", nodelist)
    if head is None:
        raise ValueError(nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head[0])


def _tasks_on_node(text: str, node: int) -> int:
    """Entry `node` of Slurm's `4(x2),3`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(text)
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node]
