"""Which mesh axis runs over which wires: within a chip, a host, a slice, or over the network between them.

Ranks are numbered so that neighbours come first: the devices of a chip, the chips of a host, the hosts of a slice. The
mesh axes are laid over them with `tensor` innermost, so an axis lies within the smallest group that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.chips.load import load_catalogue
from orchestrator.errors import HardwareError

# Chips of a slice → the chips of one of its hosts. A host of v5e or v6e has 1, 4 or 8 chips where it is alone, and 4
# where there are several: docs.cloud.google.com/tpu/docs/v5e and /v6e. Hosts of v5p and TPU7x have 4: torch_tpu 0.2.0,
# _internal/distributed/distributed.py, and docs.cloud.google.com/tpu/docs/tpu7x.
_FLAT = {1: 1, 4: 4, 8: 8, 16: 4, 32: 4, 64: 4, 128: 4, 256: 4}
_CUBIC = {4: 4, 8: 4, 16: 4, 32: 4, 64: 4, 128: 4, 256: 4, 512: 4, 1024: 4}
_TPUS = {
    "v5e": ("tpu-v5e", _FLAT),
    "v5p": ("tpu-v5p", _CUBIC),
    "v6e": ("tpu-v6e", _FLAT),
    "v7x": ("tpu-v7x", _CUBIC),
}

# Chip, chips of an instance, instances joined by NeuronLink: aws-neuron-sdk, about-neuron/arch/neuron-hardware/
# trn2-arch and trn3-arch (a server of a Gen2 UltraServer has 4 of its 144 chips).
_INSTANCES = {
    "trn2.3xlarge": ("trn2", 1, 1),
    "trn2.48xlarge": ("trn2", 16, 1),
    "trn2u.48xlarge": ("trn2", 16, 4),
    "trn3-gen2": ("trn3", 4, 36),
}


@dataclass(frozen=True)
class Level:
    """A group of devices that share wires.

    Attributes:
        name: of the group, such as `a chip`.
        devices: in a group.
    """

    name: str
    devices: int


@dataclass(frozen=True)
class Wiring:
    """How the devices of a machine are joined.

    Attributes:
        name: of the instance or slice.
        chip: key of the chip catalogue.
        levels: groups within groups, the smallest first.
        network: what joins the largest groups.
        devices: of one instance or slice.
        is_slice: whether `devices` are what a vendor calls a slice.
    """

    name: str
    chip: str
    levels: tuple[Level, ...]
    network: str
    devices: int
    is_slice: bool = False

    def slices(self, devices: int) -> int:
        """Return the number of slices that so many devices are.

        Args:
            devices: of the job.
        """
        return -(-devices // self.devices) if self.is_slice else 1

    def place(self, stride: int, degree: int) -> str:
        """Say where the groups of an axis lie.

        Args:
            stride: ranks from one member of a group to the next.
            degree: of the axis.
        """
        extent = stride * degree
        for level in self.levels:
            if level.devices % extent == 0:
                return f"within {level.name}"
        inner = self.levels[-1]
        # What is larger than a group is regular where it is made of whole groups.
        whole = extent % inner.devices == 0
        return f"over {self.network}" if whole else f"across the borders of {inner.name}, over {self.network}"

    def lines(self, degrees: Mapping[str, int]) -> list[str]:
        """Return, for each axis of more than one device, its degree and where it lies.

        Args:
            degrees: of the mesh axes, the outermost first.
        """
        stride, found = 1, []
        for name, degree in reversed(list(degrees.items())):
            if degree > 1:
                found.append(f"{name} {degree} {self.place(stride, degree)}")
            stride *= degree
        return found


def trainium(chip: str, chips: int, per_chip: int, instances: int = 1, name: str = "") -> Wiring:
    """Return the topology of a Trainium instance.

    Args:
        chip: key of the chip catalogue.
        chips: of the instance.
        per_chip: logical NeuronCores of a chip.
        instances: of an UltraServer; 1 where the instance stands alone.
        name: of the instance.
    """
    levels = [Level("a chip", per_chip), Level("an instance (NeuronLink)", per_chip * chips)]
    if instances > 1:
        levels.append(Level("an UltraServer (NeuronLink)", per_chip * chips * instances))
    return Wiring(name or f"{chips} {chip} chips", chip, tuple(levels), "EFA", per_chip * chips)


def tpu_slice(chip: str, chips: int, per_host: int, name: str = "") -> Wiring:
    """Return the topology of a TPU slice.

    Args:
        chip: key of the chip catalogue.
        chips: of the slice.
        per_host: chips of a host.
        name: of the slice.
    """
    per_chip = load_catalogue().get(chip).logical_devices_per_chip
    levels = [Level("a chip", per_chip)] if per_chip > 1 else []
    levels += [Level("a host (ICI)", per_chip * per_host), Level("a slice (ICI)", per_chip * chips)]
    network = "the data-centre network between slices"
    return Wiring(name or f"{chips} {chip} chips", chip, tuple(levels), network, per_chip * chips, is_slice=True)


def named_instance(name: str, target: str) -> Wiring:
    """Return the topology of an instance that a rehearsal names.

    Args:
        name: such as `trn2.48xlarge` or `v6e-16`.
        target: of `hardware.target`.

    Raises:
        HardwareError: the target has no such instance, or none that is known here.
    """
    if target == "trainium" and name in _INSTANCES:
        chip, chips, instances = _INSTANCES[name]
        return trainium(chip, chips, load_catalogue().get(chip).logical_devices_per_chip, instances, name)
    kind, _, size = name.partition("-")
    if target == "tpu" and kind in _TPUS and size.isdigit():
        chip, hosts = _TPUS[kind]
        if int(size) in hosts:
            return tpu_slice(chip, int(size), hosts[int(size)], name)
    known = list(_INSTANCES) if target == "trainium" else [f"{kind}-N" for kind in _TPUS]
    raise HardwareError(
        f"hardware.instance is no {target} instance that is known here",
        got=name,
        allowed=", ".join(known) + ("" if target == "trainium" else "; N chips of a slice: 4, 8, 16, ... 256"),
    )
