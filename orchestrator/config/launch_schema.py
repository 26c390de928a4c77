"""The `launch` group of the configuration: where the job runs, and how often it is started again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class LaunchBase:
    """What every way of starting a job has."""

    nodes: int = 1  # hosts
    max_restarts: int = 3  # failures in a row, without a new checkpoint between them, after which nothing is restarted
    backoff_seconds: float = 1.0  # before the first restart; doubled for each further one, at most 60
    grace_seconds: float | None = None  # that the engine leaves between SIGTERM and SIGKILL; null: not known
    notices: Literal["auto", "gce", "ec2", "none"] = "auto"  # whose metadata says that a host will be taken away
    fault_tolerance: Literal["restart", "torchft"] = "restart"


@dataclass(frozen=True)
class LocalLaunch(LaunchBase):
    """The processes of this machine, started and supervised by the product itself."""

    name: Literal["local"] = "local"


@dataclass(frozen=True)
class TorchrunLaunch(LaunchBase):
    """torchrun on this machine, or the command line for every host."""

    name: Literal["torchrun"] = "torchrun"
    endpoint: str | None = None  # HOST:PORT of the rendezvous, on several hosts; null: this host alone
    min_nodes: int | None = None  # hosts that are enough to go on; null: all
    environment: dict[str, str] = field(default_factory=dict)  # variables of the processes


@dataclass(frozen=True)
class SshLaunch(LaunchBase):
    """torchrun on hosts that are reached by ssh."""

    name: Literal["ssh"] = "ssh"
    hosts: tuple[str, ...] = ()  # names, addresses or [USER@]HOST; the first one keeps the rendezvous
    address: str | None = None  # of the first host, as the others reach it; null: its name in hosts
    port: int = 29500  # of the rendezvous
    min_nodes: int | None = None  # hosts that are enough to go on; null: all
    directory: str | None = None  # where the command runs on the hosts; null: this folder
    python: str | None = None  # interpreter on the hosts; null: this one
    ssh_config: str | None = None  # file that ssh reads in place of ~/.ssh/config
    environment: dict[str, str] = field(default_factory=dict)  # variables of the processes


@dataclass(frozen=True)
class SlurmLaunch(LaunchBase):
    """A batch job of Slurm."""

    name: Literal["slurm"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None  # features of the nodes: h100, or h100&ib
    time: str | int | None = None  # minutes, hours:minutes:seconds, days-hours
    mem: str | None = None  # of a node: 64G; 0: all of it
    cpus_per_task: int | None = None  # of a process; of the node's only process: of all that it starts
    gres: str | None = None  # of a node; null: gpu:N for cuda and rocm, where hardware.devices=N
    exclusive: bool | None = None  # nodes are shared with no other job; null: where devices are no gres
    signal_seconds: int = 120  # before the time limit, when the run is asked to save and stop; 0: never
    modules: tuple[str, ...] = ()  # that `module load` is to load
    environment: dict[str, str] = field(default_factory=dict)  # variables of the job
    efa: bool = False  # the nodes are of AWS, with its network adapter
    python: str | None = None  # interpreter on the nodes; null: this one, in a container `python`
    container_image: str | None = None  # docker://..., a file; null: none
    container_kind: Literal["pyxis", "apptainer"] = "pyxis"  # what runs it: srun's plugin, or apptainer
    container_mounts: tuple[str, ...] = ()  # FROM:TO, beside the working directory and runs_dir
    jobs_at_once: int | None = None  # of a sweep; null: all
    extra: dict[str, str] = field(default_factory=dict)  # more options of sbatch, without dashes: {mail-type: END}


@dataclass(frozen=True)
class KubernetesLaunch(LaunchBase):
    """A JobSet of Kubernetes."""

    name: Literal["kubernetes"] = "kubernetes"


@dataclass(frozen=True)
class SkypilotLaunch(LaunchBase):
    """A managed job of SkyPilot."""

    name: Literal["skypilot"] = "skypilot"


@dataclass(frozen=True)
class RayLaunch(LaunchBase):
    """A job on a Ray cluster."""

    name: Literal["ray"] = "ray"


LaunchConfig: TypeAlias = (
    LocalLaunch | TorchrunLaunch | SshLaunch | SlurmLaunch | KubernetesLaunch | SkypilotLaunch | RayLaunch
)
