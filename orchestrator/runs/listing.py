"""List the runs in a folder, and choose the latest or the one that the command line means. No torch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.config.compose import Composed, read_config
from orchestrator.errors import CheckpointError, UserError
from orchestrator.observe.history import METRICS
from orchestrator.observe.time_spans import ALIVE, BOOK
from orchestrator.runs import identity, lease, run_directory

# What a start leaves that ended before its first step.
_OF_A_START = {
    run_directory.CONFIG,
    f"{run_directory.CONFIG}.partial",
    run_directory.RESOLVED,
    f"{run_directory.RESOLVED}.partial",
    run_directory.RUN,
    f"{run_directory.RUN}.partial",
    identity.IDENTITY,
    METRICS,
    BOOK,
    ALIVE,
    run_directory.SAMPLES,
    ".lock",
    lease.TAKEN,
    "report.html",
}


@dataclass(frozen=True)
class Wanted:
    """What a command line says about the run that it means; None where it says nothing.

    Attributes:
        name: of the run, the folder that holds its directory.
        experiment: the option of the experiment group.
        model: the name of the model, where a model group was chosen.
        run_id: the last part of the run's directory.
    """

    name: str | None = None
    experiment: str | None = None
    model: str | None = None
    run_id: str | None = None

    def missed_by(self, saved: Mapping[str, Any]) -> str | None:
        """Return what of the configuration `saved`, as plain data, is not what is wanted; None where all is."""
        model = saved.get("model")
        has = {
            "name": saved.get("name"),
            "experiment": saved.get("experiment"),
            "model": model.get("name") if isinstance(model, Mapping) else None,
            "run_id": saved.get("run_id"),
        }
        for key, value in has.items():
            wanted = getattr(self, key)
            if wanted is not None and value != wanted:
                return f"{key}={value}"
        return None

    def __str__(self) -> str:
        keys = ("name", "experiment", "model", "run_id")
        return " ".join(f"{key}={value}" for key in keys if (value := getattr(self, key)) is not None)


def wanted_by(composed: Composed) -> Wanted:
    """Return what a command line with `resume=latest` says of the run that it means.

    Args:
        composed: the configuration of this command line.
    """
    given, config = composed.overrides, composed.config
    return Wanted(
        name=config.name if "name" in given else None,
        experiment=config.experiment if "experiment" in given else None,
        model=config.model.name if given.get("model") else None,
        run_id=config.run_id if "run_id" in given else None,
    )


def latest_runs(runs_dir: Path) -> list[Path]:
    """Return the run directories `<runs_dir>/<name>/<time>`, the one that was worked on last first.

    Args:
        runs_dir: of all runs.
    """
    return _by_time(path.parent for path in runs_dir.glob(f"*/*/{run_directory.CONFIG}"))


def runs_below(folder: Path) -> list[Path]:
    """Return the run directories of a folder of one name (`<runs_dir>/<name>`) or of all, the newest first.

    Args:
        folder: of runs.
    """
    return _by_time(path.parent for path in folder.glob(f"*/{run_directory.CONFIG}")) or latest_runs(folder)


def newest_run(runs_dir: str) -> Path:
    """Return the run directory with checkpoints that was worked on last.

    Args:
        runs_dir: of all runs.

    Raises:
        CheckpointError: there is none.
    """
    for run in latest_runs(Path(runs_dir)):
        try:
            if committed(run_directory.checkpoints_dir(run, read_config(run / run_directory.CONFIG))):
                return run
        except UserError:
            continue  # its configuration cannot be read, or its store: so nothing of it can be worked on
    raise CheckpointError("there are no runs with checkpoints here", got=runs_dir, fix="give the run's directory")


def find_run(where: str, runs_dir: str) -> Path:
    """Return the run directory that a user means.

    Args:
        where: `latest`; a run directory, or the folder of its name, whose newest run is meant; or the same below
            `runs_dir`, such as `tiny` or `tiny/20260131-120000`.
        runs_dir: where `latest` and names look.

    Raises:
        CheckpointError: there is no such run.
    """
    if where == "latest":
        found = latest_runs(Path(runs_dir))
    else:
        places = [Path(where).expanduser(), Path(runs_dir) / where]
        found = [place for place in places if (place / run_directory.CONFIG).is_file()]
        found = found or [run for place in places if place.is_dir() for run in runs_below(place)]
    if not found:
        raise CheckpointError(
            "there is no such run",
            got=where,
            allowed="latest, a run directory, or the name of a run",
            fix=f"see what there is below {runs_dir}, or give runs_dir",
        )
    return found[0]


def is_empty(run_dir: Path) -> bool:
    """Return whether nothing was trained in a run directory: its start failed, and it holds nothing of worth.

    Args:
        run_dir: the run's directory.
    """
    try:
        names = {path.name for path in run_dir.iterdir()}
        if (run_dir / METRICS).exists() and (run_dir / METRICS).stat().st_size:
            return False
        folders = [path for name in names - _OF_A_START for path in [run_dir / name]]
        return all(
            path.name in ("checkpoints", "tensorboard") and path.is_dir() and not committed(path) for path in folders
        )
    except (OSError, CheckpointError):
        return False


def discard_empty(run_dir: Path) -> None:
    """Remove a run directory in which nothing was trained, and the folder of its name if that is then empty.

    Args:
        run_dir: the run's directory.
    """
    if is_empty(run_dir):
        shutil.rmtree(run_dir, ignore_errors=True)
        with contextlib.suppress(OSError):
            run_dir.parent.rmdir()


def with_uuid(runs_dir: Path, value: str) -> Path | None:
    """Return the run directory of the run `value`; None where it is not in this folder.

    Args:
        runs_dir: of all runs.
        value: the uuid.
    """
    for path in runs_dir.glob(f"*/*/{identity.IDENTITY}"):
        try:
            if path.read_text().strip() == value:
                return path.parent
        except OSError:
            continue
    return None


def _by_time(runs: Iterable[Path]) -> list[Path]:
    def worked_on(run: Path) -> float:
        return max(path.stat().st_mtime for path in (run / run_directory.CONFIG, run / METRICS) if path.exists())

    return sorted(runs, key=worked_on, reverse=True)
