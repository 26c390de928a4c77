"""Google TPUs through torch_xla and libtpu: `hardware.runtime=torch_xla`, and the rehearsal on virtual devices."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.distributed.world import World, tpu_world
from orchestrator.hardware import host, tpu_host
from orchestrator.hardware.target import Problem
from orchestrator.hardware.xla_target import XlaTarget, torch_xla_problems
from orchestrator.installing import own_environment


class TpuTarget(XlaTarget):
    """TPU chips of this host."""

    name = "tpu"
    accelerator = "tpu"
    state = (
        "XLA strategy run on virtual CPU devices (hardware.simulate), one process; several hosts and slices: what their"
        " processes decide and save together is tested on CPUs, a program over two of them is not; never run on the"
        " real chip"
    )
    pjrt_device = "TPU"
    _packages = ("torch", "torch_xla", "libtpu")

    def _chips(self) -> tuple[list[str], str | None, tuple[Problem, ...]]:
        found = tpu_host.look()
        return list(found.names), found.chip, found.problems

    def world(self) -> World | None:
        """Return the processes of a TPU slice, as its metadata describes them; None on another machine."""
        if self._simulate is not None or not tpu_host.look().names:
            return None
        return tpu_world(tpu_host.variables())

    def slices(self) -> int:
        """Return the number of slices of a multislice job."""
        text = "1" if self._simulate is not None else tpu_host.variables().get("MEGASCALE_NUM_SLICES", "1")
        return int(text) if text.isdigit() else 1

    def _package_problems(self, runtime: dict[str, str]) -> tuple[Problem, ...]:
        install = own_environment("tpu")
        return (*torch_xla_problems(runtime), *libtpu_problems(runtime, install))


def libtpu_problems(runtime: dict[str, str], install: str) -> tuple[Problem, ...]:
    """Check that libtpu is installed: as a package of `runtime`, or where TPU_LIBRARY_PATH says.

    Args:
        runtime: versions of the installed packages.
        install: the command that installs it.
    """
    path = os.environ.get("TPU_LIBRARY_PATH")
    if path and not host.path(str(Path(path).absolute())).is_file():
        return (Problem(f"TPU_LIBRARY_PATH={path} is no file", f"unset it, and {install}"),)
    if path or "libtpu" in runtime:
        return ()
    return (Problem("libtpu, the TPU runtime, is not installed", install),)
