"""Goodput: how often a run fails, how often it should save, and how many days it really takes.

The interval is Young's `sqrt(2 C M)` (CACM 17(9), 1974) and Daly's `sqrt(2 C M) [1 + sqrt(C / 2M) / 3 + C / 18M] - C`
(FGCS 22, 2006; M where C >= 2M), for a blocking save of C seconds and a mean time between failures of M. The
time that a restart after every failure costs is Daly's too, for exponential failures. Data and assumptions are in
`failures.yaml`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from orchestrator.chips.chip import Chip
from orchestrator.planner.quantity import Value, derive, given

_DAY = 86400.0
_LEAST_GOODPUT = 1e-6  # below it the job does not get on at all
_MOST_EXPONENT = 300.0
_ENOUGH = 0.8  # goodput with which restarts are accepted


@dataclass(frozen=True)
class FailureOptions:
    """Figures on failures that replace those of `failures.yaml`; None takes its figure.

    Attributes:
        failures_per_chip_day: that stop a job.
        save_stall_seconds: that a save stops the step.
        restart_seconds: from a failure to the next step.
        replace_seconds: from a failure until the other groups go on.
        repair_hours: until a failed host is back.
        recovery: `restart` from the last save, or `replace` the group that failed while the others go on; `auto`
            restarts, as runs do today, unless that loses more than a fifth of the time.
        sources: of figures that nobody gave on the command line, by name.
    """

    failures_per_chip_day: float | None = None
    save_stall_seconds: float | None = None
    restart_seconds: float | None = None
    replace_seconds: float | None = None
    repair_hours: float | None = None
    recovery: Literal["auto", "restart", "replace"] = "auto"
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Goodput:
    """Failures, saves, and the share of the time that is progress.

    Attributes:
        rate: failures per chip and day.
        mtbf: mean time between failures of the job.
        stall: seconds that a save stops the training.
        young: best interval between saves, to first order.
        interval: interval between saves that is counted.
        recovery: which of `restart` and `replace` was counted.
        restart: share of the time that is progress where every failure sends the job back to its last save.
        replace: the same where a data-parallel group that fails is replaced while the others go on; None with
            one group.
        spares: chips beyond those of the job that cover repairs.
    """

    rate: Value
    mtbf: Value
    stall: Value
    young: Value
    interval: Value
    recovery: str
    restart: Value
    replace: Value | None
    spares: Value

    @property
    def fraction(self) -> Value:
        """The share of the time that goes into steps that are kept, by the chosen way of recovery."""
        return self.replace if self.recovery == "replace" and self.replace else self.restart


@functools.cache
def failure_data() -> dict[str, Any]:
    """Return the contents of `failures.yaml`."""
    data: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("failures.yaml").read_text(encoding="utf-8"))
    return data


def failure_rate(chip: Chip, own: float | None = None, source: str = "given for this fleet") -> Value:
    """Return the interruptions of a job per chip and day: measured, else of the vendor, else the highest known; marked.

    Args:
        chip: of the catalogue.
        own: a rate that the user gives.
        source: of that one.
    """
    name, unit = "failures per chip-day", "1/day"
    if own is not None:
        return given(name, own, unit, source)
    measured = failure_data()["rates"]["measured"]
    for entry in measured:
        if entry["chip"] == chip.key:
            return given(name, entry["value"], unit, entry["source"])
    of_vendor = [entry for entry in measured if entry["vendor"] == chip.vendor]
    if of_vendor:
        entry = of_vendor[0]
        return given(name, entry["value"], unit, f"that of {entry['chip']}: {entry['source']}", estimated=True)
    entry = max(measured, key=lambda entry: float(entry["value"]))
    why = f"no figure of this vendor was published; the highest that was, of {entry['chip']}: {entry['source']}"
    return given(name, entry["value"], unit, why, estimated=True)


def young_interval(stall: float, mtbf: float) -> float:
    """Return the best seconds between saves, to first order.

    Args:
        stall: seconds that a save stops the training.
        mtbf: mean seconds between failures of the job.
    """
    return math.sqrt(2 * stall * mtbf)


def daly_interval(stall: float, mtbf: float) -> float:
    """Return the best seconds between saves, to higher order.

    Args:
        stall: seconds that a save stops the training.
        mtbf: mean seconds between failures of the job.
    """
    if stall >= 2 * mtbf:
        return mtbf
    return young_interval(stall, mtbf) * (1 + math.sqrt(stall / (2 * mtbf)) / 3 + stall / (18 * mtbf)) - stall


def restart_goodput(interval: float, stall: float, mtbf: float, restart: float) -> float:
    """Return the share of the time that is progress, with exponential failures, each of which costs a restart.

    Args:
        interval: seconds between saves.
        stall: seconds that a save stops the training.
        mtbf: mean seconds between failures of the job.
        restart: seconds that a restart takes.
    """
    exponent = (interval + stall) / mtbf
    if exponent + restart / mtbf > _MOST_EXPONENT:
        return _LEAST_GOODPUT
    return max(_LEAST_GOODPUT, interval / mtbf / (math.exp(restart / mtbf) * math.expm1(exponent)))


def replace_goodput(stall: float, mtbf: float, step: float, groups: float, repair: float) -> float:
    """Return the share of the time that is progress where a failure takes one data-parallel group out for a while.

    Every failure stops the others for `stall` seconds and costs half a step; the group is missing for `repair` seconds
    until spare chips stand in. Failures during a stop make it longer: hence the exponential.

    Args:
        stall: seconds that a save stops the training.
        mtbf: mean seconds between failures of the job.
        step: seconds of one.
        groups: data-parallel groups.
        repair: seconds until spare chips stand in.
    """
    stopped = math.exp(-min(_MOST_EXPONENT, (stall + step / 2) / mtbf))
    missing = min(1.0, repair / mtbf / groups)
    return max(_LEAST_GOODPUT, stopped * (1 - missing))


def goodput(
    chip: Chip,
    chips: Value,
    state_bytes: float,
    step: Value,
    groups: int,
    options: FailureOptions,
) -> Goodput:
    """Estimate failures, saves, and the share of the time that is left for training.

    Args:
        chip: whose failure rate counts.
        chips: that work.
        state_bytes: of weights and optimizer state, per device.
        step: seconds of one.
        groups: data-parallel groups.
        options: rates, and how the job recovers.
    """
    known = options.sources
    rate = failure_rate(chip, options.failures_per_chip_day, known.get("failures_per_chip_day", "given for this fleet"))
    mtbf = derive(
        "time between failures",
        "s",
        "1 day / (failures per chip-day x chips)",
        lambda r, n: _DAY / (r * n),
        rate,
        chips,
    )
    state = given("weights and optimizer state per device", state_bytes, "byte", "memory model")
    stall = _stall(state, options)
    write = derive(
        "time to write a save",
        "s",
        "state / write rate",
        lambda s, w: s / w,
        state,
        _assumed("write_bytes_per_second", "byte/s"),
    )
    young = derive("Young's interval", "s", "sqrt(2 x stall x time between failures)", young_interval, stall, mtbf)
    daly = derive("Daly's interval", "s", "Young's, to higher order", daly_interval, stall, mtbf)
    interval = derive("save every", "s", "Daly's interval, and no shorter than a write takes", max, daly, write)
    again = _assumed("restart_seconds", "s", options.restart_seconds, known.get("restart_seconds", "given"))
    restart = derive(
        "goodput with restarts", "ratio", "Daly's expected time", restart_goodput, interval, stall, mtbf, again
    )
    replace = None
    if groups > 1:
        swap = _assumed("replace_seconds", "s", options.replace_seconds)
        count = given("data-parallel groups", float(groups), "replicas", "the layout")
        formula = "exp(-(stall + step / 2) / time between failures) x (1 - share of groups that are missing)"
        replace = derive("goodput with replacement", "ratio", formula, replace_goodput, swap, mtbf, step, count, again)
    recovery = _recovery(options, restart, replace)
    spares = _spares(chip, chips, rate, options)
    return Goodput(rate, mtbf, stall, young, interval, recovery, restart, replace, spares)


def _recovery(options: FailureOptions, restart: Value, replace: Value | None) -> str:
    if replace is None or options.recovery == "restart":
        return "restart"
    if options.recovery == "replace":
        return "replace"
    kept, swapped = restart.value or 0.0, replace.value or 0.0
    return "replace" if kept < _ENOUGH and swapped > kept else "restart"


def _stall(state: Value, options: FailureOptions) -> Value:
    if options.save_stall_seconds is not None:
        source = options.sources.get("save_stall_seconds", "given")
        return given("stall of a save", options.save_stall_seconds, "s", source)
    rate = _assumed("copy_bytes_per_second", "byte/s")
    return derive(
        "stall of a save",
        "s",
        "state / copy rate (the rest is written behind the run's back)",
        lambda s, c: s / c,
        state,
        rate,
    )


def _spares(chip: Chip, chips: Value, rate: Value, options: FailureOptions) -> Value:
    """Chips of whole hosts that are in repair at most, on all but one day of a hundred."""
    host = chip.topology.chips_per_host or 1
    repair = _assumed("repair_hours", "h", options.repair_hours)
    sigmas = _assumed("spare_confidence_sigmas", "")

    def count(r: float, n: float, hours: float, sigma: float) -> float:
        mean = r * n * hours / 24
        return host * math.ceil(mean + sigma * math.sqrt(mean))

    formula = f"hosts of {host} in repair: mean + sigmas x sqrt(mean)"
    return derive("hot spares advised", "spares", formula, count, rate, chips, repair, sigmas)


def _assumed(name: str, unit: str, own: float | None = None, source: str = "given") -> Value:
    words = name.replace("_", " ")
    if own is not None:
        return given(words, own, unit, source)
    entry = failure_data()["assumptions"][name]
    return given(words, float(entry["value"]), unit, f"assumption: {entry['why']}", estimated=True)
