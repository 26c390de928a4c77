"""Google TPUs through TorchTPU (torch_tpu), the torch-native successor of torch_xla. Never run on a chip yet.

It is the usual runtime where the library is installed and a chip is there; `hardware.runtime=torch_tpu` asks for it.

One process per device. The library takes its place in the slice from variables that all processes must agree on, and
that its `torch.tpu.distributed.set_tpu_launch_env()` sets in a parent that has imported torch. Ours has not, so they
are worked out here, from torch_tpu 0.2.0: `_internal/distributed/distributed.py` and `_internal/utils/hardware.py`.
"""

from __future__ import annotations

import math
import os
import re
from types import MappingProxyType
from typing import TYPE_CHECKING

from orchestrator.chips.load import load_catalogue
from orchestrator.config.schema import HardwareConfig
from orchestrator.distributed.world import detect
from orchestrator.errors import HardwareError
from orchestrator.hardware import host, tpu_host
from orchestrator.hardware.native_chip import (
    NativeChipTarget,
    free_ports,
    launch_world,
    python_problem,
    torchrun_variables,
)
from orchestrator.hardware.target import Probe, Problem, missing_torch
from orchestrator.hardware.topology import Wiring, tpu_slice
from orchestrator.hardware.tpu import libtpu_problems
from orchestrator.installing import own_environment

if TYPE_CHECKING:
    import torch

TORCH_TPU = "0.2.0"
# Of the wheel's metadata: torch>=2.11.0,<=2.15.0, Python >=3.12.
_OLDEST_TORCH, _NEWEST_TORCH = (2, 11), (2, 15)
_OLDEST_PYTHON = (3, 12)
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


class TorchTpuTarget(NativeChipTarget):
    """TPU devices of this host, one process each, under the torch-native strategy."""

    name = "tpu"
    device_type = "tpu"
    collective_backend = "tpu_dist"
    accelerator = "tpu"
    runtime = "torch_tpu"
    compile_options = MappingProxyType({"backend": "tpu"})
    # In bf16, unless torch's setting, "medium" when the library is loaded, is "highest": _internal/precision.
    rounds_fp32_products = True
    state = (
        f"written against torch_tpu {TORCH_TPU}. Run on processes of a CPU (hardware.simulate), and through a test "
        "double of the device that computes on the CPU; never run on a chip yet"
    )

    def __init__(self) -> None:
        super().__init__()
        self._ports: list[int] = []

    @staticmethod
    def is_usual() -> bool:
        """Whether this is the usual runtime here: the library is installed, and a chip is there."""
        return host.package_version("torch_tpu") is not None and bool(tpu_host.look().names)

    def _look_for_chips(self) -> Probe:
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

    def _topology(self) -> Wiring | None:
        found = tpu_host.look()
        if found.chip is None or not found.names:
            return None
        chips = len(found.names) // load_catalogue().get(found.chip).logical_devices_per_chip
        sizes = [int(size) for size in re.findall(r"\d+", os.environ.get(_TOPOLOGY, ""))[:3]]
        return tpu_slice(found.chip, max(chips, math.prod(sizes)), chips)

    def slices(self) -> int:
        """Return the number of slices: of a multislice job, or of the one that is rehearsed."""
        if self._simulate is not None:
            return super().slices()
        text = tpu_host.variables().get("MEGASCALE_NUM_SLICES", "1")
        return int(text) if text.isdigit() else 1

    def _chip_environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        first = _BASE_PORT if detect(os.environ) else 0
        if len(self._ports) != local_world + 1:
            self._ports = list(range(first, first + local_world + 1)) if first else free_ports(local_world + 1)
        *devices, meeting = self._ports
        found = {
            **torchrun_variables(launch_world(local_rank, local_world), meeting),
            _ADDRESSES: ",".join(f"localhost:{port}" for port in devices),
        }
        # What was set from outside describes the whole slice, and stays.
        given = {name: os.environ[name] for name in (_TOPOLOGY, _ADDRESSES) if name in os.environ}
        if _TOPOLOGY not in given:
            found[_TOPOLOGY] = _topology(self.probe().chip, local_world)
        return {**found, **given}

    def _chip(self, local_rank: int) -> torch.device:
        import torch

        # A process sees its own device only, by whatever number the runtime gives it.
        return torch.device("tpu", torch.accelerator.current_device_index())


def _package_problems(runtime: dict[str, str]) -> tuple[Problem, ...]:
    torch, torch_tpu = runtime.get("torch"), runtime.get("torch_tpu")
    if torch is None:
        return (missing_torch(),)
    series = tuple(int(part) for part in torch.split("+")[0].split(".")[:2])
    python = python_problem(f"torch_tpu {TORCH_TPU}", _OLDEST_PYTHON, None, f"with Python 3.12 or 3.13: {_INSTALL}")
    needed = "torch " + " to ".join(f"{major}.{minor}" for major, minor in (_OLDEST_TORCH, _NEWEST_TORCH))
    if torch_tpu is None:  # it brings libtpu
        what = f"torch_tpu is not installed; {TORCH_TPU} needs {needed} (here: {torch})"
        return (*python, Problem(what, _INSTALL))
    problems = (*python, *libtpu_problems(runtime, _INSTALL))
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
