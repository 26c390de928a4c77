"""Google TPUs through torch_tpu, the torch-native successor of torch_xla: `hardware.runtime=torch_tpu`. Experimental.

One process per device. The library takes its place in the slice from variables that all processes must agree on, and
that its `torch.tpu.distributed.set_tpu_launch_env()` sets in a parent that has imported torch. Ours has not, so they
are worked out here, from torch_tpu 0.2.0: `_internal/distributed/distributed.py` and `_internal/utils/hardware.py`.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

from orchestrator.config.schema import HardwareConfig
from orchestrator.distributed.world import World, detect
from orchestrator.errors import HardwareError
from orchestrator.hardware import host, tpu_host
from orchestrator.hardware.target import Probe, Problem, Target, missing_torch
from orchestrator.hardware.tpu import libtpu_problems
from orchestrator.installing import own_environment

if TYPE_CHECKING:
    import torch

TORCH_TPU = "0.2.0"
_OLDEST_TORCH, _NEWEST_TORCH = (2, 11), (2, 13)  # it takes up to 2.15, this product up to 2.13
_INSTALL = own_environment("tpu-native")
_TOPOLOGY, _ADDRESSES = "TORCH_TPU_TOPOLOGY", "TORCH_TPU_SLICEBUILDER_ADDRESSES"
_BASE_PORT = 8070  # the library's own, where the processes cannot ask each other for free ones

# Chip of the catalogue → processes of a host → the mesh of its devices.
_3D = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,2,2"}
_2D = {1: "1,1,1", 4: "2,2,1", 8: "2,4,1"}
_TOPOLOGIES: dict[str, dict[int, str]] = {
    "tpu-v4": _3D,
    "tpu-v5p": _3D,
    "tpu-v5e": _2D,
    "tpu-v6e": _2D,
    "tpu-v7x": {2: "1,1,1,2", 4: "1,2,1,2", 8: "2,2,1,2"},
}


class TorchTpuTarget(Target):
    """TPU devices of this host, one process each, under the torch-native strategy."""

    name = "tpu"
    device_type = "tpu"
    collective_backend = "tpu_dist"
    accelerator = "tpu"
    strategy = "dtensor"
    runtime = "torch_tpu"
    pin_memory = False  # its page-locked memory comes from the runtime, which is untested
    experimental = True
    state = f"experimental (hardware.runtime=torch_tpu): written against torch_tpu {TORCH_TPU}; never run on a chip yet"

    def __init__(self) -> None:
        super().__init__()
        self._wanted: int | None = None
        self._ports: list[int] = []

    def use(self, config: HardwareConfig) -> None:
        """Take the number of devices from the configuration."""
        super().use(config)
        self._wanted = None if config.devices == "auto" else config.devices

    def _look(self) -> Probe:
        found = tpu_host.look()
        names = ("torch", "torch_tpu", "libtpu")
        runtime = {name: version for name in names if (version := host.package_version(name))}
        problems = (*found.problems, *self._slice_problems(found), *_package_problems(runtime))
        return Probe(self.name, not problems, len(found.names), found.names, found.chip, runtime, problems)

    def _slice_problems(self, found: tpu_host.TpuHost) -> tuple[Problem, ...]:
        """Return what the library cannot do with these chips."""
        if found.files and found.files[0].name.startswith("accel"):
            what = "torch_tpu finds chips under /dev/vfio only, and these are under /dev/accel*"
            return (Problem(what, "use a VM image with the VFIO driver, or hardware.runtime=torch_xla"),)
        if _TOPOLOGY in os.environ and _ADDRESSES in os.environ:
            return ()
        hosts = tpu_host.worker_hosts()
        if len(hosts) > 1:
            what = f"this is one of {len(hosts)} hosts of a slice, and {_TOPOLOGY} and {_ADDRESSES} are not set"
            fix = 'on every host: set -a; eval "$(python -m torch.tpu.distributed)"; set +a; then start by torchrun'
            return (Problem(what, fix),)
        processes = len(found.names) if self._wanted is None else self._wanted
        known = _TOPOLOGIES.get(found.chip or "", {})
        if not found.names or processes > len(found.names) or processes in known:
            return ()
        if not known:
            what = f"torch_tpu does not know the chip {found.names[0]}"
            return (Problem(what, "hardware.runtime=torch_xla"),)
        allowed = ", ".join(map(str, known))
        what = f"{processes} processes are no part of a {found.names[0]} host that torch_tpu knows ({allowed})"
        return (Problem(what, f"set hardware.devices to one of {allowed}"),)

    def _environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        joined = detect(os.environ)
        world = joined or World(local_rank, local_world, local_rank, local_world)
        first = _BASE_PORT if joined else 0
        if len(self._ports) != local_world + 1:
            self._ports = list(range(first, first + local_world + 1)) if first else _free_ports(local_world + 1)
        *devices, meeting = self._ports
        found = {
            **super()._environment(config, local_rank, local_world),
            # `import torch` is what makes the device known.
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
            "RANK": str(world.rank),
            "LOCAL_RANK": str(world.local_rank),
            "WORLD_SIZE": str(world.size),
            # The library wants to see a meeting place, and does not use it: the process group has a store.
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(meeting),
            _ADDRESSES: ",".join(f"localhost:{port}" for port in devices),
        }
        # What was set from outside describes the whole slice, and stays.
        given = {name: os.environ[name] for name in (_TOPOLOGY, _ADDRESSES) if name in os.environ}
        if _TOPOLOGY not in given:
            found[_TOPOLOGY] = _topology(self.probe().chip, local_world)
        return {**found, **given}

    def default_precision(self, probe: Probe) -> str:
        """Return bf16."""
        return "bf16"

    def device(self, local_rank: int) -> torch.device:
        """Return the device of this process."""
        import torch

        # A process sees its own device only, by whatever number the runtime gives it.
        return torch.device("tpu", torch.accelerator.current_device_index())

    def memory_bytes(self, device: torch.device) -> int | None:
        """Return the bytes in tensors; None where torch says 0, as it does without statistics of the allocator."""
        import torch

        return int(torch.accelerator.memory_allocated(device)) or None

    def peak_memory_bytes(self, device: torch.device) -> int | None:
        """Return the most bytes allocated on `device` so far; None where the runtime does not count."""
        import torch

        return int(torch.accelerator.max_memory_allocated(device)) or None

    def synchronize(self, device: torch.device) -> None:
        """Wait until `device` has run what was launched on it."""
        import torch

        torch.accelerator.synchronize(device)


def _package_problems(runtime: dict[str, str]) -> tuple[Problem, ...]:
    torch, torch_tpu = runtime.get("torch"), runtime.get("torch_tpu")
    if torch is None:
        return (missing_torch(),)
    series = tuple(int(part) for part in torch.split("+")[0].split(".")[:2])
    needed = "torch " + " to ".join(f"{major}.{minor}" for major, minor in (_OLDEST_TORCH, _NEWEST_TORCH))
    if torch_tpu is None:  # it brings libtpu
        return (Problem(f"torch_tpu is not installed; {TORCH_TPU} needs {needed} (here: {torch})", _INSTALL),)
    problems = libtpu_problems(runtime, _INSTALL)
    if torch_tpu != TORCH_TPU:
        what = f"torch_tpu {torch_tpu} is not the release that this is written for, {TORCH_TPU}"
        return (*problems, Problem(what, _INSTALL))
    if not _OLDEST_TORCH <= series <= _NEWEST_TORCH:
        return (*problems, Problem(f"torch_tpu {torch_tpu} needs {needed} (here: {torch})", _INSTALL))
    return problems


def _topology(chip: str | None, processes: int) -> str:
    """Return the mesh of a host's first `processes` devices."""
    known = _TOPOLOGIES.get(chip or "", {})
    if processes not in known:
        raise HardwareError(
            "torch_tpu knows no mesh of so many devices of this host",
            got=f"{processes} processes on {chip or 'an unknown chip'}",
            allowed=", ".join(map(str, known)) or None,
            fix=f"start as many processes as one of these, or set {_TOPOLOGY}",
        )
    return known[processes]


def _free_ports(count: int) -> list[int]:
    """Return free ports of this host, all different."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]
