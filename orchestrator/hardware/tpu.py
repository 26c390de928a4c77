"""Google TPUs through torch_xla and libtpu."""

from __future__ import annotations

from orchestrator.hardware import host
from orchestrator.hardware.base import Problem
from orchestrator.hardware.xla import XlaTarget, torch_xla_problems

_GOOGLE_PCI_VENDOR = 0x1AE0
# PCI device number → key of the chip catalogue; jax, _src/hardware_utils.py. v2 and v3 share one and are not in it.
_PCI_CHIPS: dict[int, tuple[str, str | None]] = {
    0x0027: ("TPU v2 or v3", None),
    0x005E: ("TPU v4", "tpu-v4"),
    0x0062: ("TPU v5p", "tpu-v5p"),
    0x0063: ("TPU v5e", "tpu-v5e"),
    0x006F: ("TPU v6e", "tpu-v6e"),
    0x0076: ("TPU7x", "tpu-v7x"),
}


class TpuTarget(XlaTarget):
    """TPU chips of this host."""

    name = "tpu"
    accelerator = "tpu"
    state = "XLA strategy run on virtual CPU devices (hardware.simulate), one process; never run on the real chip"
    pjrt_device = "TPU"
    _packages = ("torch", "torch_xla", "libtpu")

    def _chips(self) -> tuple[list[str], str | None, tuple[Problem, ...]]:
        on_bus = [p.device for p in host.pci_devices() if p.vendor == _GOOGLE_PCI_VENDOR and p.device in _PCI_CHIPS]
        # /dev/vfio is any passed-through device's: it counts as a TPU's only beside one on the bus.
        files = host.glob("/dev/accel[0-9]*") or (host.glob("/dev/vfio/[0-9]*") if on_bus else [])
        keys = {_PCI_CHIPS[device][1] for device in on_bus}
        names = [_PCI_CHIPS[device][0] for device in on_bus] or ["TPU"] * len(files)
        chip = keys.pop() if len(keys) == 1 else None
        if names and files:
            return names, chip, ()
        if names:
            fix = "give the process /dev/accel* or /dev/vfio (in a container: --privileged, or the TPU device plugin)"
            return names, chip, (Problem("a TPU is on the PCI bus, but its device files are missing", fix),)
        missing = "no TPU found (no /dev/accel*, no TPU on the PCI bus)"
        return [], None, (Problem(missing, "run on a Google Cloud TPU VM, or choose another hardware target"),)

    def _package_problems(self, runtime: dict[str, str]) -> tuple[Problem, ...]:
        problems = list(torch_xla_problems(runtime))
        if "libtpu" not in runtime:
            problems.append(
                Problem("libtpu, the TPU runtime, is not installed", "pip install 'torch_xla[tpu]' in that environment")
            )
        return tuple(problems)
