"""Run the jobs of a multirun and record values, status and objective of each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import stopping
from orchestrator.errors import DIVERGED, DONE, FAILED, STOPPED, UserError, describe_defect
from orchestrator.sweeps.sweep_record import PAGE, JobStatus, SweepJob, SweepRecord, short_value


@dataclass(frozen=True)
class Scored:
    """The exit code and the objective of a job.

    Attributes:
        code: its exit code.
        objective: the number that a sweeper is to make small or large; None where there is none.
        name: of the objective.
        lower_is_better: smaller objectives are better.
        run_dir: of its run; None where none was begun.
        pruned: it was ended early, as it fell behind others.
    """

    code: int
    objective: float | None = None
    name: str = "objective"
    lower_is_better: bool = True
    run_dir: Path | None = None
    pruned: bool = False

    @property
    def status(self) -> JobStatus:
        """How the job has ended, in a word."""
        if self.pruned:
            return "pruned"
        if self.code in STOPPED:
            return "stopped"
        return "finished" if self.code == DONE else "diverged" if self.code == DIVERGED else "failed"


@dataclass(frozen=True)
class StoredSweep:
    """Where a sweep is kept.

    Attributes:
        folder: of the sweep.
        space: what may be chosen of each key, as JSON data; empty: what the jobs have.
        wanted: jobs that there will be; None: not known.
        jobs: returns all jobs, also those of other processes and of earlier starts; None: this process has them all.
    """

    folder: Path
    space: Mapping[str, Any] = field(default_factory=dict)
    wanted: int | None = None
    jobs: Callable[[], Sequence[SweepJob]] | None = None


class SweepStopped(BaseException):
    """Ends Hydra's loop over the jobs, which goes on after every `Exception`."""


class Sweep:
    """Collects the results of the jobs of a multirun.

    Args:
        command: words of the command line.
        keep: called with the sweep's folder and record whenever a job has ended; None: nothing is kept.

    Attributes:
        stored: where the sweep is kept; None where that is not known yet.
        last: how the last job has ended.
    """

    def __init__(self, command: Sequence[str] = (), keep: Callable[[Path, SweepRecord], object] | None = None) -> None:
        self.stored: StoredSweep | None = None
        self.last = Scored(FAILED)
        self._command, self._keep = tuple(command), keep
        self._jobs: dict[int, SweepJob] = {}
        self._codes: dict[str, int] = {}  # of the jobs of this process
        self._scale = Scored(DONE)  # has the name of the objective, and which way is better

    def run(self, number: int, label: str, values: Mapping[str, str], task: Callable[[], Scored]) -> float | None:
        """Run a job, report its failure, and return its objective; None where it failed.

        Args:
            number: of the job.
            label: its overrides.
            values: of its overrides, by key.
            task: the job; returns its objective.

        Raises:
            SweepStopped: a signal has stopped the job.
        """
        stopping.check()  # a signal may have come when the last job was all but done
        print(f"--- job {number}: {label}", flush=True)
        try:
            ended = task()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            ended = Scored(error.exit_code)
        except SystemExit as stop:
            ended = Scored(stop.code if isinstance(stop.code, int) else DONE if stop.code is None else FAILED)
        except Exception as error:
            print(describe_defect(error), file=sys.stderr)
            ended = Scored(FAILED)
        self.last, self._codes[f"{number}: {label}"] = ended, ended.code
        run_dir = None if ended.run_dir is None else str(ended.run_dir)
        self._jobs[number] = SweepJob(number, values, ended.status, ended.objective, run_dir)
        if ended.objective is not None:
            self._scale = ended
        self.refresh()
        if ended.code in STOPPED:
            print("the sweep was stopped: jobs after this one are not started", file=sys.stderr)
            raise SweepStopped
        return ended.objective

    def refresh(self) -> None:
        """Take in the jobs of other processes and earlier starts, and keep the record."""
        if self.stored is None:
            return
        if self.stored.jobs is not None:
            self._jobs |= {job.number: job for job in self.stored.jobs()}
        if self._keep is not None and self._jobs:
            self._keep(self.stored.folder, self.record())

    def record(self) -> SweepRecord:
        """Return the sweep so far."""
        stored = self.stored or StoredSweep(Path("sweep"))
        jobs = [self._jobs[number] for number in sorted(self._jobs)]
        name, lower = self._scale.name, self._scale.lower_is_better
        return SweepRecord(stored.folder.name, name, lower, jobs, stored.space, stored.wanted, self._command)

    def conclude(self) -> int:
        """Print what the jobs reached, say which of them failed, and return the exit code of all."""
        if table := self.table():
            print(f"\n{table}", flush=True)
        if self.stored is not None and (page := self.stored.folder / PAGE).is_file():
            print(f"sweep      {page}", flush=True)
        failed = {name: code for name, code in self._codes.items() if code}
        if len(self._codes) > 1 and failed:
            jobs = "\n".join(f"  job {name}  (exit code {code})" for name, code in failed.items())
            print(f"{len(failed)} of {len(self._codes)} jobs did not end well:\n{jobs}", file=sys.stderr)
        codes = set(failed.values())
        return next(
            (code for code in STOPPED if code in codes), FAILED if FAILED in codes else max(codes, default=DONE)
        )

    def table(self) -> str:
        """Return the values that differ between the jobs beside the objectives; nothing where no job has one."""
        record = self.record()
        if len(record.jobs) < 2 or all(job.objective is None for job in record.jobs):
            return ""
        goal = None if record.best is None else record.best.objective
        rows = [["job", *record.keys, record.objective]]
        for job in record.jobs:
            shown = job.status if job.objective is None else f"{job.objective:.6g}"
            if job.objective is not None and job.status == "pruned":
                shown += "  pruned"
            elif job.objective is not None and job.status == "finished" and job.objective == goal:
                shown += "  <- best"
            rows.append([str(job.number), *(short_value(job.values.get(key, "")) for key in record.keys), shown])
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)
