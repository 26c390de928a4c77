"""The checks of `doctor`: system, packages, storage, and a trial of the devices. No torch in this process."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.hardware import host

State = Literal["ok", "note", "warning", "error"]

_OLDEST_PYTHON, _TOO_NEW_PYTHON = (3, 11), (3, 14)
# Packages without which nothing runs → the release series that the product is tested with, where it matters.
_NEEDED: dict[str, str | None] = {
    "torch": "2.13",
    "lightning": "2.6",
    "hydra-core": "1.3",
    "omegaconf": "2.3",
    "grain": "0.2",
    "numpy": None,
    "pyarrow": None,
    "tokenizers": None,
    "safetensors": None,
    "tensorboard": None,
    "tqdm": None,
    "pyyaml": None,
    "filelock": None,
    "psutil": None,
    "jsonschema-rs": None,
}
_OPTIONAL = (
    "wandb",
    "universal-pathlib",
    "s3fs",
    "gcsfs",
    "cryptography",
    "blake3",
    "triton",
    "torch_xla",
    "libtpu",
    "torch-neuronx",
    "neuronx-cc",
    "torch_tpu",
)
_BAD = {("lightning", "2.6.2"): "a compromised release", ("lightning", "2.6.3"): "a compromised release"}
_LOW_DISK_BYTES = 5 * 2**30
_LOW_SHM_BYTES = 64 * 2**20
_LOW_OPEN_FILES = 1024
_TRIAL_SECONDS = 60.0

_ARITHMETIC = """
import sys, torch
device = torch.device(sys.argv[1])
weight = torch.randn(128, 128, device=device, requires_grad=True)
loss = (torch.randn(64, 128, device=device) @ weight).square().mean()
loss.backward()
assert torch.isfinite(weight.grad).all() and weight.grad.abs().sum() > 0
print(torch.__version__)
"""
_ALL_REDUCE = """
import datetime, sys, torch
import torch.distributed as dist
rank, path = int(sys.argv[1]), sys.argv[2]
store = dist.FileStore(path, 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30))
value = torch.tensor([float(rank + 1)])
dist.all_reduce(value)
assert value.item() == 3.0
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Check:
    """One line of the findings. `error` means that training cannot work.

    Attributes:
        name: of the line.
        state: how it stands.
        text: what was found.
        fix: what to do about it; None: nothing.
    """

    name: str
    state: State
    text: str
    fix: str | None = None


def check_system() -> list[Check]:
    """Operating system, interpreter, processor and memory."""
    version = sys.version_info[:2]
    text = f"{platform.python_version()} at {sys.executable}"
    if version < _OLDEST_PYTHON:
        python = Check("python", "error", text, "use Python 3.11, 3.12 or 3.13")
    elif version >= _TOO_NEW_PYTHON:
        python = Check("python", "error", f"{text}: hydra 1.3 fails on 3.14", "use Python 3.11, 3.12 or 3.13")
    else:
        python = Check("python", "ok", text)
    cores = f"{host.physical_cores()} cores, {host.logical_cores()} threads"
    return [
        Check("system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}"),
        python,
        Check("processor", "ok", f"{host.cpu_model()}, {cores} for this process"),
        Check("memory", "ok", f"{host.ram_bytes() / 2**30:.1f} GiB"),
    ]


def check_packages() -> list[Check]:
    """Check the packages that are needed, and list the optional ones that are installed."""
    found = [_check_package(name, series) for name, series in _NEEDED.items()]
    optional = [(name, host.package_version(name)) for name in _OPTIONAL]
    here = ", ".join(f"{name} {version}" for name, version in optional if version) or "none"
    missing = ", ".join(name for name, version in optional if version is None)
    return [*found, Check("optional", "note", f"here: {here}; not here: {missing or 'none'}")]


def _check_package(name: str, series: str | None) -> Check:
    version = host.package_version(name)
    if version is None:
        return Check(name, "error", "not installed", f"pip install {name}" + (f"=={series}.*" if series else ""))
    if (name, version) in _BAD:
        fix = f"pip install --upgrade {name}, and change the secrets that this machine held"
        return Check(name, "error", f"{version} is {_BAD[name, version]}", fix)
    if series is not None and not version.startswith(f"{series}."):
        return Check(name, "warning", f"{version}; tested with {series}", f"pip install '{name}=={series}.*'")
    return Check(name, "ok", version)


def check_storage(runs_dir: str) -> list[Check]:
    """Check the disks of the runs and of the caches, file locks, shared memory, and the limit on open files.

    Args:
        runs_dir: where runs are kept.
    """
    runs = Path(runs_dir).expanduser()
    caches = os.environ.get("ORCHESTRATOR_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = Path(caches).expanduser()
    checks = [_check_disk("runs", runs), _check_disk("cache", cache), _check_lock(runs)]
    shm = host.path("/dev/shm")
    if shm.is_dir():
        total = shutil.disk_usage(shm).total
        low = total < _LOW_SHM_BYTES
        fix = "in a container: start it with --shm-size=1g or more" if low else None
        checks.append(Check("shared memory", "warning" if low else "ok", f"{total / 2**30:.2f} GiB at /dev/shm", fix))
    try:
        import resource
    except ImportError:  # Windows
        return checks
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    low = not unlimited and soft < _LOW_OPEN_FILES
    text = "unlimited" if unlimited else f"{soft:,} (may be raised to {hard:,})"
    checks.append(Check("open files", "warning" if low else "ok", text, "ulimit -n 65536" if low else None))
    return checks


def _check_disk(name: str, folder: Path) -> Check:
    there = _nearest(folder)
    free = shutil.disk_usage(there).free
    text = f"{free / 2**30:.1f} GiB free for {folder}"
    if not os.access(there, os.W_OK):
        return Check(
            name, "error" if name == "runs" else "warning", f"{there} cannot be written", "choose another folder"
        )
    if free < _LOW_DISK_BYTES:
        return Check(name, "warning", text, "free some space: a checkpoint takes 12 bytes per parameter")
    return Check(name, "ok", text)


def _check_lock(folder: Path) -> Check:
    """Check file locks: some network file systems grant every lock; two runs would then write into one directory."""
    from filelock import FileLock, Timeout

    try:
        with tempfile.TemporaryDirectory(prefix=".orchestrator-", dir=_nearest(folder)) as name:
            path = str(Path(name) / "lock")
            with FileLock(path, is_singleton=False):
                try:
                    with FileLock(path, timeout=0, is_singleton=False):
                        return Check(
                            "file locks", "warning", "do not exclude", f"keep runs on a local disk, not in {folder}"
                        )
                except Timeout:
                    return Check("file locks", "ok", "work")
    except (OSError, NotImplementedError) as error:
        return Check("file locks", "warning", f"do not work: {error}", f"keep runs on a local disk, not in {folder}")


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def try_devices(device_types: Sequence[str], *, deep: bool = False) -> list[Check]:
    """Let each device multiply and differentiate, and with `deep` let two processes all-reduce through gloo.

    In processes of their own: a broken driver may take its process along.

    Args:
        device_types: of torch, such as `cuda`.
        deep: whether to try collectives, too.
    """
    checks = []
    for device in dict.fromkeys(device_types):
        started = time.perf_counter()
        # A vendor's device is known once its library has been loaded by torch.
        problem = _run_all([[_ARITHMETIC, device]], autoload=device in ("tpu", "neuron"))
        checks.append(_trial(f"{device} arithmetic", problem, started))
    if deep:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
            store = str(Path(folder) / "store")
            problem = _run_all([[_ALL_REDUCE, "0", store], [_ALL_REDUCE, "1", store]])
        checks.append(_trial("two processes", problem, started))
    return checks


def _trial(name: str, problem: str | None, started: float) -> Check:
    if problem is None:
        return Check(name, "ok", f"works ({time.perf_counter() - started:.1f} s, most of it starting torch)")
    return Check(name, "error", problem, "run it by hand for the whole message; reinstall torch if it does not start")


def _run_all(commands: Sequence[Sequence[str]], *, autoload: bool = False) -> str | None:
    """Run the Python programs side by side; the last line of the first that fails, or None."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload))}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", *command], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    deadline = time.monotonic() + _TRIAL_SECONDS
    problem = None
    for process in started:
        try:
            _, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            problem = problem or f"no answer within {_TRIAL_SECONDS:.0f} s"
            continue
        if process.returncode != 0:
            lines = errors.strip().splitlines()
            problem = problem or (lines[-1] if lines else f"ended with code {process.returncode}")
    return problem
