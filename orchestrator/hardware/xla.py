"""What the targets that go through torch_xla have in common. This version finds them and cannot train on them."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from orchestrator.errors import HardwareError
from orchestrator.hardware import host
from orchestrator.hardware.base import Probe, Problem, Target

if TYPE_CHECKING:
    import torch


class XlaTarget(Target):
    """A chip that is programmed through torch_xla, one process per host.

    A subclass says which chips it sees (`_chips`) and which packages they need (`_package_problems`).
    """

    device_type = "xla"
    collective_backend = "xla"
    strategy = "xla"
    experimental = True
    supported = False

    def _look(self) -> Probe:
        names, chip, problems = self._chips()
        runtime = {name: version for name in self._packages if (version := host.package_version(name))}
        problems = (*problems, *self._package_problems(runtime))
        if not self.supported:
            not_yet = Problem(
                f"training on {self.name} is not in this version: it has no XLA strategy yet",
                "train on cpu, cuda or rocm",
            )
            problems = (*problems, not_yet)
        return Probe(self.name, not problems, len(names), tuple(names), chip, runtime, problems)

    _packages: tuple[str, ...] = ("torch", "torch_xla")

    @abstractmethod
    def _chips(self) -> tuple[list[str], str | None, tuple[Problem, ...]]:
        """Names of the chips of this host, the catalogue's key where it is sure, and what the chips lack."""

    @abstractmethod
    def _package_problems(self, runtime: dict[str, str]) -> tuple[Problem, ...]:
        """What the installed packages lack."""

    def default_precision(self, probe: Probe) -> str:
        return "bf16"

    def device(self, local_rank: int) -> torch.device:
        raise self._not_yet()

    def memory_bytes(self, device: torch.device) -> int | None:
        return None

    def peak_memory_bytes(self, device: torch.device) -> int | None:
        return None

    def synchronize(self, device: torch.device) -> None:
        raise self._not_yet()

    def _not_yet(self) -> HardwareError:
        return HardwareError(f"training on {self.name} is not in this version", fix="choose hardware=cpu, cuda or rocm")
