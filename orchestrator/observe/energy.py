"""Energy that a host has used, as its devices count it; nothing is estimated.

CPUs and their memory are read where the kernel shows their counters (RAPL, /sys/class/powercap, on most machines for
root alone); GPUs by zeus (ml.energy, extra `energy`), which asks NVML or ROCm. zeus reads RAPL, too, by a process of
its own that nothing ends where the run is killed: so that part of it is not used.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.chips.load import load_catalogue
from orchestrator.observe.sink import reason

RAPL = Path("/sys/class/powercap")
_PERIOD_SECONDS = 30.0  # a counter of 262 kJ comes round in eleven minutes at 400 W
Counters = Mapping[str, float]
Reader = Callable[[], Counters]


class EnergyMeter:
    """Joules of this host from now on, until `close`.

    Args:
        readers: part of the host (`gpu`, `cpu`, `dram`) to what gives joules that only grow, by device; None: those
            that there are.
    """

    def __init__(self, readers: Mapping[str, Reader] | None = None):
        self._why: list[str] = []
        self._begun = time.monotonic()
        self._first: dict[str, Counters] = {}
        self._readers: dict[str, Reader] = {}
        for part, read in (self._find() if readers is None else readers).items():
            try:
                self._first[part] = dict(read())
                self._readers[part] = read
            except Exception as error:  # whatever a driver says: a side channel ends no run
                self._why.append(f"{part}: {reason(error)}")
        self._closed = threading.Event()
        if self._readers:
            threading.Thread(target=self._keep_reading, name="energy", daemon=True).start()

    def facts(self, chip: str | None, devices: int) -> dict[str, Any]:
        """Return what run.json says of a leg: `joules` by part, `counted` devices of each, `seconds`.

        `not_measured` says what lacks, and why. `predicted_joules` is what `plan` reckons with for these seconds: the
        power of the catalogue.

        Args:
            chip: key of the catalogue; None where it is not known.
            devices: of the job, each a chip.
        """
        joules: dict[str, float] = {}
        counted: dict[str, int] = {}
        why, seconds = list(self._why), time.monotonic() - self._begun
        for part, read in self._readers.items():
            try:
                now, first = read(), self._first[part]
                joules[part] = round(sum(now[device] - before for device, before in first.items()), 3)
                counted[part] = len(first)
            except Exception as error:
                why.append(f"{part}: {reason(error)}")
        found: dict[str, Any] = {"seconds": round(seconds, 3)}
        found |= {"joules": joules, "counted": counted} if joules else {}
        found |= {"not_measured": "; ".join(why)} if why else {}
        watts = _catalogue_watts(chip)
        return found | ({} if watts is None else {"predicted_joules": round(watts * devices * seconds, 3)})

    def close(self) -> None:
        """End reading."""
        self._closed.set()

    def _keep_reading(self) -> None:
        while not self._closed.wait(_PERIOD_SECONDS):
            for read in self._readers.values():
                try:
                    read()
                except Exception:
                    continue  # `facts` says it

    def _find(self) -> dict[str, Reader]:
        found: dict[str, Reader] = {}
        for part, name in (("cpu", "package"), ("dram", "dram")):
            if zones := _zones(RAPL, name):
                found[part] = Rapl(zones).joules
            else:
                self._why.append(f"{part}: the kernel shows no counter (RAPL)")
        if importlib.util.find_spec("zeus") is None:
            self._why.append("gpu: zeus is not installed (scripts/setup energy)")
            return found
        try:
            found["gpu"] = _gpus()
        except Exception as error:
            self._why.append(f"gpu: {reason(error)}")
        return found


class Rapl:
    """Counters of the kernel's power zones, which begin again at zero now and then.

    Args:
        zones: their folders.
    """

    def __init__(self, zones: list[Path]):
        self._zones, self._lock = zones, threading.Lock()
        self._last: dict[Path, int] = {}
        self._rounds = dict.fromkeys(zones, 0)

    def joules(self) -> Counters:
        """Return joules by zone, which only grow if this is called often enough."""
        with self._lock:
            found = {}
            for zone in self._zones:
                now = int((zone / "energy_uj").read_text())
                if now < self._last.get(zone, now):
                    self._rounds[zone] += int((zone / "max_energy_range_uj").read_text())
                self._last[zone] = now
                found[zone.name] = (now + self._rounds[zone]) / 1e6
            return found


def _zones(root: Path, name: str) -> list[Path]:
    """Return the folders of RAPL's zones whose name begins so; those of packages hold their memory's, too."""
    found = []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            if (zone / "name").read_text().startswith(name):
                found.append(zone)
        except OSError:
            continue
    return found


def _gpus() -> Reader:
    from zeus.device import get_gpus

    gpus = get_gpus()
    if not len(gpus):
        raise OSError("there is none")
    return lambda: {str(index): gpus.get_total_energy_consumption(index) / 1000 for index in range(len(gpus))}


def _catalogue_watts(chip: str | None) -> float | None:
    """Return the watts per chip that `plan` reckons with, without the power of the facility."""
    if chip is None:
        return None
    known = load_catalogue().get(chip)
    return known.server_power.value if known.server_power.known else known.power.value
