"""AWS Trainium through TorchNeuron, AWS's native torch backend (torch-neuronx 2.13 and later). Never run on a chip yet.

One process per logical NeuronCore, device and process group `neuron`. What is known of it here is from AWS's pages
(awsdocs-neuron.readthedocs-hosted.com/en/latest): torch/guides/torch-distributed, torch/reference/env-vars,
torch/compile/reference-torch-compile, training/best-practices, release-notes/components/torchneuron,
torch/troubleshooting.
"""

from __future__ import annotations

import os
from types import MappingProxyType
from typing import TYPE_CHECKING

from orchestrator.chips.load import load_catalogue
from orchestrator.config.schema import HardwareConfig
from orchestrator.hardware import host, trainium_host
from orchestrator.hardware.native_chip import (
    NativeChipTarget,
    free_ports,
    launch_world,
    python_problem,
    torchrun_variables,
)
from orchestrator.hardware.target import Probe, Problem
from orchestrator.hardware.topology import Wiring, trainium

if TYPE_CHECKING:
    import torch

# release-notes/components/torchneuron (Neuron 2.33): torch-neuronx 2.13.3 and 2.14.3, each for the torch of its number.
_SERIES = ("2.13", "2.14")
_OLDEST_PYTHON, _NEWEST_PYTHON = (3, 12), (3, 14)
_CHIPS = ("trn2", "trn3")
_INSTALL = (
    "on a Trn2 or Trn3 instance, in an environment of Python 3.12 or 3.13: install torch-neuronx 2.13, whose wheels "
    "are in AWS's own Neuron package index (on PyPI is only a placeholder), as AWS's TorchNeuron quickstart says; "
    "docs/chips.md has the steps"
)
_NUMERICS = ("NEURON_CC_FLAGS", "NEURON_RT_STOCHASTIC_ROUNDING_EN", "NEURON_LOGICAL_NC_CONFIG")


class TrainiumTarget(NativeChipTarget):
    """Logical NeuronCores of this host, one process each, under the torch-native strategy."""

    name = "trainium"
    device_type = "neuron"
    collective_backend = "neuron"
    accelerator = "neuron"
    runtime = "torchneuron"
    # Shapes are static, and another backend than the device's own is an error: torch/compile/reference-torch-compile.
    compile_options = MappingProxyType({"backend": "neuron", "dynamic": False})
    # The compiler's default, which --auto-cast=none among NEURON_CC_FLAGS turns off (conf/hardware/trainium.yaml).
    rounds_fp32_products = True
    state = (
        "written against AWS's documentation of TorchNeuron (Neuron 2.33). Run on processes of a CPU "
        "(hardware.simulate), and through a test double of the device that computes on the CPU; never run on the real "
        "chip"
    )

    def __init__(self) -> None:
        super().__init__()
        self._port = 0

    def _look_for_chips(self) -> Probe:
        found = trainium_host.look(self._variables)
        names = ("torch", "torch-neuronx", "neuronx-cc")
        runtime = {name: version for name in names if (version := host.package_version(name))}
        problems = (*found.problems, *_chip_problems(found), *self._network_problems(), *_package_problems(runtime))
        return Probe(self.name, not problems, len(found.names), found.names, found.chip, runtime, problems)

    @staticmethod
    def _network_problems() -> tuple[Problem, ...]:
        """Several instances meet over EFA."""
        world = launch_world(0, 1)
        if world.hosts == 1 or not host.glob("/dev/neuron[0-9]*") or host.glob("/sys/class/infiniband/*"):
            return ()
        what = f"this is one of {world.hosts} hosts, and it has no EFA device (nothing under /sys/class/infiniband)"
        return (Problem(what, "give the instances EFA interfaces and install AWS's EFA driver, on every host"),)

    def _topology(self) -> Wiring | None:
        found = trainium_host.look(self._variables)
        if found.chip is None or not found.chips:
            return None
        return trainium(found.chip, found.chips, load_catalogue().get(found.chip).logical_devices_per_chip)

    def _chip_environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        world = launch_world(local_rank, local_world)
        self._port = self._port or free_ports(1)[0]
        found = torchrun_variables(world, self._port)
        # What was set from outside, as by torchrun, stays: the library may meet there.
        found |= {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
        if world.hosts > 1:
            found |= host.EFA_VARIABLES
        if config.compilation_cache not in ("auto", None):
            # Of compiled graphs: torch/reference/env-vars.
            found["TORCH_NEURONX_NEFF_CACHE_DIR"] = str(config.compilation_cache)
        return found

    def _chip(self, local_rank: int) -> torch.device:
        import torch

        # The number of a process's core is that of the process on its host: AWS's examples of torch.distributed.
        torch.accelerator.set_device_index(local_rank)
        return torch.device("neuron", torch.accelerator.current_device_index())

    def numerics(self) -> dict[str, str]:
        """Return torch's setting, and the variables of the compiler and the runtime that decide how is rounded."""
        if self._simulate is not None:
            return super().numerics()
        return {**super().numerics(), **{name: os.environ[name] for name in _NUMERICS if name in os.environ}}


def _chip_problems(found: trainium_host.TrainiumHost) -> tuple[Problem, ...]:
    if found.kind is None or found.kind in _CHIPS:
        return ()
    what = f"TorchNeuron drives Trn2 and Trn3 only, and this is {found.kind}"
    fix = "use a Trn2 or Trn3 instance; hardware.runtime=torch_xla drives Trn1, but AWS has ended it (Neuron 2.30)"
    return (Problem(what, fix),)


def _package_problems(runtime: dict[str, str]) -> tuple[Problem, ...]:
    version, torch = runtime.get("torch-neuronx"), runtime.get("torch")
    wanted = " or ".join(_SERIES)
    problems = python_problem("torch-neuronx", _OLDEST_PYTHON, _NEWEST_PYTHON, _INSTALL)
    if version is None:
        what = f"torch-neuronx is not installed; it needs torch {wanted} (here: {torch or 'not installed'})"
        return (*problems, Problem(what, _INSTALL))
    series = ".".join(version.split(".")[:2])
    if version.startswith("1."):
        what = f"torch-neuronx {version} is the placeholder on PyPI, or for inference on other chips"
    elif series not in _SERIES:
        older = series.split(".")[1].isdigit() and int(series.split(".")[1]) < 13
        why = "drives the chip through torch_xla" if older else "is newer than what this is written for"
        what = f"torch-neuronx {version} {why}; TorchNeuron is {wanted}"
    elif torch is None or not torch.startswith(f"{series}."):
        what = f"torch-neuronx {version} needs torch {series} (here: {torch or 'not installed'})"
    else:
        return tuple(problems)
    return (*problems, Problem(what, _INSTALL))
