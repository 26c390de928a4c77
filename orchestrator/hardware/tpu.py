"""Google TPUs through torch_xla and libtpu."""

from __future__ import annotations

from orchestrator.config.schema import HardwareConfig
from orchestrator.hardware import host
from orchestrator.hardware.base import Problem
from orchestrator.hardware.xla import XlaTarget

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
TORCH_XLA = "2.9.0"
TORCH_FOR_XLA = "2.9"


class TpuTarget(XlaTarget):
    """TPU chips of this host."""

    name = "tpu"
    accelerator = "tpu"
    state = "found and described only; no strategy for it in this version, never run on the real chip"
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

    def _environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        return {**super()._environment(config, local_rank, local_world), "PJRT_DEVICE": "TPU"}


def torch_xla_problems(runtime: dict[str, str]) -> tuple[Problem, ...]:
    """Whether torch_xla and the torch that it was built for are installed. `runtime` holds package versions."""
    torch, torch_xla = runtime.get("torch", "not installed"), runtime.get("torch_xla")
    install = f"pip install torch=={TORCH_FOR_XLA}.0 torch_xla=={TORCH_XLA}"
    fix = f"in an environment of its own, Python 3.10 to 3.12: {install}"
    if torch_xla is None:
        return (Problem(f"torch_xla is not installed; {TORCH_XLA} needs torch {TORCH_FOR_XLA} (here: {torch})", fix),)
    if torch.split(".")[:2] != torch_xla.split(".")[:2]:
        return (
            Problem(f"torch_xla {torch_xla} needs torch {'.'.join(torch_xla.split('.')[:2])} (here: {torch})", fix),
        )
    return ()
