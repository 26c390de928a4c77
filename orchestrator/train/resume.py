"""Where a resumed run goes on from, and with which configuration. No torch: the launcher asks first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.catalogue import committed, newest_valid
from orchestrator.checkpoint.format import DIRECTORY, MANIFEST
from orchestrator.checkpoint.verify import Checkpoint
from orchestrator.config.compose import Composed, read_plain
from orchestrator.config.convert import from_dict
from orchestrator.config.schema import RunConfig
from orchestrator.errors import CheckpointError, ConfigError, UserError
from orchestrator.train import rundir


@dataclass(frozen=True)
class ResumePoint:
    """Attributes:
    checkpoint: committed and checked.
    run_dir: the run to go on in; None where the checkpoint is not that run's newest: a new run branches off.
    saved: the configuration of the checkpoint's run, as plain data.
    """

    checkpoint: Path
    run_dir: Path | None
    saved: dict[str, Any]


def find(resume: str, runs_dir: str, verify: bool, report: Callable[[str], object]) -> ResumePoint:
    """Find what `resume` means: `latest`, a run directory or a checkpoint directory.

    Raises:
        CheckpointError: there is no such thing, or nothing valid in it.
    """
    if resume == "latest":
        return _in_runs(latest_runs(Path(runs_dir)), runs_dir, verify, report)
    path = Path(resume)
    if DIRECTORY.fullmatch(path.resolve().name) or (path / MANIFEST).exists():
        checkpoint = Checkpoint(path)
        if verify:
            checkpoint.verify()
        saved = checkpoint.config()
        newest = committed(path.resolve().parent)
        goes_on = bool(newest) and newest[0].resolve() == path.resolve()
        return ResumePoint(path, run_of(path.resolve(), saved) if goes_on else None, saved)
    if (path / rundir.CONFIG).exists():
        return _in_runs([path], resume, verify, report)
    raise CheckpointError(
        "there is nothing to resume from here",
        got=resume,
        allowed="latest, a run directory, or a checkpoint directory (step-...)",
    )


def run_of(checkpoint: Path, saved: Mapping[str, Any]) -> Path | None:
    """The run directory that a checkpoint belongs to: around it, or, with a `checkpoint.dir`, of the same name."""
    around = checkpoint.parent.parent
    named = Path(str(saved.get("runs_dir", ""))) / checkpoint.parent.parent.name / checkpoint.parent.name
    return next((path for path in (around, named) if (path / rundir.CONFIG).exists()), None)


def latest_runs(runs_dir: Path) -> list[Path]:
    """Run directories, the one that was worked on last first."""
    runs = [path.parent for path in runs_dir.glob(f"*/*/{rundir.CONFIG}")]

    def worked_on(run: Path) -> float:
        return max(path.stat().st_mtime for path in (run / rundir.CONFIG, run / "metrics.jsonl") if path.exists())

    return sorted(runs, key=worked_on, reverse=True)


def _in_runs(runs: list[Path], where: str, verify: bool, report: Callable[[str], object]) -> ResumePoint:
    for run_dir in runs:
        try:
            config = from_dict(RunConfig, read_plain(run_dir / rundir.CONFIG))
        except UserError as error:
            report(f"skipping {run_dir}: {error}")
            continue
        found = newest_valid(rundir.checkpoints_dir(run_dir, config), verify, report)
        if found is not None:
            return ResumePoint(found, run_dir, Checkpoint(found).config())
        report(f"skipping {run_dir}: it has no valid checkpoint")
    raise CheckpointError("no valid checkpoint was found", got=where, fix="start a new run: leave out resume")


def merge(saved: Mapping[str, Any], composed: Composed) -> RunConfig:
    """The saved run's configuration with what this command line asks for on top.

    A group given on the command line (`hardware=cuda`) replaces that group, a key replaces that key;
    everything else stays as it was when the checkpoint was written.

    Raises:
        ConfigError: an experiment is asked for that the saved run is not.
    """
    result = copy.deepcopy(dict(saved))
    apply(composed, result, composed.overrides)
    result["resume"] = composed.config.resume
    return from_dict(RunConfig, result)


def apply(composed: Composed, result: dict[str, Any], keys: Iterable[str]) -> None:
    """Set what the command line says of `keys` in the plain data `result`.

    Raises:
        ConfigError: an experiment is asked for that is not that of `result`.
    """
    for key in keys:
        if key.split(".")[0] == "hydra":
            continue
        if key == "experiment":
            if composed.data["experiment"] != result.get("experiment"):
                raise ConfigError(
                    "a resumed run keeps its experiment",
                    got=f"experiment={composed.data['experiment']}",
                    allowed=f"experiment={result.get('experiment')}",
                    fix="leave it out, and give single keys to change",
                )
            continue
        _copy(composed.data, result, key.replace("/", ".") if composed.overrides[key] else key)


def _copy(source: Mapping[str, Any], target: dict[str, Any], key: str) -> None:
    *parents, last = key.lstrip("+").split(".")
    for parent in parents:
        source, target = source[parent], target.setdefault(parent, {})
    target[last] = copy.deepcopy(source[last])
