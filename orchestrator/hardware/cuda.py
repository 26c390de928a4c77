"""NVIDIA GPUs through CUDA and NCCL."""

from __future__ import annotations

import csv
import os
import re
from typing import TYPE_CHECKING

from orchestrator.chips.load import match_device_name
from orchestrator.config.schema import HardwareConfig
from orchestrator.hardware import host
from orchestrator.hardware.target import Probe, Problem, Target, missing_torch

if TYPE_CHECKING:
    import torch

_NVIDIA_PCI_VENDOR = 0x10DE
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")  # the last one is WSL's
_QUERY = ("index", "uuid", "name", "memory.total", "driver_version", "compute_cap", "mig.mode.current")
# Oldest Linux driver of each major CUDA version: docs.nvidia.com/deploy/cuda-compatibility, minor version part.
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
_BF16_CAPABILITY = 8.0  # Ampere


class CudaTarget(Target):
    """NVIDIA GPUs, one process each. A probe uses nvidia-smi and torch's build facts, and makes no CUDA context."""

    name = "cuda"
    device_type = "cuda"
    collective_backend = "nccl"
    accelerator = "cuda"
    strategy = "dtensor"
    experimental = True
    state = "written against torch's documented API; never run on the real chip yet"

    def _look(self) -> Probe:
        gpus, driver = _visible(_smi()), None
        if gpus:
            driver = gpus[0]["driver_version"]
        else:
            gpus, driver = _from_proc()
        on_bus = [p for p in host.pci_devices() if p.vendor == _NVIDIA_PCI_VENDOR and p.is_display_or_accelerator]
        has_files = any(host.path(name).exists() for name in _DEVICE_FILES)
        if not gpus:
            return Probe(self.name, False, len(on_bus), problems=(_no_gpu(bool(on_bus), has_files),))
        runtime = {"driver": driver} if driver else {}
        build = host.torch_build()
        problems = _build_problems(build, driver)
        if build is not None:
            runtime |= {"torch": build.version, **({"cuda": build.cuda} if build.cuda else {})}
        capabilities = [float(gpu["compute_cap"]) for gpu in gpus if _is_number(gpu["compute_cap"])]
        if len(capabilities) == len(gpus):
            runtime["compute_capability"] = str(min(capabilities))
        memory = [float(gpu["memory.total"]) for gpu in gpus if _is_number(gpu["memory.total"])]
        names = tuple(gpu["name"] for gpu in gpus)
        return Probe(
            self.name,
            available=not problems,
            devices=len(gpus),
            device_names=names,
            chip=_common_chip(names),
            runtime=runtime,
            problems=problems,
            device_memory_bytes=int(min(memory) * 2**20) if len(memory) == len(gpus) else None,  # nvidia-smi counts MiB
        )

    def _environment(self, config: HardwareConfig, local_rank: int, local_world: int) -> dict[str, str]:
        return {**super()._environment(config, local_rank, local_world), **nccl_environment(), **_CUDA_ENVIRONMENT}

    def default_precision(self, probe: Probe) -> str:
        """Return bf16 where the compute capability has it, else fp32."""
        capability = probe.runtime.get("compute_capability")
        if capability is None:
            return "bf16" if probe.chip is not None else "fp32"  # every NVIDIA chip of the catalogue has bf16 units
        return "bf16" if float(capability) >= _BF16_CAPABILITY else "fp32"

    def device(self, local_rank: int) -> torch.device:
        """Return the GPU of a process: number `local_rank`, or the only one that it sees."""
        import torch

        # Slurm and Kubernetes may show each process its own GPU only, which is then number 0.
        alone = torch.cuda.device_count() == 1
        return torch.device("cuda", 0 if alone else local_rank)

    def memory_bytes(self, device: torch.device) -> int | None:
        """Return the bytes in tensors, without what the allocator keeps in reserve."""
        import torch

        return int(torch.cuda.memory_allocated(device))

    def peak_memory_bytes(self, device: torch.device) -> int | None:
        """Return the most bytes that torch has allocated on `device` so far."""
        import torch

        return int(torch.cuda.max_memory_allocated(device))

    def synchronize(self, device: torch.device) -> None:
        """Wait until `device` has run what was launched on it."""
        import torch

        torch.cuda.synchronize(device)


_CUDA_ENVIRONMENT = {
    # Steps of changing sequence length otherwise break the memory into pieces too small to use.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # cuBLAS picks a workspace per stream, and with it the order of summation: the same on every start.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Device numbers are those of nvidia-smi, so that messages and the user mean the same GPU.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


def nccl_environment() -> dict[str, str]:
    """Return the settings of torch's NCCL process group, which RCCL shares."""
    return {
        # A collective that hangs ends the process after its timeout, instead of waiting for ever.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        # The last collectives of every rank are kept, and written when one times out: who is missing is then known.
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def _smi() -> list[dict[str, str]]:
    """One row per GPU that nvidia-smi reports, keyed by the names of `_QUERY`."""
    if not any(host.path(name).exists() for name in _DEVICE_FILES):
        return []
    output = host.run("nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    rows = csv.reader((output or "").splitlines(), skipinitialspace=True)
    gpus = [dict(zip(_QUERY, (cell.strip() for cell in row), strict=True)) for row in rows if len(row) == len(_QUERY)]
    for gpu in gpus:
        if gpu["mig.mode.current"] == "Enabled":
            # A slice of a GPU has a slice of its rate: not the chip of the catalogue.
            gpu["name"] += " MIG"
    return gpus


def _visible(gpus: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those that CUDA_VISIBLE_DEVICES leaves, by its rules: numbers or UUID prefixes, up to the first unknown one."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return gpus
    chosen = []
    for word in (word.strip() for word in text.split(",")):
        matches = [gpu for gpu in gpus if word and (gpu["index"] == word or gpu["uuid"].startswith(word))]
        if word.startswith("MIG") and gpus:
            matches = [{**gpus[0], "name": f"{gpus[0]['name'].removesuffix(' MIG')} MIG", "memory.total": "unknown"}]
        if not matches:
            break
        chosen.append(matches[0])
    return chosen


def _from_proc() -> tuple[list[dict[str, str]], str | None]:
    """Where nvidia-smi is missing, as in slim containers: the driver's own files."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return [], None
    gpus = []
    for file in host.glob("/proc/driver/nvidia/gpus/*/information"):
        match = re.search(r"^Model:\s*(.+)$", host.read(file) or "", re.MULTILINE)
        gpus.append({"name": match[1].strip() if match else "unknown", "compute_cap": "", "memory.total": ""})
    version = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", host.read("/proc/driver/nvidia/version") or "")
    has_files = any(host.path(name).exists() for name in _DEVICE_FILES)
    return (gpus if has_files else []), version[1] if version else None


def _no_gpu(on_bus: bool, has_files: bool) -> Problem:
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None and has_files:
        value = os.environ["CUDA_VISIBLE_DEVICES"]
        return Problem(
            f"CUDA_VISIBLE_DEVICES={value!r} leaves no GPU visible",
            "unset CUDA_VISIBLE_DEVICES or name GPUs that exist",
        )
    if has_files:
        return Problem(
            "the NVIDIA driver's device files are here, but nvidia-smi does not answer",
            "run nvidia-smi: its message names the fault; after a driver update a reboot is needed",
        )
    if on_bus:
        return Problem(
            "an NVIDIA GPU is on the PCI bus, but its driver is not loaded",
            "install the NVIDIA driver (in a container: start it with --gpus all), then check with nvidia-smi",
        )
    return Problem("no NVIDIA GPU found", "run on a machine with one, or choose another hardware target")


def _build_problems(build: host.TorchBuild | None, driver: str | None) -> tuple[Problem, ...]:
    """Whether the installed torch can drive an NVIDIA GPU with this driver."""
    if build is None:
        return (missing_torch(),)
    release = build.version.partition("+")[0]
    install = f"pip install torch=={release} (on Linux the default wheel is the CUDA build)"
    if build.hip is not None:
        return (Problem(f"torch {build.version} is built for AMD (HIP {build.hip}), not for NVIDIA", install),)
    if build.cuda is None:
        return (Problem(f"torch {build.version} is built without CUDA", install),)
    oldest = _OLDEST_DRIVER.get(build.cuda.partition(".")[0])
    major = (driver or "").partition(".")[0]
    if oldest is not None and major.isdigit() and int(major) < oldest:
        what = f"the NVIDIA driver {driver} is too old for torch's CUDA {build.cuda}"
        return (Problem(what, f"install driver {oldest} or newer, or a torch built for an older CUDA"),)
    return ()


def _common_chip(names: tuple[str, ...]) -> str | None:
    """Return the catalogue's key where all devices are one chip."""
    keys = {match_device_name(name) for name in names}
    return keys.pop() if len(keys) == 1 else None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?", text) is not None
