"""Which process of a job this is, as the engine that started it says.

Three engines are recognised by their environment: the product's own launcher, torchrun, and Slurm's srun.
Each is one function in `_DETECTORS`. Where none of them has started the process, the hosts of a TPU slice know each
other by Google's variables: `tpu_world`, which the target asks for when it is to drive the chips.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orchestrator.errors import HardwareError

OWN_PREFIX = "ORCHESTRATOR_"


@dataclass(frozen=True)
class World:
    """This process among those of the job.

    Attributes:
        store: where the processes meet: `file:<path>`, `tcp:<host>:<port>`, or empty for a single process.
        attempt: restarts so far; keeps a restarted job from meeting the ghosts of the last one.
        engine: who started the processes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: str = ""
    attempt: int = 0
    engine: str = "none"

    @property
    def hosts(self) -> int:
        return max(1, self.size // self.local_size)

    def environment(self) -> dict[str, str]:
        """What the product's own launcher sets so that `detect` finds the same."""
        fields = ("rank", "size", "local_rank", "local_size", "store", "attempt")
        return {OWN_PREFIX + field.upper(): str(getattr(self, field)) for field in fields}


def detect(environ: Mapping[str, str]) -> World | None:
    """The world that the environment describes; None where nobody has started several processes.

    Raises:
        HardwareError: an engine is there and its variables are incomplete, no numbers, or contradict each other.
    """
    for detector in _DETECTORS:
        try:
            world = detector(environ)
            if world is not None:
                _check(world)
        except (LookupError, ValueError) as error:
            raise HardwareError(
                f"the environment of {detector.__name__.removeprefix('_')} is incomplete or contradicts itself",
                got=repr(error),
                fix="start the job through torchrun or srun, or unset their variables",
            ) from error
        if world is not None:
            return world
    return None


def _check(world: World) -> None:
    if not (0 <= world.rank < world.size and 0 <= world.local_rank < world.local_size <= world.size):
        raise ValueError(f"rank {world.rank} of {world.size}, on this host {world.local_rank} of {world.local_size}")


def _orchestrator(env: Mapping[str, str]) -> World | None:
    if OWN_PREFIX + "RANK" not in env:
        return None
    numbers = {
        field: int(env[OWN_PREFIX + field.upper()]) for field in ("rank", "size", "local_rank", "local_size", "attempt")
    }
    return World(**numbers, store=env[OWN_PREFIX + "STORE"], engine="orchestrator")


def _torchrun(env: Mapping[str, str]) -> World | None:
    if "TORCHELASTIC_RUN_ID" not in env and not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(env):
        return None
    return World(
        rank=int(env["RANK"]),
        size=int(env["WORLD_SIZE"]),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        local_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
        store=f"tcp:{env['MASTER_ADDR']}:{env['MASTER_PORT']}",
        attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
        engine="torchrun",
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


_DETECTORS: tuple[Callable[[Mapping[str, str]], World | None], ...] = (_orchestrator, _torchrun, _slurm)


TPU_PORT = 29500  # where MASTER_PORT says no other; torchrun's usual one


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
        store = f"tcp:{first}:{int(env.get('MASTER_PORT', TPU_PORT))}"
    except (LookupError, ValueError) as error:
        raise HardwareError(
            "the variables of the TPU slice (TPU_WORKER_*, MEGASCALE_*) are incomplete or contradict each other",
            got=repr(error),
            fix="set them as the machine's metadata or GKE has them, or for a single host only: "
            "TPU_WORKER_HOSTNAMES=localhost TPU_WORKER_ID=0, and no MEGASCALE_*",
        ) from error
    return World(index * per_slice + worker, slices * per_slice, store=store, engine="tpu")


def first_host(nodelist: str) -> str:
    """First name of a Slurm host list: `gpu[03-07,9],x1` -> `gpu03`."""
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
