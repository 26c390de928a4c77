"""How each start of a run has ended: the list `attempts` in run.json, there as soon as one of them failed.

An entry has the fields of `Attempt`, as JSON has them; what is not known is null. It is written when the attempt has
ended; `down_seconds` and `lost_seconds` are filled in when the next one has. `restarts` beside the list counts those
that were followed by another start. Attempts are numbered through the whole run, however often it was started by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from orchestrator.observe.sink import reason
from orchestrator.runs import run_directory
from orchestrator.runs.messages import warn

ATTEMPTS, RESTARTS = "attempts", "restarts"
Ending = Literal["finished", "interrupted", "diverged", "refused", "failed", "killed", "suspended", "hung", "lost"]


@dataclass(frozen=True)
class Attempt:
    """One start of the processes of a run, and its end.

    Attributes:
        attempt: its number in the run, from 0.
        started: when its processes were started, in seconds since 1970.
        ended: when the last of them had ended.
        code: the exit code of the whole.
        ending: `finished`, `interrupted` (on a signal, saved), `diverged`, `refused` (a mistake), or what a process has
            met: `failed` (an error), `killed` (a signal), `suspended` (SIGSTOP), `hung`; `lost`: nobody knows.
        cause: in a sentence.
        error: what failures of one kind have in common: the type of the error and where it was raised, or the signal.
        outside: the cause lies outside of the run, so that the next attempt need not meet it.
        rank: of the process that it began with.
        host: of that process.
        pid: of that process.
        phase: what that process was at.
        start_step: the step that the attempt began after.
        step: the last one that it has completed; None where it completed none.
        saved: the newest checkpoint's step when it had ended.
        noticed_seconds: from the last sign that all was well to the moment when the launcher knew.
        backoff_seconds: waited before the next attempt.
        down_seconds: from that moment until the next attempt had completed a step, or failed.
        lost_seconds: from that moment until the step was reached again that had been completed, or the next failure.
        stacks: folder below the run directory with the stacks of the processes.
    """

    attempt: int
    started: float
    ended: float
    code: int
    ending: Ending
    cause: str = ""
    error: str | None = None
    outside: bool = False
    rank: int | None = None
    host: str | None = None
    pid: int | None = None
    phase: str | None = None
    start_step: int = 0
    step: int | None = None
    saved: int | None = None
    noticed_seconds: float | None = None
    backoff_seconds: float | None = None
    down_seconds: float | None = None
    lost_seconds: float | None = None
    stacks: str | None = None

    @property
    def reached(self) -> int:
        """The last step that the run had completed when this attempt ended."""
        return self.start_step if self.step is None else self.step

    @property
    def began(self) -> bool:
        """Whether a step was completed."""
        return self.step is not None and self.step > self.start_step


def read_attempts(facts: Mapping[str, Any]) -> list[Attempt]:
    """Return the attempts that run.json lists; what is no attempt is passed over.

    Args:
        facts: what `run_directory.read_run` has read.
    """
    names, found = {field.name for field in fields(Attempt)}, []
    for entry in facts.get(ATTEMPTS) or ():
        if isinstance(entry, dict) and {"attempt", "started", "ended", "code", "ending"} <= entry.keys() <= names:
            found.append(Attempt(**entry))
    return found


def write_attempts(run_dir: Path, attempts: Sequence[Attempt], status: str | None = None) -> None:
    """Write them into run.json while no process of the run is there. Where that is impossible, it is said.

    Args:
        run_dir: the run's directory.
        attempts: all of the run.
        status: of the run from now on, where a killed process has left `running`; None: as it is.
    """
    facts = run_directory.read_run(run_dir)
    if status is not None and facts.get("status") in ("running", "failed", "restarting"):
        facts["status"] = status
    facts |= {RESTARTS: max(0, len(attempts) - 1), ATTEMPTS: [asdict(attempt) for attempt in attempts]}
    try:
        run_directory.write_run(run_dir, facts)
    except OSError as error:
        warn(f"the attempts cannot be written to {run_dir / run_directory.RUN}: {reason(error)}")
