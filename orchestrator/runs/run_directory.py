"""The directory of a run: `<runs_dir>/<name>/<time>/`, or `<runs_dir>/<name>/<run_id>/`.

config.yaml      the configuration, as the user has it
resolved.json    what the last start has decided of it: layout, devices, precision, and so on
run.json         facts of the run and its legs (one leg per start)
time_book.jsonl  what state it was in from when on (`runs.time_book`), and time_book.alive, the last sign of life
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
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from orchestrator.atomic_files import write_atomically
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import parse_json
from orchestrator.checkpoint.storage import AnyPath, claim, is_remote, locate
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.errors import CheckpointError, ConfigError, RunDirectoryError
from orchestrator.observe.history import HISTORY, read_content
from orchestrator.observe.sink import reason
from orchestrator.observe.time_spans import TimeEntry, entries_from, read_book
from orchestrator.runs import identity, lease
from orchestrator.runs.messages import warn
from orchestrator.runs.time_book import booked, note_end

CONFIG, RESOLVED, RUN, SAMPLES = "config.yaml", "resolved.json", "run.json", "samples.jsonl"
OWNER = "owner.json"
PRUNED = "pruned"
"""The status of a run that its sweep has ended early."""
_SPARE_BYTES = 256
_PATIENCE_SECONDS = 60.0  # of a restarted job, whose last process may not have ended yet


@dataclass(frozen=True)
class RunPaths:
    """The paths of a run, as all its processes have agreed.

    Attributes:
        run_dir: the run's directory.
        checkpoints: the directory of its checkpoints.
        resume_from: the checkpoint to restore; None for a new run.
    """

    run_dir: Path
    checkpoints: AnyPath
    resume_from: AnyPath | None


def named(config: RunConfig, name: str) -> Path:
    """Return the directory of the run that is known by `name` and not by the time of its start.

    Args:
        config: of the run.
        name: of the run.
    """
    return Path(config.runs_dir) / config.name / name


def create(config: RunConfig, name: str | None = None) -> Path:
    """Make the directory of a new run, named by the time: never one that is there already.

    Args:
        config: the run.
        name: instead of the time. A directory of that name is taken over: the caller has seen that it may be.

    Raises:
        ConfigError: `runs_dir` cannot be written.
    """
    parent = Path(config.runs_dir) / config.name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if name is not None:
            named(config, name).mkdir(exist_ok=True)
            return named(config, name)
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
    """Write the configuration; that of an earlier leg is kept beside it.

    Args:
        run_dir: the run's directory.
        config: of the run.
    """
    path = run_dir / CONFIG
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    if path.exists() and path.read_text() != text:
        number = len(list(run_dir.glob("config.leg*.yaml")))
        path.rename(run_dir / f"config.leg{number}.yaml")
    write_atomically(path, text)


def lock(directory: Path, what: str = "run directory", patient: bool = False) -> FileLock:
    """Hold a directory for this process; the lock goes with the process, however it ends.

    Args:
        directory: an existing directory.
        what: the directory is, in a message.
        patient: wait a minute for another process to let go of it.

    Raises:
        CheckpointError: another process trains in it.
        RunDirectoryError: no lock can be made there: it is read-only, or its disk is full.
    """
    held = FileLock(directory / ".lock")
    try:
        held.acquire(timeout=_PATIENCE_SECONDS if patient else 0)
    except Timeout:
        raise CheckpointError(
            f"another process is training in this {what}",
            got=directory,
            fix="wait for it, stop it, or start a new run",
        ) from None
    except (OSError, NotImplementedError) as error:
        raise RunDirectoryError(f"the {what} cannot be held: {reason(error)}", directory) from error
    return held


def checkpoints_dir(run_dir: Path, config: RunConfig) -> AnyPath:
    """Return where the run keeps its checkpoints: below a directory of the user's, which runs share, under its name.

    Args:
        run_dir: the run's directory.
        config: of the run.

    Raises:
        MissingExtraError: it is in a store whose libraries are not installed.
        CheckpointError: the kind of store is unknown.
    """
    if config.checkpoint.dir == "auto":
        return beside(run_dir)
    return locate(config.checkpoint.dir) / run_dir.parent.name / run_dir.name


def beside(run_dir: Path) -> Path:
    """Return where a run keeps its checkpoints by default, and where its last one goes that no store takes.

    Args:
        run_dir: the run's directory.
    """
    return run_dir / "checkpoints"


def hold(
    checkpoints: AnyPath,
    run_dir: Path,
    name: str | None = None,
    patient: bool = False,
    peers_wait_seconds: float = math.inf,
) -> contextlib.AbstractContextManager[object]:
    """Hold a directory of checkpoints that does not lie in the run's own, and see that it can be written.

    A store knows no locks. There the first run leaves its uuid, which stays; another run is refused. Processes of the
    same run follow each other there by a lease.

    Args:
        checkpoints: the directory of checkpoints.
        run_dir: the run's own directory.
        name: by which the run is found at a restart; None for a run that has the time alone. A job that starts again
            on a host without its run directory is known by it, and takes over the uuid that it left.
        patient: wait a minute for another process to let go of it.
        peers_wait_seconds: other processes of the job wait for this one so long.

    Raises:
        CheckpointError: another run or process writes there, or it cannot be written.
    """
    try:
        if is_remote(checkpoints):
            _claim(checkpoints, run_dir, name)
            return lease.take_lease(checkpoints, run_dir, patient, peers_wait_seconds)
        checkpoints.mkdir(parents=True, exist_ok=True)
        return lock(checkpoints, "directory of checkpoints", patient)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the directory of the checkpoints cannot be written: {getattr(error, 'strerror', None) or error}",
            got=checkpoints,
            fix="set checkpoint.dir to a place that you may write",
        ) from error


def _claim(checkpoints: AnyPath, run_dir: Path, name: str | None) -> None:
    ours = identity.uuid_of(run_dir)
    entry = {"run": ours, "run_id": name, "run_dir": str(run_dir.resolve())}
    owner = claim(checkpoints / OWNER, json.dumps(entry).encode())
    there = parse_json(owner)
    if there.get("run") == ours:
        return
    if name is not None and there.get("run_id") == name and identity.is_uuid(there.get("run")):
        identity.adopt_uuid(run_dir, there["run"])
        return
    raise CheckpointError(
        "another run keeps its checkpoints there",
        got=f"{checkpoints}, of {ascii(owner.decode(errors='replace'))[:200]}",
        fix="give another checkpoint.dir or name, or go on with that run's directory",
    )


@contextlib.contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Wrap what a start writes into the run directory before there is anything to lose.

    Args:
        run_dir: the run's directory.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(f"the run directory cannot be written: {reason(error)}", run_dir) from error


def read_run(run_dir: Path) -> dict[str, Any]:
    """Read facts and legs so far; empty for a new run or where the file was cut.

    Args:
        run_dir: the run's directory.
    """
    try:
        return dict(json.loads((run_dir / RUN).read_text()))
    except (FileNotFoundError, ValueError):
        return {"legs": []}


def read_history(checkpoint: Checkpoint) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Legs and rows of the run up to `checkpoint`, as it carries them; nothing where it has none.

    Raises:
        CheckpointError: what it carries cannot be read.
    """
    return read_content(_history(checkpoint))


def read_times(checkpoint: Checkpoint | None) -> list[TimeEntry]:
    """Return the run's time book up to `checkpoint`, as it carries it; empty where it has none that can be read.

    Args:
        checkpoint: the checkpoint; None for a new run.
    """
    data = None
    with contextlib.suppress(CheckpointError):
        data = None if checkpoint is None else _history(checkpoint)
    return entries_from(data.get("times") if isinstance(data, Mapping) else None)


def _history(checkpoint: Checkpoint) -> Any:
    if HISTORY not in checkpoint.manifest.files:
        return None
    try:
        return parse_json(checkpoint.read(HISTORY))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"file '{HISTORY}' of the checkpoint is damaged: {error!r}"[:300], got=checkpoint.directory
        ) from None


def write_run(run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Write run.json anew. The file has some room to spare, so that a status fits into it when the disk is full.

    Args:
        run_dir: the run's directory.
        facts: by name.

    Raises:
        OSError: it is as it was.
    """
    path = run_dir / RUN
    text = json.dumps(facts, indent=1)
    try:
        write_atomically(path, text + " " * _SPARE_BYTES + "\n")
    except OSError:
        if not _overwritten(path, text.encode()):
            raise


def _overwritten(path: Path, data: bytes) -> bool:
    """Whether `data` could be written over a file that is no smaller. It needs no room, but no crash in its middle."""
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        if len(data) < size:
            with open(path, "r+b", buffering=0) as file:
                return file.write(data.ljust(size - 1) + b"\n") == size
    return False


def mark_ended(run_dir: Path, status: str, step: int | None) -> None:
    """Set the status of a run whose process was killed before it could; one that has ended by itself keeps its own.

    Args:
        run_dir: the run's directory.
        status: such as `failed`.
        step: the last one that is known to be completed.
    """
    facts = read_run(run_dir)
    note_end(run_dir, "waiting" if status == "failed" else "stopped")
    if facts.get("status") != "running":
        return
    if facts["legs"]:
        facts["legs"][-1].update(ended=time.time(), end_step=step)
    try:
        write_run(run_dir, booked({**facts, "status": status}, read_book(run_dir)))
    except OSError as error:
        warn(f"the status '{status}' cannot be written to {run_dir / RUN}: {reason(error)}")
