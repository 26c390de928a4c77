"""How each start of a run has ended: the list `attempts` in run.json, there as soon as one of them failed.

An entry has the fields of `Attempt`, as JSON has them; what is not known is null. The product's own launcher writes it
when the attempt has ended; `down_seconds` and `lost_seconds` are filled in when the next one has. Under another engine
the next start writes it, from what the last one's processes have left in `hang/attempt-N/ended.json`. `restarts` beside
the list counts those that were followed by another start. Attempts are numbered through the whole run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import FAILED
from orchestrator.observe.history import METRICS
from orchestrator.observe.sink import reason
from orchestrator.runs import run_directory
from orchestrator.runs.messages import warn

ATTEMPTS, RESTARTS = "attempts", "restarts"
HANGS, ENDED = "hang", "ended.json"
_UNENDED = ("running", "failed", "restarting")
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


def attempt_folder(run_dir: Path, facts: Mapping[str, Any]) -> Path:
    """Return where the processes of this attempt leave their stacks, should they hang.

    Args:
        run_dir: the run's directory.
        facts: what `run_directory.read_run` has read.
    """
    return run_dir / HANGS / f"attempt-{len(facts.get(ATTEMPTS) or ())}"


def write_attempts(run_dir: Path, attempts: Sequence[Attempt], goes_on: bool, status: str | None = None) -> None:
    """Write them into run.json while no process of the run is there. Where that is impossible, it is said.

    Args:
        run_dir: the run's directory.
        attempts: all of the run, at least one.
        goes_on: another one follows.
        status: of the run from now on, where a killed process has left `running`; None: as it is.
    """
    facts = run_directory.read_run(run_dir)
    if status is not None and facts.get("status") in _UNENDED:
        facts["status"] = status
    failed = sum(attempt.code == FAILED for attempt in attempts)
    restarts = failed if goes_on or attempts[-1].code != FAILED else failed - 1
    facts |= {RESTARTS: restarts, ATTEMPTS: [asdict(attempt) for attempt in attempts]}
    try:
        run_directory.write_run(run_dir, facts)
    except OSError as error:
        warn(f"the attempts cannot be written to {run_dir / run_directory.RUN}: {reason(error)}")


def note_last(run_dir: Path, saved: int | None) -> Attempt | None:
    """Note how the last attempt has ended, if nobody has: the one that is about to begin follows on it.

    Args:
        run_dir: the run's directory, locked by the caller.
        saved: the step that the run goes on from; None: it begins again.

    Returns:
        What was noted; None where the last attempt is noted already, or has ended well.
    """
    facts = run_directory.read_run(run_dir)
    attempts, legs = read_attempts(facts), facts.get("legs") or [{}]
    started = legs[-1].get("started")
    if facts.get("status") not in _UNENDED or not isinstance(started, float):
        return None
    if attempts and attempts[-1].ended >= started:
        return None
    about = _left_by_processes(attempt_folder(run_dir, facts))
    start_step = int(legs[-1].get("start_step") or 0)
    attempt = Attempt(
        len(attempts),
        started,
        float(about.get("time") or legs[-1].get("ended") or _last_written(run_dir, started)),
        FAILED,
        about.get("ending") or "lost",
        cause=str(about.get("cause") or "its processes have left no word: they were killed, or their host has gone"),
        rank=about.get("rank"),
        host=about.get("host"),
        pid=about.get("pid"),
        phase=about.get("phase"),
        start_step=start_step,
        step=about.get("step") or legs[-1].get("end_step"),
        outside=about.get("ending") in (None, "killed", "suspended"),
        saved=saved,
        stacks=str(attempt_folder(run_dir, facts)) if about else None,
    )
    write_attempts(run_dir, [*attempts, attempt], goes_on=True)
    return attempt


def _left_by_processes(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / ENDED).read_text()))
    except (OSError, ValueError):
        return {}


def _last_written(run_dir: Path, otherwise: float) -> float:
    try:
        return (run_dir / METRICS).stat().st_mtime
    except OSError:
        return otherwise
