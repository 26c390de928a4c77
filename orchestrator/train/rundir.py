"""The directory of a run: `<runs_dir>/<name>/<time>/`.

config.yaml      the resolved configuration
run.json         facts of the run and its legs (one leg per start)
metrics.jsonl    one row per step, and one per evaluation
samples.jsonl    generated text
handover.json    the checks of the checkpoints that it went on from
checkpoints/     step-*/
tensorboard/     events
report.html      all of it, to look at
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from orchestrator.checkpoint.format import parse_json
from orchestrator.checkpoint.storage import AnyPath, claim, is_remote, locate
from orchestrator.checkpoint.verify import Checkpoint
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.observe.history import HISTORY, METRICS, read_content

CONFIG, RUN, SAMPLES = "config.yaml", "run.json", "samples.jsonl"
IDENTITY, OWNER = ".run-id", "owner.json"


def create(config: RunConfig) -> Path:
    """A new run directory, named by the time; never one that is there already.

    Raises:
        ConfigError: `runs_dir` cannot be written.
    """
    parent = Path(config.runs_dir) / config.name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = parent / (stamp if number == 1 else f"{stamp}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    except OSError as error:
        raise ConfigError(
            f"the run directory cannot be made: {error.strerror}",
            got=parent,
            fix="set runs_dir to a folder that you may write",
        ) from error
    raise AssertionError("unreachable")


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write the configuration; that of an earlier leg is kept beside it."""
    path = run_dir / CONFIG
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    if path.exists() and path.read_text() != text:
        number = len(list(run_dir.glob("config.leg*.yaml")))
        path.rename(run_dir / f"config.leg{number}.yaml")
    _replace(path, text)


def lock(directory: Path, what: str = "run directory") -> FileLock:
    """Hold a directory for this process; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: another process trains in it.
    """
    held = FileLock(directory / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"another process is training in this {what}",
            got=directory,
            fix="wait for it, stop it, or start a new run",
        ) from None
    return held


def checkpoints_dir(run_dir: Path, config: RunConfig) -> AnyPath:
    """Where the run keeps its checkpoints: below a directory of the user's, which runs share, under its own name.

    Raises:
        MissingExtraError, CheckpointError: that is in a store whose libraries are not here, or of no known kind.
    """
    if config.checkpoint.dir == "auto":
        return run_dir / "checkpoints"
    return locate(config.checkpoint.dir) / run_dir.parent.name / run_dir.name


def hold(checkpoints: AnyPath, run_dir: Path) -> contextlib.AbstractContextManager[object]:
    """Hold a directory of checkpoints that does not lie in the run's own, and see that it can be written.

    A store knows no locks. There the first run leaves its name, which stays; another run is refused. Two processes
    of the same run are told apart by the lock of its run directory.

    Raises:
        CheckpointError: another run or process writes there, or nobody can.
    """
    try:
        if is_remote(checkpoints):
            ours = _identity(run_dir)
            owner = claim(checkpoints / OWNER, json.dumps({"run": ours, "run_dir": str(run_dir.resolve())}).encode())
            if parse_json(owner).get("run") == ours:
                return contextlib.nullcontext()
            raise CheckpointError(
                "another run keeps its checkpoints there",
                got=f"{checkpoints}, of {ascii(owner.decode(errors='replace'))[:200]}",
                fix="give another checkpoint.dir or name, or go on with that run's directory",
            )
        checkpoints.mkdir(parents=True, exist_ok=True)
        return lock(checkpoints, "directory of checkpoints")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the directory of the checkpoints cannot be written: {getattr(error, 'strerror', None) or error}",
            got=checkpoints,
            fix="set checkpoint.dir to a place that you may write",
        ) from error


def _identity(run_dir: Path) -> str:
    """A name that no other run has, made at the first call. Whoever calls holds the run directory."""
    path = run_dir / IDENTITY
    if not path.exists():
        _replace(path, uuid.uuid4().hex)
    return path.read_text().strip()


def read_run(run_dir: Path) -> dict[str, Any]:
    """Facts and legs so far; empty for a new run or where the file was cut."""
    try:
        return dict(json.loads((run_dir / RUN).read_text()))
    except (FileNotFoundError, ValueError):
        return {"legs": []}


def read_history(checkpoint: Checkpoint) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Legs and rows of the run up to `checkpoint`, as it carries them; nothing where it has none.

    Raises:
        CheckpointError: what it carries cannot be read.
    """
    if HISTORY not in checkpoint.manifest.files:
        return [], []
    try:
        return read_content(parse_json(checkpoint.read(HISTORY)))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"file '{HISTORY}' of the checkpoint is damaged: {error!r}"[:300], got=checkpoint.directory
        ) from None


def adopt_history(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Begin a new run directory with what the run of `checkpoint` was until then: it is the same run, moved."""
    legs, rows = read_history(checkpoint)
    write_run(run_dir, {"legs": legs})
    (run_dir / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(run_dir: Path, facts: Mapping[str, Any]) -> None:
    _replace(run_dir / RUN, json.dumps(facts, indent=1))


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(text)
    os.replace(aside, path)
