"""Probe a host's TPU chips, whichever library drives them: number, kind, and problems."""

from __future__ import annotations

import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from orchestrator.chips.load import load_catalogue
from orchestrator.distributed.world import detect
from orchestrator.errors import HardwareError
from orchestrator.hardware import host
from orchestrator.hardware.target import Problem

_GOOGLE_PCI_VENDOR = 0x1AE0
# PCI device number → name, key of the chip catalogue; jax, _src/hardware_utils.py. v2 and v3 share one and are not in
# the catalogue.
_PCI_CHIPS: dict[int, tuple[str, str | None]] = {
    0x0027: ("TPU v2 or v3", None),
    0x005E: ("TPU v4", "tpu-v4"),
    0x0062: ("TPU v5p", "tpu-v5p"),
    0x0063: ("TPU v5e", "tpu-v5e"),
    0x006F: ("TPU v6e", "tpu-v6e"),
    0x0076: ("TPU7x", "tpu-v7x"),
}
_DEVICES_PER_UNKNOWN_CHIP = {"TPU v2 or v3": 2}  # torch_xla, _internal/tpu.py: num_logical_cores_per_chip
_METADATA_SECONDS = 3.0
_LOCK = "/tmp/libtpu_lockfile"  # libtpu holds it as long as its process lives
_HOST_VARIABLES = ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "MASTER_PORT")
_SLICE_VARIABLES = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")


@dataclass(frozen=True)
class TpuHost:
    """The TPU devices of a host.

    Attributes:
        names: one per device that the runtime counts: two per chip of TPU7x, one per chip of v4 to v6e.
        chip: key of the chip catalogue where it is sure.
        files: the device files that lead to them.
        problems: why they cannot be used.
    """

    names: tuple[str, ...] = ()
    chip: str | None = None
    files: tuple[Path, ...] = ()
    problems: tuple[Problem, ...] = ()


def look() -> TpuHost:
    """Find the chips, and check access to them and the variables that name the other hosts and slices."""
    on_bus = [p for p in host.pci_devices() if p.vendor == _GOOGLE_PCI_VENDOR and p.device in _PCI_CHIPS]
    # /dev/vfio is any passed-through device's: it counts as a TPU's only beside one on the bus.
    files = host.glob("/dev/accel[0-9]*") or (host.glob("/dev/vfio/[0-9]*") if on_bus else [])
    if not on_bus and not files:
        missing = "no TPU found (no /dev/accel*, no TPU on the PCI bus)"
        return TpuHost(problems=(Problem(missing, "run on a Google Cloud TPU VM, or choose another hardware target"),))
    name, chip, count = _count(on_bus, len(files))
    problems = (*_access(files), *worker_problems(), *slice_problems())
    return TpuHost((name,) * count, chip, tuple(files), problems)


def _count(on_bus: list[host.PciDevice], files: int) -> tuple[str, str | None, int]:
    """Name, catalogue key and number of the devices. Where only some chips are passed in, those with files count."""
    kinds = {_PCI_CHIPS[function.device] for function in on_bus}
    name, chip = kinds.pop() if len(kinds) == 1 else ("TPU", None)
    per_chip = load_catalogue().get(chip).logical_devices_per_chip if chip else _DEVICES_PER_UNKNOWN_CHIP.get(name, 1)
    # A chip may show each of its cores as a function of its own, as TPU7x does by tpu-info's device.py.
    chips = len({function.address.partition(".")[0] for function in on_bus}) or files
    functions = len(on_bus) or files
    return name, chip, min(functions, files or functions) * per_chip * chips // functions


def _access(files: list[Path]) -> tuple[Problem, ...]:
    """Whether this user may open the chips and no other process holds them."""
    if not files:
        fix = "give the process /dev/accel* or /dev/vfio (in a container: --privileged, or the TPU device plugin)"
        return (Problem("a TPU is on the PCI bus, but its device files are missing", fix),)
    control = host.path("/dev/vfio/vfio")
    needed = [*files, *([control] if files[0].parent == control.parent and control.exists() else [])]
    closed = [str(file) for file in needed if not os.access(file, os.R_OK | os.W_OK)]
    if closed:
        fix = f"run as root, or join the group that owns them (ls -l {closed[0]}; sudo usermod -aG GROUP $USER)"
        return (Problem(f"this user may not open the TPU's device files: {', '.join(closed)}", fix),)
    lock = host.path(_LOCK)
    if lock.exists() and not os.access(lock, os.W_OK):
        fix = f"when no process uses the TPU: sudo rm {_LOCK}"
        return (Problem(f"{_LOCK}, which libtpu must lock, belongs to another user", fix),)
    holders = _holders(files, lock)
    if holders:
        who = ", ".join(map(str, sorted(holders)))
        return (Problem(f"the TPU is held by process {who}", f"wait for it, or end it: ps -fp {who.replace(' ', '')}"),)
    return ()


def _holders(files: list[Path], lock: Path) -> set[int]:
    """Return the processes that hold a chip or libtpu's lock; none where this one is one of several, its peers."""
    if _is_started():
        return set()
    wanted = {f"/{file.relative_to(host.ROOT)}" for file in files}
    found = set()
    for link in host.glob("/proc/[0-9]*/fd/*"):
        try:
            opened = os.readlink(link)
        except OSError:  # the process has ended, or is another user's
            continue
        if opened in wanted:
            found.add(int(link.parts[-3]))
    # "1: POSIX  ADVISORY  WRITE 4711 08:01:131072 0 EOF": proc_locks(5). Taking the lock to see whether it is free
    # would drop it where this process has it.
    inode = str(lock.stat().st_ino) if lock.exists() else None
    for line in (host.read("/proc/locks") or "").splitlines():
        match = re.match(r"\d+: (?:POSIX|FLOCK|OFDLCK)\s+\w+\s+\w+\s+(\d+) \w+:\w+:(\d+) ", line)
        if match and match[2] == inode:
            found.add(int(match[1]))
    return found - {os.getpid()}


def _is_started() -> bool:
    try:
        return detect(os.environ) is not None
    except HardwareError:  # said where the world is joined
        return True


def variables() -> dict[str, str]:
    """Return the variables that say which host of which slice this is: the process's own, else the machine's metadata.

    GKE sets them. On a Cloud TPU VM they are in the metadata only, which libtpu reads by itself.
    """
    names = (*_HOST_VARIABLES, *_SLICE_VARIABLES)
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if "TPU_WORKER_HOSTNAMES" in given or os.environ.get("TPU_SKIP_MDS_QUERY"):
        return given
    return {**_metadata_variables(), **given}


def _metadata_variables() -> dict[str, str]:
    # The hosts as "name:uid:ip,…", the rest as lines "KEY: 'value'": torch_xla 2.9.0, _internal/tpu.py.
    hosts = [entry.split(":")[-1] for entry in _metadata("worker-network-endpoints").split(",") if entry]
    if not hosts:
        return {}  # no such machine, or no metadata server: not asked again
    entries = dict(re.findall(r"^(\w+): *'?([^'\n]*)'?$", _metadata("tpu-env"), re.MULTILINE))
    found = {name: entries[name] for name in _SLICE_VARIABLES if entries.get(name)}
    if entries.get("WORKER_ID"):
        found |= {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "TPU_WORKER_ID": entries["WORKER_ID"]}
    return found


def _metadata(attribute: str) -> str:
    """Return an attribute of this virtual machine; empty where there is none, or no metadata server."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError):
        return ""


def worker_hosts() -> list[str]:
    """List the hosts of this slice, as Google's machines and GKE name them; empty where they do not."""
    return [name.strip() for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()]


def worker_problems() -> tuple[Problem, ...]:
    """Whether the variables that name the hosts of the slice, and this one among them, fit each other."""
    hosts, number = worker_hosts(), os.environ.get("TPU_WORKER_ID", "")
    fix = "set both, the same list on every host and each host's place in it, or unset both for a single host"
    if len(set(hosts)) < len(hosts):
        return (Problem(f"TPU_WORKER_HOSTNAMES names a host twice: {','.join(hosts)}", fix),)
    if not number:
        if len(hosts) < 2:
            return ()
        what = f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts, but TPU_WORKER_ID does not say which of them this is"
        return (Problem(what, fix),)
    if not number.isdigit():
        return (Problem(f"TPU_WORKER_ID={number!r} is not a number", fix),)
    if int(number) >= max(1, len(hosts)):
        named = f"TPU_WORKER_HOSTNAMES names {len(hosts)}" if hosts else "TPU_WORKER_HOSTNAMES is not set"
        return (Problem(f"TPU_WORKER_ID={number} is host {int(number) + 1} of the slice, but {named}", fix),)
    return ()


def slice_problems() -> tuple[Problem, ...]:
    """Whether the variables of a job over several slices are complete."""
    given = {name: os.environ[name] for name in _SLICE_VARIABLES if os.environ.get(name)}
    if not given:
        return ()
    fix = "set all three, as GKE's JobSet does, or unset them for a single slice"
    missing = [name for name in _SLICE_VARIABLES if name not in given]
    if missing:
        return (Problem(f"{', '.join(given)} set without {', '.join(missing)}", fix),)
    count, place = given["MEGASCALE_NUM_SLICES"], given["MEGASCALE_SLICE_ID"]
    if not (count.isdigit() and place.isdigit() and int(place) < int(count)):
        return (Problem(f"MEGASCALE_SLICE_ID={place} of MEGASCALE_NUM_SLICES={count} is no slice", fix),)
    return ()
