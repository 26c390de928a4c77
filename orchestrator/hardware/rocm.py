"""AMD GPUs through ROCm: torch's CUDA interface in a build for HIP, and RCCL under NCCL's name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from orchestrator.chips.load import match_device_name
from orchestrator.config.schema import HardwareConfig
from orchestrator.hardware import host
from orchestrator.hardware.cuda import CudaTarget, nccl_environment
from orchestrator.hardware.target import Probe, Problem, Target, missing_torch

_AMD_PCI_VENDOR = 0x1002
_ACCELERATOR_CLASSES = (0x0380, 0x1200)  # Instinct parts have no display: "display, other" and "accelerator"
_VISIBLE = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_NODES = "/sys/class/kfd/kfd/topology/nodes"


class RocmTarget(CudaTarget):
    """One process per GPU; on MI250X per half of one (GCD), as the driver shows them."""

    name = "rocm"
    state = "written against torch's documented API; never run on the real chip yet"

    def _look(self) -> Probe:
        gpus = _visible(_kfd_gpus())
        if not gpus:
            on_bus = [
                p
                for p in host.pci_devices()
                if p.vendor == _AMD_PCI_VENDOR and p.class_code >> 8 in _ACCELERATOR_CLASSES
            ]
            return Probe(self.name, False, len(on_bus), problems=(_no_gpu(bool(on_bus)),))
        build = host.torch_build()
        problems = _problems(build)
        names = tuple(name for name, _, _ in gpus)
        memory = [size for _, _, size in gpus if size is not None]
        runtime = {"architecture": ", ".join(sorted({architecture for _, architecture, _ in gpus}))}
        rocm = host.read("/opt/rocm/.info/version")
        if rocm:
            runtime["rocm"] = rocm
        if build is not None:
            runtime |= {"torch": build.version, **({"hip": build.hip} if build.hip else {})}
        keys = {match_device_name(name) for name in names}
        return Probe(
            self.name,
            available=not problems,
            devices=len(gpus),
            device_names=names,
            chip=keys.pop() if len(keys) == 1 else None,
            runtime=runtime,
            problems=problems,
            device_memory_bytes=min(memory) if len(memory) == len(gpus) else None,
        )

    def _environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        # CUDA's allocator and cuBLAS settings are not for HIP: only what RCCL shares with NCCL.
        return {**Target._environment(self, config, local_rank, local_world), **nccl_environment()}

    def default_precision(self, probe: Probe) -> str:
        """Return bf16."""
        return "bf16"


def _kfd_gpus() -> list[tuple[str, str, int | None]]:
    """(name, gfx architecture, memory in bytes) of each GPU that the kernel driver offers for compute."""
    if not host.path("/dev/kfd").exists():
        return []
    gpus = []
    for file in sorted(host.glob(f"{_NODES}/*/properties"), key=_node_number):
        fields = dict(re.findall(r"^(\w+) (\d+)$", host.read(file) or "", re.MULTILINE))
        if int(fields.get("simd_count", "0")) == 0:
            continue  # a CPU
        version = int(fields.get("gfx_target_version", "0"))
        architecture = f"gfx{version // 10000}{version // 100 % 100}{version % 100:x}"
        folder = f"/sys/class/drm/renderD{fields.get('drm_render_minor', '')}/device"
        memory = host.read(f"{folder}/mem_info_vram_total") or ""
        name = host.read(f"{folder}/product_name") or f"AMD GPU ({architecture})"
        gpus.append((name, architecture, int(memory) if memory.isdigit() else None))
    return gpus


def _node_number(file: Path) -> int:
    return int(file.parent.name) if file.parent.name.isdigit() else -1


def _visible(gpus: list[tuple[str, str, int | None]]) -> list[tuple[str, str, int | None]]:
    """Those that the runtime's variables leave. UUIDs are not known here: they count as one device each."""
    for variable in _VISIBLE:
        text = os.environ.get(variable)
        if text is None:
            continue
        words = [word.strip() for word in text.split(",") if word.strip()]
        if all(word.isdigit() for word in words):
            gpus = [gpus[int(word)] for word in words if int(word) < len(gpus)]
        else:
            gpus = gpus[: len(words)]
    return gpus


def _no_gpu(on_bus: bool) -> Problem:
    hidden = [variable for variable in _VISIBLE if variable in os.environ]
    if host.path("/dev/kfd").exists():
        what = "the AMD driver is loaded (/dev/kfd), but no GPU is offered for compute"
        fix = "run rocminfo: its message names the fault (in a container: pass --device /dev/kfd --device /dev/dri)"
        if hidden:
            what, fix = f"{what}; {', '.join(hidden)} is set", f"unset {', '.join(hidden)}, or name GPUs that exist"
        return Problem(what, fix)
    if on_bus:
        fix = (
            "install the amdgpu driver (in a container: --device /dev/kfd --device /dev/dri), then check with rocminfo"
        )
        return Problem("an AMD accelerator is on the PCI bus, but its driver is not loaded (no /dev/kfd)", fix)
    return Problem("no AMD GPU found", "run on a machine with one, or choose another hardware target")


def _problems(build: host.TorchBuild | None) -> tuple[Problem, ...]:
    if build is None:
        return (missing_torch(),)
    release = build.version.partition("+")[0]
    fix = f"install torch {release} from the ROCm index that pytorch.org/get-started names"
    if build.cuda is not None:
        return (Problem(f"torch {build.version} is built for NVIDIA (CUDA {build.cuda}), not for AMD", fix),)
    if build.hip is None:
        return (Problem(f"torch {build.version} is built without ROCm", fix),)
    return ()
