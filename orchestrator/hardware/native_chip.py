"""Common base of the vendors' chips that torch drives as devices of its own, one process each, and of their rehearsal.

`hardware.simulate=N` runs the same strategy in N processes on this CPU, which communicate through gloo, under the
vendor's configuration: layout, topology, environment. The arithmetic is the CPU's.
"""

from __future__ import annotations

import math
import os
import socket
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from orchestrator.config.schema import HardwareConfig
from orchestrator.distributed.world import World, detect
from orchestrator.hardware import host
from orchestrator.hardware.target import Probe, Problem, Target, missing_torch
from orchestrator.hardware.topology import Wiring, named_instance

if TYPE_CHECKING:
    import torch


class NativeChipTarget(Target):
    """A vendor's chip with a torch device type of its own; or, to rehearse, processes of this CPU in its place.

    A subclass says what it sees (`_look_for_chips`), and what a worker on a chip needs (`_chip_environment`).
    """

    strategy = "dtensor"
    simulates = "processes"
    pin_memory = False  # page-locked memory comes from the vendor's runtime, where it is untested
    experimental = True

    def __init__(self) -> None:
        super().__init__()
        self._wanted: int | None = None
        self._instance: str | None = None
        self._variables: dict[str, str] = {}

    def use(self, config: HardwareConfig) -> None:
        """Take devices, environment and what is rehearsed from the configuration."""
        super().use(config)
        self._wanted = None if config.devices == "auto" else config.devices
        self._instance, self._variables = config.instance, config.environment
        if config.simulate is not None:
            self.device_type, self.collective_backend = "cpu", "gloo"
            self.compile_options = {}

    def _look(self) -> Probe:
        if self._simulate is None:
            return self._look_for_chips()
        build = host.torch_build()
        if build is None:
            return Probe(self.name, False, problems=(missing_torch(),))
        names = (f"process on {host.cpu_model()} in place of a {self.name} device",) * self._simulate
        return Probe(self.name, True, len(names), names, None, {"torch": build.version})

    @abstractmethod
    def _look_for_chips(self) -> Probe:
        """Probe the machine for the vendor's chips, packages and versions."""

    def _topology(self) -> Wiring | None:
        """Return how the devices of this machine are joined; None where it is not known."""
        return None

    def topology(self) -> Wiring | None:
        """Return how the devices are joined: those of the machine, or of the instance that a rehearsal names."""
        if self._simulate is None:
            return self._topology()
        return None if self._instance is None else named_instance(self._instance, self.name)

    def placement(self, degrees: Mapping[str, int]) -> str:
        """Say on how much of which machine the job runs, and which axis over which wires."""
        topology, devices = self.topology(), math.prod(degrees.values())
        if topology is None:
            return ""
        lines = "; ".join(topology.lines(degrees))
        where = f"of {topology.devices} devices of {topology.name}"
        if devices > topology.devices:
            where = f"devices of {topology.name}, {topology.devices} on each"
        return f"{devices} {where}" + (f": {lines}" if lines else "")

    def slices(self) -> int:
        """Return the number of slices that a rehearsal stands for."""
        topology = self.topology() if self._simulate is not None else None
        return 1 if topology is None or self._simulate is None else topology.slices(self._simulate)

    def _environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        common = super()._environment(config, local_rank, local_world)
        if config.simulate is not None:
            return common
        # `import torch` is what makes the device known.
        return {
            **common,
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
            **self._chip_environment(config, local_rank, local_world),
        }

    @abstractmethod
    def _chip_environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        """Variables that a worker on a chip needs before it imports torch."""

    def default_precision(self, probe: Probe) -> str:
        """Return bf16 on chips, fp32 where a CPU stands in for them."""
        # Many CPUs compute bf16 several times more slowly than fp32, and equal arithmetic can be compared bitwise.
        return "bf16" if self._simulate is None else "fp32"

    def device(self, local_rank: int) -> torch.device:
        """Return the device of this process."""
        import torch

        if self._simulate is not None:
            return torch.device("cpu")
        return self._chip(local_rank)

    @abstractmethod
    def _chip(self, local_rank: int) -> torch.device:
        """Return the chip of this process."""

    def memory_bytes(self, device: torch.device) -> int | None:
        """Return the bytes in tensors; None where torch says 0, as it does without statistics of the allocator."""
        import torch

        if device.type == "cpu":
            import psutil

            return int(psutil.Process().memory_info().rss)
        return int(torch.accelerator.memory_allocated(device)) or None

    def peak_memory_bytes(self, device: torch.device) -> int | None:
        """Return the most bytes allocated on `device` so far; None where the runtime does not count."""
        import torch

        if device.type == "cpu":
            return None
        return int(torch.accelerator.max_memory_allocated(device)) or None

    def synchronize(self, device: torch.device) -> None:
        """Wait until `device` has run what was launched on it."""
        import torch

        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def launch_world(local_rank: int, local_world: int) -> World:
    """Return this process among the job's as its launcher says, else among those of this host.

    Args:
        local_rank: of the worker on this host.
        local_world: workers on this host.
    """
    return detect(os.environ) or World(local_rank, local_world, local_rank, local_world)


def torchrun_variables(world: World, port: int) -> dict[str, str]:
    """Return what torchrun tells its processes, for a library that asks for it.

    Args:
        world: this process among the job's.
        port: where the library believes that the processes meet. They do not: the process group has a store.
    """
    return {
        "RANK": str(world.rank),
        "LOCAL_RANK": str(world.local_rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def free_ports(count: int) -> list[int]:
    """Return free ports of this host, all different.

    Args:
        count: of them.
    """
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


def python_problem(package: str, oldest: tuple[int, int], newest: tuple[int, int] | None, fix: str) -> list[Problem]:
    """Return the problem that a package is made for no such Python as this one.

    Args:
        package: its name and version.
        oldest: Python that it is made for.
        newest: likewise; None: no limit.
        fix: what to do.
    """
    here = host.python_version()
    if oldest <= here and (newest is None or here <= newest):
        return []
    needed = "{}.{}".format(*oldest) + (" to {}.{}".format(*newest) if newest else " or newer")
    return [Problem(f"{package} needs Python {needed} (here: {here[0]}.{here[1]})", fix)]
