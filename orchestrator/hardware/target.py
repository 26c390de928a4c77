"""The interface of a hardware target, and the result of a probe.

A target knows one vendor's devices: whether they are here, which precision they are good at, which
environment a worker needs, and where a rank's device and its memory counters are. It knows nothing about
sharding; strategies ask it. Adding one: a module with a subclass of `Target`, a line in
`hardware.target_table.TARGETS`, and `conf/hardware/<name>.yaml`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator.config.schema import HardwareConfig
from orchestrator.distributed.world import World
from orchestrator.hardware import host
from orchestrator.installing import how_to_install

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Problem:
    """Why a target cannot be used, and what the user can do about it.

    Attributes:
        what: is wrong.
        fix: what to do.
    """

    what: str
    fix: str


@dataclass(frozen=True)
class Probe:
    """What a look at the machine found for one target.

    Attributes:
        target: the target's name.
        available: whether a run can start on it now.
        devices: devices seen on this host. Those of an unusable target are counted too.
        device_names: as the driver reports them.
        chip: key of the chip catalogue where the device is surely that chip.
        runtime: versions of driver and libraries, and what else describes the devices.
        problems: what is in the way; empty when available.
        device_memory_bytes: of the smallest device; None where unknown.
    """

    target: str
    available: bool
    devices: int = 0
    device_names: tuple[str, ...] = ()
    chip: str | None = None
    runtime: dict[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    device_memory_bytes: int | None = None


class Target(ABC):
    """One kind of hardware.

    Attributes:
        name: of `hardware.target`.
        device_type: torch's device type.
        collective_backend: of the process group between devices.
        accelerator: Lightning's name for the accelerator.
        strategy: which strategy shards over it, `dtensor` or `xla`.
        runtime: the value of `hardware.runtime` that chooses this one of a target's runtimes.
        simulates: what `hardware.simulate` counts: `devices` that are virtual, in one process, or `processes`; empty
            where there is nothing to rehearse.
        compile_options: of `torch.compile` for a block.
        rounds_fp32_products: whether the device multiplies fp32 in fewer bits unless it is told otherwise.
        may_fork: whether its processes may be forked from one that has imported everything and touched no device.
        pin_memory: whether batches go to the device through page-locked memory.
        experimental: not yet relied upon.
        state: what has been run where, plainly.
    """

    name: ClassVar[str]
    device_type: str
    collective_backend: str
    accelerator: ClassVar[str]
    strategy: ClassVar[str]
    runtime: ClassVar[str] = "torch"
    simulates: ClassVar[Literal["", "devices", "processes"]] = ""
    compile_options: Mapping[str, Any] = MappingProxyType({})
    rounds_fp32_products: ClassVar[bool] = False
    may_fork: ClassVar[bool] = False
    pin_memory: ClassVar[bool] = True
    experimental: ClassVar[bool] = False
    state: ClassVar[str]

    def __init__(self) -> None:
        self._probe: Probe | None = None
        self._simulate: int | None = None

    def use(self, config: HardwareConfig) -> None:
        """Configure the target; before the first `probe`.

        Args:
            config: the `hardware` group of a run.
        """
        self._simulate = config.simulate

    def processes(self, devices: int) -> int:
        """Return the number of processes on this host that drive so many devices.

        Args:
            devices: of this host.
        """
        return devices

    def world(self) -> World | None:
        """Return this process among the job's, as the machine itself knows the other hosts; None for a single host.

        Asked for where no launcher has started several processes.

        Raises:
            HardwareError: what the machine says is incomplete or contradicts itself.
        """
        return None

    def slices(self) -> int:
        """Return the number of groups of devices between which the network is slow, as known before they start."""
        return 1

    def placement(self, degrees: Mapping[str, int]) -> str:
        """Say on how much of which machine the job runs, and which mesh axis over which wires; empty where unknown.

        Args:
            degrees: of the mesh axes, the outermost first.
        """
        return ""

    def numerics(self) -> dict[str, str]:
        """Return the settings of this process that decide how the device rounds. Only after torch is set up."""
        import torch

        return {"float32_matmul_precision": torch.get_float32_matmul_precision()}

    def probe(self) -> Probe:
        """Look at the machine, once. Never raises: what goes wrong is a problem of the result."""
        if self._probe is None:
            try:
                self._probe = self._look()
            except Exception as error:  # a broken driver must not take the other targets down with it
                problem = Problem(
                    f"looking for {self.name} devices failed: {type(error).__name__}: {error}",
                    f"check the driver, or choose hardware.target={'cpu' if self.name != 'cpu' else 'auto'}",
                )
                self._probe = Probe(self.name, False, problems=(problem,))
        return self._probe

    @abstractmethod
    def _look(self) -> Probe:
        """Probe the machine, without importing torch and without creating a device context."""

    def environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        """Variables that a worker process needs before it imports torch.

        Args:
            config: `config.environment` overrides what is set here.
            local_rank: of the worker on this host.
            local_world: workers on this host.
        """
        return {**self._environment(config, local_rank, local_world), **config.environment}

    def _environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        threads = config.threads
        if threads == "auto":
            # Without this every worker takes all cores, and the workers of a host fight over them.
            threads = max(1, host.physical_cores() // max(1, local_world))
        return {
            "OMP_NUM_THREADS": str(threads),
            # GNU OpenMP's waiting threads spin for long: on a machine with other work, steps then took twice as long.
            # A short spin cost nothing measurable on an idle one.
            "GOMP_SPINCOUNT": "10000",
            # A vendor's plugin that happens to be installed would load with torch and may claim devices.
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            # Warnings of torch's stores and sockets, a page of C++ frames each; what is wrong is said in our words.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            # The processes tokenise before they train, and the tokenizer's warning about forks is noise.
            "TOKENIZERS_PARALLELISM": "false",
        }

    @abstractmethod
    def default_precision(self, probe: Probe) -> str:
        """Return `fp32` or `bf16`: what `hardware.precision=auto` means here.

        Args:
            probe: of this machine.
        """

    @abstractmethod
    def device(self, local_rank: int) -> torch.device:
        """Return the device of a rank of this host.

        Args:
            local_rank: number of the process on this host.
        """

    @abstractmethod
    def memory_bytes(self, device: torch.device) -> int | None:
        """Return the bytes in use now; None where unknown.

        Args:
            device: a device of this host.
        """

    @abstractmethod
    def peak_memory_bytes(self, device: torch.device) -> int | None:
        """Return the most bytes that were in use so far; None where unknown.

        Args:
            device: a device of this host.
        """

    @abstractmethod
    def synchronize(self, device: torch.device) -> None:
        """Wait until the device has finished its work.

        Args:
            device: a device of this host.
        """

    def describe(self) -> dict[str, Any]:
        """Return the hardware in plain values, for `run.json` and the report."""
        probe = self.probe()
        return {
            "target": self.name,
            "hardware_runtime": self.runtime,
            "device_type": self.device_type,
            "devices": probe.devices,
            "device_names": list(probe.device_names),
            "chip": probe.chip,
            "device_memory_bytes": probe.device_memory_bytes,
            "runtime": dict(probe.runtime),
            "host": {"cpu": host.cpu_model(), "cores": host.physical_cores(), "ram_bytes": host.ram_bytes()},
            "state": self.state,
        }


def missing_torch() -> Problem:
    """Return the problem that torch is not installed."""
    return Problem("torch is not installed", how_to_install())
