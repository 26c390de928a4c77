"""The record of a sweep, `sweep.json` in its folder: what its page is drawn from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.atomic_files import write_atomically

RECORD, PAGE = "sweep.json", "sweep.html"
FOLDER = "sweeps"
"""Of the sweeps, in `runs_dir`; each has a folder of its own there."""

JobStatus = Literal["running", "finished", "pruned", "diverged", "stopped", "failed"]


def parsed_number(text: str) -> float | None:
    """Return the finite number that a value is; None for any other text.

    Args:
        text: of a value.
    """
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def short_value(text: str) -> str:
    """Return a number of many digits in few, and any other text as it is.

    Args:
        text: of a value.
    """
    number = parsed_number(text)
    return text if number is None or len(text) <= 8 else f"{number:.4g}"


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep.

    Attributes:
        number: of the job, from 0.
        values: of the keys that it was started with, as overrides have them.
        status: how it has ended.
        objective: that it has reached; None where it has none, infinity where it has diverged.
        run_dir: of the run; None where none was begun.
    """

    number: int
    values: Mapping[str, str]
    status: JobStatus
    objective: float | None = None
    run_dir: str | None = None


@dataclass(frozen=True)
class SweepRecord:
    """A sweep, so far.

    Attributes:
        name: of the sweep.
        objective: name of what is to become small or large.
        lower_is_better: small or large.
        jobs: in their order.
        space: what may be chosen of each key, as JSON data; empty: what the jobs have.
        wanted: jobs that there will be; None: those that there are.
        command: words of the command line.
    """

    name: str
    objective: str
    lower_is_better: bool
    jobs: Sequence[SweepJob]
    space: Mapping[str, Any] = field(default_factory=dict)
    wanted: int | None = None
    command: Sequence[str] = ()

    @property
    def keys(self) -> list[str]:
        """The keys whose values differ between the jobs, or that the sweep may choose."""
        known = dict.fromkeys(key for job in self.jobs for key in job.values)
        return [key for key in known if key in self.space or len({job.values.get(key) for job in self.jobs}) > 1]

    @property
    def best(self) -> SweepJob | None:
        """The finished job with the best objective; None where none has one."""
        finished = [job for job in self.jobs if job.status == "finished" and job.objective is not None]
        sign = 1 if self.lower_is_better else -1
        return min(finished, key=lambda job: sign * (job.objective or 0.0), default=None)

    def write(self, folder: Path) -> None:
        """Write the record.

        Args:
            folder: of the sweep; it is made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [
            {
                "number": job.number,
                "values": dict(job.values),
                "status": job.status,
                "objective": job.objective if job.objective is None or math.isfinite(job.objective) else None,
                "run_dir": job.run_dir,
            }
            for job in self.jobs
        ]
        data = {
            "format": 1,
            "name": self.name,
            "objective": self.objective,
            "lower_is_better": self.lower_is_better,
            "wanted": self.wanted,
            "command": list(self.command),
            "space": dict(self.space),
            "jobs": jobs,
        }
        write_atomically(folder / RECORD, json.dumps(data, indent=1) + "\n", shared=True)
