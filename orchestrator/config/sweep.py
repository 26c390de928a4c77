"""Run the jobs of a multirun and record values, status and objective of each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orchestrator import stopping
from orchestrator.errors import DONE, FAILED, STOPPED, UserError, describe_defect


@dataclass(frozen=True)
class Scored:
    """The exit code and the objective of a job.

    Attributes:
        code: its exit code.
        objective: the number that a sweeper is to make small or large; None where there is none.
        name: of the objective.
        lower_is_better: smaller objectives are better.
    """

    code: int
    objective: float | None = None
    name: str = "objective"
    lower_is_better: bool = True


class SweepStopped(BaseException):
    """Ends Hydra's loop over the jobs, which goes on after every `Exception`."""


class Sweep:
    """Collects the results of the jobs of a multirun.

    Attributes:
        jobs: name of a job -> its values, by key, and how it ended.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, tuple[Mapping[str, str], Scored]] = {}

    def run(self, name: str, values: Mapping[str, str], task: Callable[[], Scored]) -> float | None:
        """Run a job, report its failure, and return its objective; None where it failed.

        Args:
            name: number and overrides.
            values: of its overrides, by key.
            task: the job; returns its objective.

        Raises:
            SweepStopped: a signal has stopped the job.
        """
        stopping.check()  # a signal may have come when the last job was all but done
        print(f"--- job {name}", flush=True)
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
        self.jobs[name] = (values, ended)
        if ended.code in STOPPED:
            print("the sweep was stopped: jobs after this one are not started", file=sys.stderr)
            raise SweepStopped
        return ended.objective

    def conclude(self) -> int:
        """Print what the jobs reached, say which of them failed, and return the exit code of all."""
        if table := self.table():
            print(f"\n{table}", flush=True)
        failed = {name: ended.code for name, (_, ended) in self.jobs.items() if ended.code}
        if len(self.jobs) > 1 and failed:
            jobs = "\n".join(f"  job {name}  (exit code {code})" for name, code in failed.items())
            print(f"{len(failed)} of {len(self.jobs)} jobs did not end well:\n{jobs}", file=sys.stderr)
        codes = set(failed.values())
        return next(
            (code for code in STOPPED if code in codes), FAILED if FAILED in codes else max(codes, default=DONE)
        )

    def table(self) -> str:
        """Return the values that differ between the jobs beside the objectives; nothing where no job has one."""
        scored = [ended for _, ended in self.jobs.values() if ended.objective is not None]
        if not scored or len(self.jobs) < 2:
            return ""
        all_values = [values for values, _ in self.jobs.values()]
        known = dict.fromkeys(key for values in all_values for key in values)
        keys = [key for key in known if len({values.get(key) for values in all_values}) > 1]
        reached = [ended.objective for ended in scored if ended.objective is not None]
        goal = min(reached) if scored[0].lower_is_better else max(reached)
        rows = [["job", *keys, scored[0].name]]
        for job, (values, ended) in self.jobs.items():
            shown = "failed" if ended.objective is None else f"{ended.objective:.6g}"
            best = "  <- best" if ended.objective == goal else ""
            rows.append([job.partition(":")[0], *(values.get(key, "") for key in keys), shown + best])
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)
