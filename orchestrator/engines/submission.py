"""The record of what was submitted: `<run>/launch/job.json`, by which its status, its lines and its end are found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.atomic_files import write_atomically
from orchestrator.engines.engine_job import LAUNCH
from orchestrator.errors import LaunchError

RECORD = "job.json"
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "engine": str,
    "id": str,
    "run_id": str,
    "submitted": (int, float),
    "command": list,
    "submit": list,
    "options": dict,
}


@dataclass(frozen=True)
class Submission:
    """A job that was submitted.

    Attributes:
        engine: its name in the table of engines.
        id: of the job, as the engine has it.
        run_id: of the run.
        submitted: seconds since the epoch.
        command: the words behind the interpreter.
        submit: the words of the engine's client that have submitted it.
        options: the `launch` group, of which the engine may need a namespace or hosts to find the job again.
        folder: where the record lies, absolute.
    """

    engine: str
    id: str
    run_id: str
    submitted: float
    command: tuple[str, ...]
    submit: tuple[str, ...]
    options: Mapping[str, Any]
    folder: Path

    def write(self) -> None:
        """Write the record into its folder."""
        data = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_atomically(self.folder / RECORD, json.dumps(data, indent=1) + "\n")


def read_submission(folder: Path) -> Submission:
    """Read the record of a folder.

    Args:
        folder: of a submission.

    Raises:
        LaunchError: there is none, or it is damaged.
    """
    path = folder / RECORD
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or not all(isinstance(data.get(key), kind) for key, kind in _KINDS.items()):
            raise ValueError("keys are missing or of another kind")
        if not all(isinstance(word, str) for word in (*data["command"], *data["submit"])):
            raise ValueError("a word is no text")
    except (OSError, ValueError, RecursionError) as error:
        what = f"the record of the job cannot be read: {getattr(error, 'strerror', None) or error}"
        raise LaunchError(what[:300], got=path, fix="ask the engine's own client") from None
    data |= {key: tuple(data[key]) for key in ("command", "submit")}
    return Submission(**{key: data[key] for key in _KINDS}, folder=folder.absolute())


def submissions(runs_dir: Path) -> list[Submission]:
    """Return what was submitted from here, the newest first; records that cannot be read are left out.

    Args:
        runs_dir: of all runs.
    """
    return _read(runs_dir.glob(f"*/*/{LAUNCH}*/{RECORD}"))


def submissions_of(run_dir: Path) -> list[Submission]:
    """Return what was submitted for a run, the newest first.

    Args:
        run_dir: the run's directory.
    """
    return _read(run_dir.glob(f"{LAUNCH}*/{RECORD}"))


def find_submission(where: str, runs_dir: str) -> Submission:
    """Return the newest submission of the run that a user means.

    Args:
        where: `latest`; a run directory, or a folder of several; or the same below `runs_dir`; or a `run_id`.
        runs_dir: where `latest` and names look.

    Raises:
        LaunchError: nothing was submitted for such a run.
    """
    below = Path(runs_dir)
    if where == "latest":
        found = submissions(below)
    else:
        found = []
        for place in (Path(where).expanduser(), below / where):
            if place.is_dir():
                found = submissions_of(place) or _read(place.glob(f"*/{LAUNCH}*/{RECORD}"))
            if found:
                break
        found = found or [one for one in submissions(below) if where in (one.run_id, one.id)]
    if not found:
        raise LaunchError(
            "no job was submitted for such a run",
            got=where,
            allowed="latest, a run directory, the name of a run, its run_id, or the engine's id of the job",
            fix=f"see what there is: python -m orchestrator launch list runs_dir={runs_dir}",
        )
    return found[0]


def _read(records: Any) -> list[Submission]:
    found = []
    for path in records:
        try:
            found.append(read_submission(path.parent))
        except LaunchError:
            continue  # said where that one is asked for
    return sorted(found, key=lambda one: one.submitted, reverse=True)
