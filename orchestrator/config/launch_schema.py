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
    grace_seconds: float | None = 300.0  # terminationGracePeriodSeconds: must cover a step and a save
    namespace: str = "default"
    image: str | None = None  # with the product in it, such as Containerfile makes
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    python: str = "python"  # the interpreter in the image
    topology: str | None = None  # of a TPU slice, in chips: 4x4, 2x2x2
    slices: int = 1  # TPU slices; launch.nodes counts the hosts of all of them
    network: Literal["none", "efa", "infiniband", "gke-rdma"] = "none"  # between the hosts, beside the pod's own
    network_devices: int | None = None  # of a host: EFA interfaces, RDMA devices, RDMA networks
    network_resource: str = "rdma/ib"  # the name that the cluster's device plugin gives to InfiniBand
    compute_domain: bool = False  # GB200 and GB300 racks: memory shared over NVLink between hosts (IMEX)
    instance_type: str | None = None  # of the nodes, such as trn2.48xlarge
    cpu: str | None = None  # of a pod, such as "96" or "500m"; null: what the node has left
    memory: str | None = None  # of a pod, such as 1500Gi
    shm: str | None = "16Gi"  # /dev/shm, which counts as memory of the pod; null: the runtime's 64 MiB
    claim: str | None = None  # a PersistentVolumeClaim that all pods may write, for runs and checkpoints
    work_dir: str = "/work"  # in the container, where paths such as runs_dir begin; the claim is mounted there
    secrets: tuple[str, ...] = ()  # names of Secrets whose entries become variables: credentials of stores
    service_account: str | None = None
    queue: str | None = None  # of Kueue: a LocalQueue of the namespace
    queue_priority: str | None = None  # of Kueue: a WorkloadPriorityClass
    required_topology: str | None = None  # of Kueue: label of nodes within whose group all pods of a slice must be
    exclusive: str | None = "auto"  # label of nodes whose group runs one slice alone; auto: GKE's pool for TPUs
    priority_class: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[dict[str, str], ...] = ()
    labels: dict[str, str] = field(default_factory=dict)  # of the JobSet and its pods
    annotations: dict[str, str] = field(default_factory=dict)  # of the pods
    privileged: bool = False
    keep_seconds: int | None = None  # after its end, when the JobSet is deleted; null: it stays


@dataclass(frozen=True)
class SkypilotLaunch(LaunchBase):
    """A managed job of SkyPilot."""

    name: Literal["skypilot"] = "skypilot"
    candidates: tuple[str, ...] = ()  # [INFRA/]ACCELERATOR[:COUNT][:spot], such as gcp/tpu-v6e-8:spot, H100:8
    choose: Literal["ordered", "cheapest"] = "ordered"  # the first one that is to be had, or the cheapest
    strategy: Literal["EAGER_NEXT_REGION", "FAILOVER"] = "EAGER_NEXT_REGION"  # FAILOVER tries the same region first
    runtime_version: str | None = None  # software of TPU machines; null: that of the generation
    image: str | None = None  # of a container with the product in it; null: setup installs it
    package: str = "lm-orchestrator"  # what setup installs without an image: a requirement of pip, or a path
    workdir: str | None = None  # a folder of this machine that is copied to every host
    neuron_index: str | None = None  # AWS's package index, from which setup installs torch-neuronx on Trainium
    disk_gb: int | None = None  # of each host
    secrets: tuple[str, ...] = ()  # variables of this machine that the job gets: names alone stand in the file


@dataclass(frozen=True)
class RayLaunch(LaunchBase):
    """A job on a Ray cluster."""

    name: Literal["ray"] = "ray"
    address: str | None = None  # of the cluster's dashboard, http://HOST:8265; null: RAY_ADDRESS
    python: str = "python"  # the interpreter of the hosts, with Ray and the product
    cpus: float = 1.0  # of each host's worker, as Ray counts them
    resources: dict[str, float] = field(default_factory=dict)  # further ones of each worker, such as TPU: 4


LaunchConfig: TypeAlias = (
    LocalLaunch | TorchrunLaunch | SshLaunch | SlurmLaunch | KubernetesLaunch | SkypilotLaunch | RayLaunch
)
