"""AWS Trainium through torch_xla: `hardware.runtime=torch_xla`, which AWS has ended. The usual one is trainium.py."""

from __future__ import annotations

import os

from orchestrator.config.schema import HardwareConfig
from orchestrator.distributed.world import detect
from orchestrator.hardware import trainium_host
from orchestrator.hardware.target import Problem
from orchestrator.hardware.xla_target import XlaTarget

_ROOT_PORT = 62182  # torch-neuronx's own


class TrainiumXlaTarget(XlaTarget):
    """Trainium chips of this host. A device is a NeuronCore as the runtime counts them."""

    name = "trainium"
    accelerator = "neuron"
    # aws-neuron-sdk, announce-no-support-pytorch-xla-training.rst and introducing-pytorch-2-8.rst.
    state = (
        "ended by AWS: no training through PyTorch/XLA since Neuron 2.30, torch 2.9 was its last (use "
        "hardware.runtime=torchneuron). XLA strategy run on virtual CPU devices (hardware.simulate), one process; "
        "several hosts: what their processes decide and save together is tested on CPUs, a program over two of them is "
        "not; never run on the real chip"
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
        found = trainium_host.look(self._variables)
        return list(found.names), found.chip, found.problems

    def _package_problems(self, runtime: dict[str, str]) -> tuple[Problem, ...]:
        version, here = runtime.get("torch-neuronx"), runtime.get("torch", "not installed")
        fix = (
            "leave out hardware.runtime=torch_xla; or, to stay on it, make an environment of Python 3.11 or 3.12 with "
            "torch-neuronx 2.9 and neuronx-cc from AWS's own Neuron package index"
        )
        if version is None:
            what = f"torch-neuronx is not installed; it brings a torch_xla of its own (torch here: {here})"
            return (Problem(what, fix),)
        if not version.startswith("2.") or tuple(map(int, version.split(".")[:2])) > (2, 9):
            what = f"torch-neuronx {version} has no torch_xla: 2.9 was the last that had (torch here: {here})"
            return (Problem(what, fix),)
        return ()
