"""The CPU target, with gloo between processes; always available."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from orchestrator.hardware import host
from orchestrator.hardware.target import Probe, Target, missing_torch

if TYPE_CHECKING:
    import torch


class CpuTarget(Target):
    """CPUs: each process is one device; its threads share the host's cores with those of the other processes."""

    name = "cpu"
    device_type = "cpu"
    collective_backend = "gloo"
    accelerator = "cpu"
    strategy = "dtensor"
    may_fork = True
    state = "run on x86-64 Linux, in one and in several processes of one machine"

    def _look(self) -> Probe:
        model = host.cpu_model()
        build = host.torch_build()
        if build is None:
            return Probe(self.name, False, 1, (model,), problems=(missing_torch(),))
        return Probe(
            self.name,
            True,
            1,
            (model,),
            # The rate of a CPU depends on its vector units and memory: it is measured, not looked up.
            chip=None,
            runtime={"torch": build.version, "cores": str(host.physical_cores())},
            device_memory_bytes=host.ram_bytes(),
        )

    def default_precision(self, probe: Probe) -> str:
        """Return fp32."""
        # Most CPUs have no bf16 units, and there bf16 is several times slower than fp32.
        return "fp32"

    def device(self, local_rank: int) -> torch.device:
        """Return torch's CPU device, the same for every process."""
        import torch

        return torch.device("cpu")

    def memory_bytes(self, device: torch.device) -> int | None:
        """Return the resident memory of this process."""
        import psutil

        return int(psutil.Process().memory_info().rss)

    def peak_memory_bytes(self, device: torch.device) -> int | None:
        """Return the most resident memory that this process has had, in bytes."""
        try:
            import resource
        except ImportError:  # Windows
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB

    def synchronize(self, device: torch.device) -> None:
        """Do nothing: operations return when they are done."""
