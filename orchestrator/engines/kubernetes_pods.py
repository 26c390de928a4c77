"""What a pod of each kind of accelerator asks a cluster for: resources, nodes, networks, variables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.chips.load import load_catalogue
from orchestrator.config.launch_schema import KubernetesLaunch
from orchestrator.config.schema import HardwareConfig
from orchestrator.engines.engine_job import EngineJob
from orchestrator.errors import ConfigError, ConfigErrors, UserError, shown
from orchestrator.hardware.host import EFA_VARIABLES

TPU_RESOURCE = "google.com/tpu"
TPU_ACCELERATOR, TPU_TOPOLOGY = "cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"
NODE_POOL = "cloud.google.com/gke-nodepool"
INSTANCE_TYPE = "node.kubernetes.io/instance-type"
_TOPOLOGY = re.compile(r"[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}")


@dataclass(frozen=True)
class TpuKind:
    """A generation of TPU as GKE offers it: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.

    Attributes:
        chip: key of the chip catalogue.
        dims: of its topologies.
        limit: chips of the largest slice.
    """

    chip: str
    dims: int
    limit: int

    def hosts(self, topology: str) -> dict[int, int]:
        """Return the hosts that a slice of this topology may have -> the chips of each; empty where there is none such.

        Args:
            topology: such as `4x4`.
        """
        if not _TOPOLOGY.fullmatch(topology):
            return {}
        sides = [int(side) for side in topology.split("x")]
        chips = math.prod(sides)
        if len(sides) != self.dims or chips > self.limit:
            return {}
        if self.dims == 3:
            small = topology in ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
            whole = all(side % 4 == 0 for side in sides) and sides == sorted(sides)
            return {chips // 4: 4} if small or whole else {}
        # 2x4 is a machine of eight chips, or two of four.
        return _FLAT.get(topology, {})


_FLAT = {
    "1x1": {1: 1},
    "2x2": {1: 4},
    "2x4": {1: 8, 2: 4},
    "4x4": {4: 4},
    "4x8": {8: 4},
    "8x8": {16: 4},
    "8x16": {32: 4},
    "16x16": {64: 4},
}
TPU_KINDS: Mapping[str, TpuKind] = {
    "tpu-v4-podslice": TpuKind("tpu-v4", 3, 4096),
    "tpu-v5-lite-podslice": TpuKind("tpu-v5e", 2, 256),
    "tpu-v5p-slice": TpuKind("tpu-v5p", 3, 8960),
    "tpu-v6e-slice": TpuKind("tpu-v6e", 2, 256),
    "tpu7x": TpuKind("tpu-v7x", 3, 9216),
}
"""GKE's name of the accelerator -> what it is."""

_VENDORS = {"cuda": "nvidia", "rocm": "amd", "tpu": "google", "trainium": "aws", "cpu": "generic"}
_RESOURCES = {"cuda": "nvidia.com/gpu", "rocm": "amd.com/gpu", "trainium": "aws.amazon.com/neuron"}
_RACKS = ("gb200", "gb300")
_EFA = "vpc.amazonaws.com/efa"
_GIB = "/usr/local/gib"


@dataclass(frozen=True)
class PodNeeds:
    """What the pods of a job ask for.

    Attributes:
        slices: groups of pods, each a Job of its own.
        hosts: pods of a group.
        resources: extended ones of a pod.
        selector: labels that a node must have.
        variables: of the container.
        annotations: of the pod.
        host_paths: name -> (path of the node, path in the container).
        capabilities: of the container.
        script: to be sourced by a shell before the command; empty for none.
    """

    slices: int
    hosts: int
    resources: Mapping[str, int] = field(default_factory=dict)
    selector: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    host_paths: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    script: str = ""


def pod_needs(job: EngineJob, launch: KubernetesLaunch) -> PodNeeds:
    """Return what the pods of a job ask for.

    Args:
        job: what is to run.
        launch: its `launch` group.

    Raises:
        ConfigErrors: what cannot be asked for, or is left open.
    """
    hardware, problems = job.config.hardware, _chip_problems(job.config.hardware)
    if hardware.target == "tpu":
        needs, more = _tpu(job, launch)
    else:
        needs, more = _others(job, launch)
    network, wrong = _network(launch, hardware)
    problems += [*more, *wrong]
    if launch.compute_domain and hardware.chip not in _RACKS:
        what = "launch.compute_domain is for racks whose hosts share memory over NVLink"
        got = f"hardware={hardware.target} hardware.chip={hardware.chip}"
        problems.append(ConfigError(what, got=got, allowed=", ".join(_RACKS), fix="hardware.chip=gb200"))
    if problems:
        raise ConfigErrors(problems)
    selector = {**needs.selector, **launch.node_selector}
    if launch.instance_type is not None:
        selector[INSTANCE_TYPE] = launch.instance_type
    return PodNeeds(
        slices=needs.slices,
        hosts=needs.hosts,
        resources={**needs.resources, **network.resources},
        selector=selector,
        variables=network.variables,
        annotations=network.annotations,
        host_paths=network.host_paths,
        capabilities=network.capabilities,
        script=network.script,
    )


def _chip_problems(hardware: HardwareConfig) -> list[UserError]:
    if hardware.chip == "auto":
        return []
    try:
        chip = load_catalogue().get(hardware.chip)
    except ConfigError as error:
        return [error]
    if chip.vendor == _VENDORS.get(hardware.target, chip.vendor):
        return []
    what = "hardware.chip is none of hardware.target's"
    got = f"hardware.chip={hardware.chip} with hardware={hardware.target}"
    mine = ", ".join(one.key for one in load_catalogue() if one.vendor == _VENDORS[hardware.target])
    return [ConfigError(what, got=got, allowed=mine, fix="name the chip of the nodes, or leave it out")]


def _tpu(job: EngineJob, launch: KubernetesLaunch) -> tuple[PodNeeds, list[UserError]]:
    chip = job.config.hardware.chip
    found = [(name, kind) for name, kind in TPU_KINDS.items() if kind.chip == chip]
    if not found:
        allowed = ", ".join(kind.chip for kind in TPU_KINDS.values())
        fix = "hardware.chip=tpu-v6e"
        return PodNeeds(1, 1), [ConfigError("say which TPU", got=f"hardware.chip={chip}", allowed=allowed, fix=fix)]
    name, kind = found[0]
    by_hosts = kind.hosts(launch.topology) if launch.topology else {}
    if not by_hosts:
        example = "4x4" if kind.dims == 2 else "2x2x2"
        shapes = ", ".join(_FLAT) if kind.dims == 2 else "2x2x1, 2x2x2, 2x2x4, 2x4x4, then multiples of 4, ascending"
        got = f"launch.topology={'null' if launch.topology is None else shown(launch.topology)}"
        what, fix = f"a slice of {chip} has no such topology", f"launch.topology={example}"
        return PodNeeds(1, 1), [ConfigError(what, got=got, allowed=shapes, fix=fix)]
    problems: list[UserError] = []
    hosts, left = divmod(launch.nodes, max(1, launch.slices))
    if left or hosts not in by_hosts:
        problems.append(_wrong_hosts(launch, by_hosts))
        hosts = next(iter(by_hosts))
    devices = by_hosts[hosts] * load_catalogue().get(chip).logical_devices_per_chip
    if job.devices_per_node not in (None, devices):
        what = "a job has all devices of a TPU host"
        got = f"hardware.devices={job.devices_per_node}"
        problems.append(ConfigError(what, got=got, allowed=f"auto, or {devices} on this one", fix="leave it out"))
    selector = {TPU_ACCELERATOR: name, TPU_TOPOLOGY: str(launch.topology)}
    return PodNeeds(launch.slices, hosts, {TPU_RESOURCE: by_hosts[hosts]}, selector), problems


def _wrong_hosts(launch: KubernetesLaunch, by_hosts: Mapping[int, int]) -> ConfigError:
    slices = f"{launch.slices} slice{'s' if launch.slices > 1 else ''} of {launch.topology}"
    chips = math.prod(map(int, str(launch.topology).split("x")))
    allowed = [f"{each * launch.slices} ({each} hosts of {count} chips a slice)" for each, count in by_hosts.items()]
    return ConfigError(
        f"the topology's {chips} chips a slice are not hosts × chips of a host",
        got=f"launch.nodes={launch.nodes} with {slices}",
        allowed=" or ".join(allowed),
        fix=f"launch.nodes={next(iter(by_hosts)) * launch.slices}",
    )


def _others(job: EngineJob, launch: KubernetesLaunch) -> tuple[PodNeeds, list[UserError]]:
    hardware, problems = job.config.hardware, list[UserError]()
    if launch.topology is not None or launch.slices != 1:
        got = f"launch.topology={launch.topology} launch.slices={launch.slices} with hardware={hardware.target}"
        problems.append(ConfigError("only TPUs come in slices", got=got, fix="leave them out; hosts are launch.nodes"))
    resource = _RESOURCES.get(hardware.target)
    if resource is None and hardware.target != "cpu":
        allowed = "cuda, rocm, tpu, trainium, cpu"
        what = "a manifest has to name the accelerator: the hardware of another machine cannot be looked up"
        return PodNeeds(1, 1), [
            ConfigError(what, got=f"hardware={hardware.target}", allowed=allowed, fix="hardware=cuda")
        ]
    if resource is None:
        return PodNeeds(1, launch.nodes), problems
    if job.devices_per_node is None:
        fix = "hardware.devices=8, the GPUs of a host"
        if hardware.target == "trainium":
            fix = "hardware.devices=64, the logical NeuronCores of a trn2.48xlarge"
        what = f"say how many devices of a host a pod gets: '{resource}' of a manifest is a number"
        return PodNeeds(1, 1), [*problems, ConfigError(what, got="hardware.devices=auto", fix=fix)]
    count = job.devices_per_node
    problems += _more_than_a_host(hardware, count)
    if hardware.target == "trainium":
        chip = "trn2" if hardware.chip == "auto" else hardware.chip
        per_chip = load_catalogue().get(chip).logical_devices_per_chip if chip in load_catalogue().chips else 1
        if count % per_chip:
            what = "the logical NeuronCores of a pod are not whole chips"
            got, allowed = f"hardware.devices={count}", f"a multiple of {per_chip}, those of a {chip} chip"
            problems.append(
                ConfigError(
                    what, got=got, allowed=allowed, fix=f"hardware.devices={count // per_chip * per_chip or per_chip}"
                )
            )
        count //= per_chip
    return PodNeeds(1, launch.nodes, {resource: max(1, count)}), problems


def _more_than_a_host(hardware: HardwareConfig, count: int) -> list[ConfigError]:
    catalogue = load_catalogue()
    chip = catalogue.chips.get(hardware.chip)
    if chip is None or chip.topology.chips_per_host is None:
        return []
    most = chip.topology.chips_per_host * chip.logical_devices_per_chip
    if count <= most:
        return []
    what = f"a host has not so many devices of {chip.key}"
    got = f"hardware.devices={count}"
    return [
        ConfigError(what, got=got, allowed=f"1 to {most}", fix=f"hardware.devices={most}, and more hosts: launch.nodes")
    ]


def _network(launch: KubernetesLaunch, hardware: HardwareConfig) -> tuple[PodNeeds, list[UserError]]:
    kind, count = launch.network, launch.network_devices
    if kind == "none":
        if count is None:
            return PodNeeds(1, 1), []
        got = f"launch.network_devices={count} with launch.network=none"
        return PodNeeds(1, 1), [ConfigError("say which network the devices are of", got=got, fix="launch.network=efa")]
    allowed_on = {"efa": ("cuda", "trainium", "cpu"), "infiniband": ("cuda", "rocm", "cpu"), "gke-rdma": ("cuda",)}
    if hardware.target not in allowed_on[kind]:
        got = f"launch.network={kind} with hardware={hardware.target}"
        fix = "leave it out: TPU hosts need no network device" if hardware.target == "tpu" else "another network"
        allowed = f"{kind} with {', '.join(allowed_on[kind])}"
        return PodNeeds(1, 1), [ConfigError("these nodes have no such network", got=got, allowed=allowed, fix=fix)]
    if count is None or count < 1:
        fix = {"efa": "16 on trn2.48xlarge", "infiniband": "1 where a device plugin shares them", "gke-rdma": "8"}[kind]
        got = f"launch.network={kind} launch.network_devices={'null' if count is None else count}"
        return PodNeeds(1, 1), [ConfigError("say how many network devices a host has", got=got, fix=f"such as {fix}")]
    if kind == "efa":
        return PodNeeds(1, 1, {_EFA: count}, variables=EFA_VARIABLES), []
    if kind == "infiniband":
        return PodNeeds(1, 1, {launch.network_resource: count}, capabilities=("IPC_LOCK",)), []
    return _gke_rdma(count), []


def _gke_rdma(count: int) -> PodNeeds:
    """GPUs of GKE with RDMA (A3 Ultra, A4, A4X): networks by annotation, Google's NCCL plug-in from the node."""
    interfaces: list[dict[str, Any]] = [{"interfaceName": "eth0", "network": "default"}]
    interfaces += [{"interfaceName": f"eth{number + 2}", "network": f"rdma-{number}"} for number in range(count)]
    return PodNeeds(
        1,
        1,
        variables={"LD_LIBRARY_PATH": f"{_GIB}/lib64:/usr/local/nvidia/lib64"},
        annotations={
            "networking.gke.io/default-interface": "eth0",
            "networking.gke.io/interfaces": json.dumps(interfaces),
        },
        host_paths={
            "nvidia": ("/home/kubernetes/bin/nvidia", "/usr/local/nvidia"),
            "gib": ("/home/kubernetes/bin/gib", _GIB),
        },
        capabilities=("IPC_LOCK",),
        script=f"{_GIB}/scripts/set_nccl_env.sh",
    )
