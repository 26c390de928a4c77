"""AWS Trainium through torch-neuronx."""

from __future__ import annotations

import os

from orchestrator.chips.load import load_catalogue
from orchestrator.config.schema import HardwareConfig
from orchestrator.distributed.world import detect
from orchestrator.hardware import host
from orchestrator.hardware.target import Problem
from orchestrator.hardware.xla_target import XlaTarget

_AMAZON_PCI_VENDOR = 0x1D0F
# PCI device number → (name, key of the chip catalogue); aws-neuron-driver, neuron_device.h.
_PCI_CHIPS = {
    0x7164: ("Trainium", "trn1"),
    0x7364: ("Trainium2", "trn2"),
    0x7564: ("Trainium3", "trn3"),
    0x7565: ("Trainium3", "trn3"),
}
# The runtime's own variables, which take cores away or join them otherwise; aws-neuron-sdk,
# neuron-runtime/guides/configuration-guide.rst and about-neuron/arch/neuron-features/logical-neuroncore-config.rst.
_VISIBLE, _COUNT, _JOINED = "NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES", "NEURON_LOGICAL_NC_CONFIG"
_ROOT_PORT = 62182  # torch-neuronx's own


class TrainiumTarget(XlaTarget):
    """Trainium chips of this host. A device is a NeuronCore as the runtime counts them.

    trn1 has 2 on a chip. trn2 and trn3 have 8, of which the runtime makes 4 logical ones unless
    NEURON_LOGICAL_NC_CONFIG=1.
    """

    name = "trainium"
    accelerator = "neuron"
    # aws-neuron-sdk, announce-no-support-pytorch-xla-training.rst and introducing-pytorch-2-8.rst.
    state = (
        "XLA strategy run on virtual CPU devices (hardware.simulate), one process; several hosts: what their processes "
        "decide and save together is tested on CPUs, a program over two of them is not; never run on the real chip. "
        "AWS supports PyTorch/XLA training up to torch 2.9 (Neuron 2.29)"
    )
    pjrt_device = "NEURON"
    cache_variable = "NEURON_COMPILE_CACHE_URL"  # torch-neuronx has a cache of its own
    _packages = ("torch", "torch_xla", "torch-neuronx", "neuronx-cc")

    def __init__(self) -> None:
        super().__init__()
        self._variables: dict[str, str] = {}

    def use(self, config: HardwareConfig) -> None:
        """Take the environment variables from the configuration."""
        super().use(config)
        self._variables = config.environment

    def environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        """Return the variables of a worker, with those by which the runtimes of several hosts meet."""
        result = super().environment(config, local_rank, local_world)
        if config.compilation_cache is None:
            # Left alone it keeps one in /var/tmp.
            result["NEURON_CC_FLAGS"] = f"{result.get('NEURON_CC_FLAGS', '')} --no_cache".strip()
        return {**self._peers(config), **result}

    def _peers(self, config: HardwareConfig) -> dict[str, str]:
        """Return the variables by which the runtime finds the other hosts.

        In SPMD mode it has no default for the devices of each process, and it takes the process's number from RANK,
        which srun does not set (torch-neuronx, initialization.py).
        """
        world = detect(os.environ)
        if world is None or world.size == 1 or config.simulate is not None:
            return {}
        devices = self.probe().devices if config.devices == "auto" else config.devices
        host_name = world.store.removeprefix("tcp:").rpartition(":")[0]
        return {
            "RANK": str(world.rank),
            "NEURON_PJRT_PROCESS_INDEX": str(world.rank),
            "NEURON_PJRT_PROCESSES_NUM_DEVICES": ",".join([str(devices)] * world.size),
            "NEURON_RT_ROOT_COMM_ID": f"{host_name}:{_ROOT_PORT}",
        }

    def _chips(self) -> tuple[list[str], str | None, tuple[Problem, ...]]:
        on_bus = [p.device for p in host.pci_devices() if p.vendor == _AMAZON_PCI_VENDOR and p.device in _PCI_CHIPS]
        files = host.glob("/dev/neuron[0-9]*")
        if not on_bus and not files:
            missing = "no Trainium chip found (no /dev/neuron*, none on the PCI bus)"
            fix = "run on an AWS trn1, trn2 or trn3 instance, or choose another hardware target"
            return [], None, (Problem(missing, fix),)
        kinds = {_PCI_CHIPS[device] for device in on_bus}
        name, chip = kinds.pop() if len(kinds) == 1 else ("Neuron device", None)
        # A container may be given some of the chips that are on the bus.
        chips = min(len(on_bus) or len(files), len(files) or len(on_bus))
        try:
            cores, chip = self._cores(chips, chip)
        except ValueError as error:
            return [name] * chips, chip, (Problem(*error.args),)
        names = [name] * cores
        if files:
            return names, chip, ()
        fix = "install the driver (package aws-neuronx-dkms), then check with neuron-ls"
        what = "a Trainium chip is on the PCI bus, but its driver is not loaded (no /dev/neuron*)"
        return names, chip, (Problem(what, fix),)

    def _cores(self, chips: int, chip: str | None) -> tuple[int, str | None]:
        """NeuronCores that the runtime shows, and the chip where they are the catalogue's parts of it.

        Raises:
            ValueError: what is wrong with a variable of the runtime's, and what to do.
        """
        joined, visible, wanted = (self._variable(name) for name in (_JOINED, _VISIBLE, _COUNT))
        limit = None
        if chip is not None:
            limit = chips * load_catalogue().get(chip).logical_devices_per_chip
            if chip != "trn1" and joined not in ("", "2"):
                if joined != "1":
                    raise ValueError(f"{_JOINED}={joined} is neither 1 nor 2", "correct it, or unset it")
                # Half of a device as the catalogue knows it.
                limit, chip = 2 * limit, None
        if visible:
            return _count_cores(visible, limit), chip
        if wanted not in ("", "0"):
            if not wanted.isdigit():
                raise ValueError(f"{_COUNT}={wanted} is not a number of cores", "correct it, or unset it")
            return min(int(wanted), limit or int(wanted)), chip
        if limit is None:
            what = "it cannot be told which Trainium chip this is, and so how many NeuronCores it has"
            raise ValueError(what, f"give the process /sys/bus/pci, or set hardware.environment.{_COUNT}")
        return limit, chip

    def _variable(self, name: str) -> str:
        return self._variables.get(name, os.environ.get(name, ""))

    def _package_problems(self, runtime: dict[str, str]) -> tuple[Problem, ...]:
        if "torch-neuronx" in runtime:
            return ()
        here = runtime.get("torch", "not installed")
        fix = (
            "make an environment of its own with the torch that the Neuron release names: "
            "pip install torch-neuronx neuronx-cc --extra-index-url https://pip.repos.neuron.amazonaws.com"
        )
        return (Problem(f"torch-neuronx is not installed; it brings a torch_xla of its own (torch here: {here})", fix),)


def _count_cores(text: str, limit: int | None) -> int:
    """Cores that NEURON_RT_VISIBLE_CORES names, as `0-3,7`."""
    total = 0
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            raise ValueError(f"{_VISIBLE}={text} is no list of cores such as 0-3,7", "correct it, or unset it")
        end = int(last or first) + 1
        total += max(0, (end if limit is None else min(end, limit)) - int(first))
    return total
