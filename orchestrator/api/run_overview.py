"""What every run in a folder is doing, a line each: read from the ends of their files, so that many are quick."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.compose import read_plain
from orchestrator.errors import UserError
from orchestrator.observe.history import METRICS, last_rows
from orchestrator.observe.time_spans import ALIVE, BOOK, read_book
from orchestrator.report.run_data import number
from orchestrator.runs import run_directory
from orchestrator.runs.listing import latest_runs

FRESH_SECONDS = 60.0
"""A run on another host is taken for alive as long as one of its files is no older."""
_TAIL_BYTES = 1 << 16
_LOCKS = Path("/proc/locks")
# Files that a run at work writes; the time book's sign of life comes each second.
_WRITTEN = (METRICS, run_directory.RUN, ALIVE, BOOK, ".lock")
_UNDER_WAY = "running"


@dataclass(frozen=True)
class RunOverview:
    """A run in a line.

    Attributes:
        run: its directory, below the folder of all runs.
        directory: the same, from here.
        state: `running`, `finished`, `interrupted`, `pruned` (by its sweep), `diverged`, `failed`; `dead` where it
            says that it runs and no process of this machine holds it, nor has it given a sign of life; `unknown` where
            it says nothing.
        step: the last one in its metrics; None before the first.
        max_steps: of its configuration.
        loss: of that step, nats per token; None where it is not finite or not known.
        val_loss: the last one.
        tokens_per_second: of the last step.
        goodput: the share of its time that went into steps that were kept; None where that is not known.
        restarts: starts after the first one.
        host: on which rank 0 ran last.
        devices: of the last leg, as `4 x NVIDIA H100`.
        worked: seconds since the epoch of the last sign of life.
    """

    run: str
    directory: Path
    state: str
    step: int | None
    max_steps: int | None
    loss: float | None
    val_loss: float | None
    tokens_per_second: float | None
    goodput: float | None
    restarts: int
    host: str | None
    devices: str | None
    worked: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {**dataclasses.asdict(self), "directory": str(self.directory)}


def list_runs(runs_dir: str | Path = "runs", *, name: str | None = None) -> list[RunOverview]:
    """Return what the runs in a folder are doing, the one that was worked on last first.

    Args:
        runs_dir: of all runs.
        name: of those that are wanted: the folder below `runs_dir`; None: all.
    """
    folder = Path(runs_dir)
    found = [look_at(run, folder).overview for run in latest_runs(folder) if name is None or run.parent.name == name]
    return sorted(found, key=lambda one: one.worked, reverse=True)


@dataclass(frozen=True)
class RunLook:
    """One look at the files of a run.

    Attributes:
        overview: the run in a line.
        facts: of its run.json.
        rows: the last ones of its metrics.
        goodput: the share of its time that was progress (`fraction`), and its `seconds` by state.
    """

    overview: RunOverview
    facts: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    goodput: Mapping[str, Any]


def look_at(run_dir: Path, runs_dir: Path, most_bytes: int = _TAIL_BYTES) -> RunLook:
    """Return what a run is doing.

    Args:
        run_dir: of the run.
        runs_dir: the folder that its name is told below.
        most_bytes: of the end of its metrics, that are read.
    """
    facts = run_directory.read_run(run_dir)
    steps = [row for row in last_rows(run_dir / METRICS, most_bytes) if isinstance(row.get("step"), int)]
    goodput = _goodput(run_dir, facts)
    legs = [leg for leg in facts.get("legs") or () if isinstance(leg, Mapping)]
    last = legs[-1] if legs else {}
    trained: dict[str, Any] = next((row for row in reversed(steps) if "loss" in row), {})
    evaluated: dict[str, Any] = next((row for row in reversed(steps) if "val_loss" in row), {})
    names = last.get("device_names") or [last.get("target")]
    worked = _worked(run_dir)
    overview = RunOverview(
        run=str(run_dir.relative_to(runs_dir)) if run_dir.is_relative_to(runs_dir) else str(run_dir),
        directory=run_dir,
        state=_state(str(facts.get("status") or ""), run_dir, worked),
        step=trained.get("step") or last.get("end_step") or last.get("start_step"),
        max_steps=_max_steps(run_dir),
        loss=number(trained.get("loss")),
        val_loss=number(evaluated.get("val_loss")),
        tokens_per_second=number(trained.get("tokens_per_second")),
        goodput=number(goodput.get("fraction")),
        restarts=max(0, len(legs) - 1),
        host=str(last["host"]) if last.get("host") else None,
        devices=f"{last['devices']} x {names[0]}" if last.get("devices") else None,
        worked=worked,
    )
    return RunLook(overview, facts, steps, goodput)


def _goodput(run_dir: Path, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """As of now; run.json has it as of the run's last start or end."""
    book = read_book(run_dir)
    if book.spans:
        return book.facts()
    said = facts.get("goodput")
    return said if isinstance(said, Mapping) else {}


def is_held(run_dir: Path) -> bool | None:
    """Whether a process of this machine holds a run; None where the system does not say.

    To take the lock for a moment would make a start fail that comes in that moment.

    Args:
        run_dir: of the run.
    """
    try:
        found = (run_dir / ".lock").stat()
        locks = _LOCKS.read_text()
    except FileNotFoundError:
        return False if _LOCKS.exists() else None
    except OSError:
        return None
    # "1: FLOCK  ADVISORY  WRITE 4711 08:01:131072 0 EOF": proc_locks(5), the device in hexadecimal numbers.
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    return any(place in line.split() for line in locks.splitlines())


def _state(status: str, run_dir: Path, worked: float) -> str:
    if status != _UNDER_WAY and (status or not is_held(run_dir)):
        return status or "unknown"
    if is_held(run_dir) or time.time() - worked < FRESH_SECONDS:
        return _UNDER_WAY
    return "dead"


def _worked(run_dir: Path) -> float:
    times = []
    for name in (*_WRITTEN, run_directory.CONFIG):
        try:
            times.append((run_dir / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def _max_steps(run_dir: Path) -> int | None:
    try:
        train = read_plain(run_dir / run_directory.CONFIG).get("train")
    except UserError:
        return None
    steps = train.get("max_steps") if isinstance(train, Mapping) else None
    return steps if isinstance(steps, int) else None
