"""Common base of the targets that use torch_xla."""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from orchestrator.config.schema import HardwareConfig
from orchestrator.hardware import host
from orchestrator.hardware.target import Probe, Problem, Target
from orchestrator.installing import own_environment

if TYPE_CHECKING:
    import torch

TORCH_XLA, TORCH_FOR_XLA = "2.9.0", "2.9"


class XlaTarget(Target):
    """A chip that is programmed through torch_xla, one process per host.

    A subclass says which chips it sees (`_chips`) and which packages they need (`_package_problems`).
    """

    device_type = "xla"
    collective_backend = "xla"
    strategy = "xla"
    runtime = "torch_xla"
    simulates = "devices"
    experimental = True

    def _look(self) -> Probe:
        runtime = {name: version for name in self._packages if (version := host.package_version(name))}
        if self._simulate is not None:
            problems = torch_xla_problems(runtime)
            names = [f"virtual {self.name} device on {host.cpu_model()}"] * self._simulate
            return Probe(self.name, not problems, len(names), tuple(names), None, runtime, problems)
        names, chip, problems = self._chips()
        problems = (*problems, *self._package_problems(runtime))
        return Probe(self.name, not problems, len(names), tuple(names), chip, runtime, problems)

    def processes(self, devices: int) -> int:
        """Return 1, whatever `devices`."""
        # One process drives all devices of a host.
        return 1

    def _environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        common = super()._environment(config, local_rank, local_world)
        # The compiler warns at every graph that its partitioner will be replaced one day.
        common["TF_CPP_MIN_LOG_LEVEL"] = "2"
        if cache := self._cache(config):
            common[self.cache_variable] = cache
        if config.simulate is None:
            return {**common, "PJRT_DEVICE": self.pjrt_device}
        # The virtual devices share the cores; OpenMP threads beside them would only fight over these.
        return {**common, "OMP_NUM_THREADS": "1", "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(config.simulate)}

    def _cache(self, config: HardwareConfig) -> str | None:
        """Where this host keeps compiled graphs from run to run."""
        cache = config.compilation_cache
        if cache == "auto":
            if config.simulate is not None:
                return None  # graphs for a CPU are written and never loaded (torch_xla 2.9)
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            return str(Path(home, "orchestrator", "xla"))
        # Neuron takes s3://bucket, too.
        return str(Path(cache).expanduser().absolute()) if cache and "://" not in cache else cache

    pjrt_device: ClassVar[str]
    cache_variable: ClassVar[str] = "XLA_PERSISTENT_CACHE_PATH"  # as torch_xla.runtime.initialize_cache sets it
    _packages: tuple[str, ...] = ("torch", "torch_xla")

    @abstractmethod
    def _chips(self) -> tuple[list[str], str | None, tuple[Problem, ...]]:
        """Names of the chips of this host, the catalogue's key where it is sure, and what the chips lack."""

    @abstractmethod
    def _package_problems(self, runtime: dict[str, str]) -> tuple[Problem, ...]:
        """Return what the installed packages lack."""

    def default_precision(self, probe: Probe) -> str:
        """Return bf16 on devices, fp32 where a CPU simulates them."""
        # A CPU computes bf16 many times more slowly than fp32.
        return "bf16" if self._simulate is None else "fp32"

    def numerics(self) -> dict[str, str]:
        """Return nothing: torch's settings do not reach torch_xla."""
        return {}

    def device(self, local_rank: int) -> torch.device:
        """Return torch_xla's device."""
        import torch_xla

        return torch_xla.device()

    def memory_bytes(self, device: torch.device) -> int | None:
        """Return the bytes of this process where a CPU simulates devices, else None: the runtime does not say."""
        if self._simulate is not None:
            import psutil

            return int(psutil.Process().memory_info().rss)
        return None

    def peak_memory_bytes(self, device: torch.device) -> int | None:
        """Return None: the runtime does not say."""
        return None

    def synchronize(self, device: torch.device) -> None:
        """Run what was traced, and wait for it."""
        import torch_xla

        torch_xla.sync(wait=True)


def torch_xla_problems(runtime: dict[str, str]) -> tuple[Problem, ...]:
    """Whether torch_xla and the torch that it was built for are installed. `runtime` holds package versions."""
    torch, torch_xla = runtime.get("torch", "not installed"), runtime.get("torch_xla")
    fix = f"with Python 3.11 or 3.12: {own_environment('xla')}"
    major, minor = host.python_version()
    if torch_xla is None:
        needed = f"{TORCH_XLA} needs torch {TORCH_FOR_XLA} (here: {torch})"
        if (major, minor) > (3, 12):
            needed += f" and Python 3.11 or 3.12 (here: {major}.{minor})"
        return (Problem(f"torch_xla is not installed; {needed}", fix),)
    if torch.split(".")[:2] != torch_xla.split(".")[:2]:
        return (
            Problem(f"torch_xla {torch_xla} needs torch {'.'.join(torch_xla.split('.')[:2])} (here: {torch})", fix),
        )
    return ()
