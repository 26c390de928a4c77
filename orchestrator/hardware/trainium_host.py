"""Probe a host's Trainium chips, whichever library drives them: kind, NeuronCores, and problems."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.chips.load import load_catalogue
from orchestrator.hardware import host
from orchestrator.hardware.target import Problem

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


@dataclass(frozen=True)
class TrainiumHost:
    """The Trainium devices of a host.

    Attributes:
        names: one per NeuronCore that the runtime shows; where their number is not known, one per chip.
        chip: key of the chip catalogue, where a device is what the catalogue calls one of that chip.
        kind: key of the chip catalogue, where it is sure.
        chips: number of chips.
        problems: why they cannot be used.
    """

    names: tuple[str, ...] = ()
    chip: str | None = None
    kind: str | None = None
    chips: int = 0
    problems: tuple[Problem, ...] = ()


def look(variables: Mapping[str, str]) -> TrainiumHost:
    """Find the chips and their NeuronCores, and check the driver.

    trn1 has 2 cores on a chip. trn2 and trn3 have 8, of which the runtime makes 4 logical ones unless
    NEURON_LOGICAL_NC_CONFIG=1.

    Args:
        variables: of the environment that the configuration sets; they go before those of this process.
    """
    on_bus = [p.device for p in host.pci_devices() if p.vendor == _AMAZON_PCI_VENDOR and p.device in _PCI_CHIPS]
    files = host.glob("/dev/neuron[0-9]*")
    if not on_bus and not files:
        missing = "no Trainium chip found (no /dev/neuron*, none on the PCI bus)"
        fix = "run on an AWS trn1, trn2 or trn3 instance, or choose another hardware target"
        return TrainiumHost(problems=(Problem(missing, fix),))
    kinds = {_PCI_CHIPS[device] for device in on_bus}
    name, kind = kinds.pop() if len(kinds) == 1 else ("Neuron device", None)
    # A container may be given some of the chips that are on the bus.
    chips = min(len(on_bus) or len(files), len(files) or len(on_bus))
    try:
        cores, chip = _cores(chips, kind, variables)
    except ValueError as error:
        return TrainiumHost((name,) * chips, kind, kind, chips, (Problem(*error.args),))
    names = (name,) * cores
    if files:
        return TrainiumHost(names, chip, kind, chips)
    fix = "install the driver (package aws-neuronx-dkms), then check with neuron-ls"
    what = "a Trainium chip is on the PCI bus, but its driver is not loaded (no /dev/neuron*)"
    return TrainiumHost(names, chip, kind, chips, (Problem(what, fix),))


def _cores(chips: int, chip: str | None, variables: Mapping[str, str]) -> tuple[int, str | None]:
    """NeuronCores that the runtime shows, and the chip where they are the catalogue's parts of it.

    Raises:
        ValueError: what is wrong with a variable of the runtime's, and what to do.
    """
    joined, visible, wanted = (variables.get(name, os.environ.get(name, "")) for name in (_JOINED, _VISIBLE, _COUNT))
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
