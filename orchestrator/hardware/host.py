"""Facts of this machine from the operating system: devices, drivers, cores and memory. No torch.

The launcher's parent process and `doctor` look here, so that asking which hardware there is neither costs the
seconds of `import torch` nor touches a device. Tests put a made-up machine under `ROOT`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")
_RUN_TIMEOUT_SECONDS = 15.0
EFA_VARIABLES = {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "FI_EFA_FORK_SAFE": "1"}
"""Set where several hosts meet, as AWS's set-up of EFA for several nodes says (setup-trn1-multi-node-execution)."""


@dataclass(frozen=True)
class PciDevice:
    """One function on the PCI bus, with the numbers of /sys/bus/pci/devices/*.

    `address` is `domain:bus:device.function`; the functions of one card differ behind the point.
    """

    vendor: int
    device: int
    class_code: int
    address: str = ""

    @property
    def is_display_or_accelerator(self) -> bool:
        """PCI base class 0x03 (display) or 0x12 (processing accelerator)."""
        return self.class_code >> 16 in (0x03, 0x12)


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch: its version, and the CUDA or HIP version that it was built for, if any."""

    version: str
    cuda: str | None
    hip: str | None


def path(text: str) -> Path:
    """Return an absolute path of this machine.

    Args:
        text: an absolute path.
    """
    return ROOT / text.lstrip("/")


def glob(pattern: str) -> list[Path]:
    """List the paths that match an absolute pattern, sorted.

    Args:
        pattern: an absolute glob.
    """
    return sorted(ROOT.glob(pattern.lstrip("/")))


def read(text: str | Path) -> str | None:
    """Return the stripped content of a small file; None where it cannot be read.

    Args:
        text: an absolute path.
    """
    try:
        return (text if isinstance(text, Path) else path(text)).read_text(errors="replace").strip()
    except OSError:
        return None


def run(*command: str) -> str | None:
    """Return the output of a command; None where it is missing, fails or does not answer.

    Args:
        *command: program and arguments.
    """
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=_RUN_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def pci_devices() -> list[PciDevice]:
    """All functions on the PCI bus; empty where there is no /sys."""
    found = []
    for folder in glob("/sys/bus/pci/devices/*"):
        try:
            vendor, device, code = (int(read(folder / name) or "", 16) for name in ("vendor", "device", "class"))
        except ValueError:
            continue
        found.append(PciDevice(vendor, device, code, folder.name))
    return found


def package_version(name: str) -> str | None:
    """Return the version of an installed distribution, without importing it.

    Args:
        name: of the distribution.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_version() -> tuple[int, int]:
    """Return the major and minor number of this Python."""
    return sys.version_info[:2]


def torch_build() -> TorchBuild | None:
    """Find what torch was built for, from its `version.py`, so that it need not be imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = read(Path(spec.origin).with_name("version.py")) or ""

    def value(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=]*=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE)
        return match[1] if match else None

    return TorchBuild(value("__version__") or package_version("torch") or "unknown", value("cuda"), value("hip"))


def logical_cores() -> int:
    """Hardware threads that this process may use: its affinity, cut down to the quota of its cgroup."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    quota = _cgroup_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def physical_cores() -> int:
    """Cores that this process may use, counting the threads of one core once."""
    logical = logical_cores()
    seen = set()
    try:
        affinity = os.sched_getaffinity(0)
    except AttributeError:
        return min(logical, psutil.cpu_count(logical=False) or logical)
    for cpu in affinity:
        folder = f"/sys/devices/system/cpu/cpu{cpu}/topology"
        core = read(f"{folder}/core_id")
        if core is None:
            return min(logical, psutil.cpu_count(logical=False) or logical)
        seen.add((read(f"{folder}/physical_package_id"), core))
    return max(1, min(logical, len(seen)))


def cpu_model() -> str:
    """Return the processor's name, such as `AMD EPYC 7B13`."""
    match = re.search(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo") or "", re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine() or "unknown"


def ram_bytes() -> int:
    """Memory that this process may use: the machine's, cut down to the limit of its cgroup."""
    total = int(psutil.virtual_memory().total)
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = read(name)
        if text and text.isdigit():
            return min(total, int(text))
    return total


def available_bytes() -> int:
    """Memory that this process and others of its cgroup may still take, as the system estimates it."""
    free = int(psutil.virtual_memory().available)
    limit, used = read("/sys/fs/cgroup/memory.max"), read("/sys/fs/cgroup/memory.current")
    if limit and used and limit.isdigit() and used.isdigit():
        # Pages of files that were read and are not used any more go before anything is refused.
        match = re.search(r"^inactive_file (\d+)$", read("/sys/fs/cgroup/memory.stat") or "", re.MULTILINE)
        free = min(free, int(limit) - int(used) + (int(match[1]) if match else 0))
    return max(0, free)


def address_space_bytes() -> int | None:
    """Return the limit on a process's address space (ulimit -v) in bytes; None where there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _cgroup_cores() -> float | None:
    """Return the cgroup's CPU quota in cores; None where there is none. Version 2 first, then version 1."""
    quota, period = (read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")[::2]
    if quota == "max":
        quota = read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "-1"
        period = read("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or "100000"
    try:
        return float(quota) / float(period) if float(quota) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None
