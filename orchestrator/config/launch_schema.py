"""The `launch` group of the configuration: where the job runs, and how often it is started again."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class SshLaunch(LaunchBase):
    """torchrun on hosts that are reached by ssh."""

    name: Literal["ssh"] = "ssh"
    hosts: tuple[str, ...] = ()  # names or addresses; the first one keeps the rendezvous


@dataclass(frozen=True)
class SlurmLaunch(LaunchBase):
    """A batch job of Slurm."""

    name: Literal["slurm"] = "slurm"


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
