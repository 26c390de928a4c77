"""Accuracy of the estimates against published runs: errors per vendor, verdicts on memory, layouts picked."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.planner.estimate.memory import estimate_memory
from orchestrator.planner.estimate.time import estimate_time
from orchestrator.planner.evidence.published import PublishedRun


@dataclass(frozen=True)
class Checked:
    """A run with its estimates.

    Attributes:
        run: the published run.
        held_out: no constant has seen its family.
        seconds: of a step, estimated.
        memory: bytes of the fullest device, estimated.
        fits: the verdict on memory.
        unknown: what the estimate of the time could not count.
    """

    run: PublishedRun
    held_out: bool
    seconds: float
    memory: float
    fits: bool | None
    unknown: tuple[str, ...]

    @property
    def time_error(self) -> float | None:
        """(estimated - measured) / measured."""
        return None if self.run.seconds is None else self.seconds / self.run.seconds - 1

    @property
    def memory_error(self) -> float | None:
        """Estimated memory relative to the measured one, less 1; None where none was measured."""
        return None if self.run.memory is None else self.memory / self.run.memory - 1


@dataclass(frozen=True)
class Errors:
    """Absolute relative errors: number of rows, median, and 90th percentile; `bias` is the signed median."""

    rows: int
    median: float
    p90: float
    bias: float


@dataclass(frozen=True)
class Verdicts:
    """Verdicts on out of memory: how often a warning was right (precision), and the share warned of (recall)."""

    right: int
    false_alarms: int
    missed: int

    @property
    def precision(self) -> float:
        """The share of the warnings that were right."""
        return self.right / max(1, self.right + self.false_alarms)

    @property
    def recall(self) -> float:
        """The share of the layouts out of memory that were warned of."""
        return self.right / max(1, self.right + self.missed)


@dataclass(frozen=True)
class Pick:
    """The layout that the estimates would choose from a sheet of the sweep.

    Attributes:
        sheet: of the sweep.
        held_out: no constant has seen its family.
        picked: the layout with the best estimate.
        best: the layout with the best measurement.
        gap: how much slower it was, measured, than the sheet's best; None where it ran out of memory.
    """

    sheet: str
    held_out: bool
    picked: str
    best: str
    gap: float | None


def check(runs: Iterable[PublishedRun], held: set[str]) -> list[Checked]:
    """Estimate every run.

    Args:
        runs: published runs.
        held: families that no constant has seen.
    """
    checked = []
    for run in runs:
        time = estimate_time(run.job, run.cluster, run.plan)
        memory = estimate_memory(run.job, run.cluster, run.plan)
        checked.append(Checked(run, run.family in held, time.step, memory.total, memory.fits, time.unknown))
    return checked


def errors(signed: Sequence[float]) -> Errors | None:
    """Summarise signed errors; None of no rows. The 90th percentile interpolates between rows.

    Args:
        signed: relative errors.
    """
    if not signed:
        return None
    sizes = sorted(abs(error) for error in signed)
    at = 0.9 * (len(sizes) - 1)
    low = int(at)
    high = min(low + 1, len(sizes) - 1)
    p90 = sizes[low] + (at - low) * (sizes[high] - sizes[low])
    return Errors(len(sizes), statistics.median(sizes), p90, statistics.median(signed))


def verdicts(checked: Iterable[Checked]) -> Verdicts:
    """Count right and wrong verdicts on memory, of the runs whose source says whether they fit.

    Args:
        checked: runs with their estimates.
    """
    pairs = [(item.run.out_of_memory, item.fits is False) for item in checked if item.run.out_of_memory is not None]
    return Verdicts(pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False)))


def picks(checked: Iterable[Checked]) -> list[Pick]:
    """Compare the fastest estimate of those estimated to fit with the best measured, for each sheet of the sweep.

    Args:
        checked: runs with their estimates.
    """
    sheets: dict[str, list[Checked]] = {}
    for item in checked:
        if item.run.out_of_memory is not None:
            sheets.setdefault(item.run.family, []).append(item)
    chosen = []
    for sheet, items in sorted(sheets.items()):
        ran = [item for item in items if item.run.seconds is not None]
        best = min(ran, key=lambda item: item.run.seconds or 0.0)
        picked = min((item for item in items if item.fits), key=lambda item: item.seconds)
        gap = picked.run.seconds / best.run.seconds - 1 if picked.run.seconds and best.run.seconds else None
        chosen.append(Pick(sheet, best.held_out, picked.run.key, best.run.key, gap))
    return chosen
