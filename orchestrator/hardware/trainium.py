"""AWS Trainium through torch-neuronx."""

from __future__ import annotations

from orchestrator.hardware import host
from orchestrator.hardware.base import Problem
from orchestrator.hardware.xla import XlaTarget

_AMAZON_PCI_VENDOR = 0x1D0F
# PCI device number → (name, key of the chip catalogue); aws-neuron-driver, neuron_device.h.
_PCI_CHIPS = {
    0x7164: ("Trainium", "trn1"),
    0x7364: ("Trainium2", "trn2"),
    0x7564: ("Trainium3", "trn3"),
    0x7565: ("Trainium3", "trn3"),
}


class TrainiumTarget(XlaTarget):
    """Trainium chips of this host."""

    name = "trainium"
    accelerator = "neuron"
    state = "XLA strategy run on virtual CPU devices (hardware.simulate), one process; never run on the real chip"
    pjrt_device = "NEURON"
    cache_variable = "NEURON_COMPILE_CACHE_URL"  # torch-neuronx has a cache of its own
    _packages = ("torch", "torch_xla", "torch-neuronx", "neuronx-cc")

    def _chips(self) -> tuple[list[str], str | None, tuple[Problem, ...]]:
        on_bus = [p.device for p in host.pci_devices() if p.vendor == _AMAZON_PCI_VENDOR and p.device in _PCI_CHIPS]
        files = host.glob("/dev/neuron[0-9]*")
        keys = {_PCI_CHIPS[device][1] for device in on_bus}
        names = [_PCI_CHIPS[device][0] for device in on_bus] or ["Neuron device"] * len(files)
        chip = keys.pop() if len(keys) == 1 else None
        if names and files:
            return names, chip, ()
        if names:
            fix = "install the driver (package aws-neuronx-dkms), then check with neuron-ls"
            return (
                names,
                chip,
                (Problem("a Trainium chip is on the PCI bus, but its driver is not loaded (no /dev/neuron*)", fix),),
            )
        missing = "no Trainium chip found (no /dev/neuron*, none on the PCI bus)"
        return (
            [],
            None,
            (Problem(missing, "run on an AWS trn1, trn2 or trn3 instance, or choose another hardware target"),),
        )

    def _package_problems(self, runtime: dict[str, str]) -> tuple[Problem, ...]:
        if "torch-neuronx" in runtime:
            return ()
        here = runtime.get("torch", "not installed")
        fix = (
            "make an environment of its own with the torch that the Neuron release names: "
            "pip install torch-neuronx neuronx-cc --extra-index-url https://pip.repos.neuron.amazonaws.com"
        )
        return (Problem(f"torch-neuronx is not installed; it brings a torch_xla of its own (torch here: {here})", fix),)
