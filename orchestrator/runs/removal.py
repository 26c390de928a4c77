"""Remove whole runs that nobody needs any more. No torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import RunDirectoryError
from orchestrator.runs import run_directory


@dataclass(frozen=True)
class Removed:
    """A run that was removed.

    Attributes:
        run_dir: its directory.
        size: bytes of its files on this file system.
        elsewhere: where it keeps checkpoints that stay; None where they lay in its directory.
    """

    run_dir: Path
    size: int
    elsewhere: str | None


def measure(run_dir: Path, elsewhere: str | None) -> Removed:
    """Return what the removal of a run would free.

    Args:
        run_dir: its directory.
        elsewhere: its `checkpoint.dir`; None or `auto` where its checkpoints lie in its directory.
    """
    size = 0
    for path in run_dir.rglob("*"):
        try:
            size += path.lstat().st_size if not path.is_dir() or path.is_symlink() else 0
        except OSError:
            continue
    return Removed(run_dir, size, None if elsewhere in (None, "auto") else elsewhere)


def remove_run(found: Removed) -> None:
    """Remove a run's directory, and the folder of its name if that is then empty.

    Args:
        found: as `measure` gave it.

    Raises:
        CheckpointError: a process is training in it.
        RunDirectoryError: it cannot be removed.
    """
    run_dir = found.run_dir
    if run_dir.is_symlink():
        raise RunDirectoryError("the run directory is a link: what it leads to may be another's", run_dir)
    held = run_directory.lock(run_dir)
    try:
        # config.yaml goes last: what is left after a crash is still known as a run, and can be removed again.
        for path in sorted(run_dir.iterdir(), key=lambda path: path.name in (run_directory.CONFIG, ".lock")):
            if path.name == ".lock":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        shutil.rmtree(run_dir)
        if not any(run_dir.parent.iterdir()):
            run_dir.parent.rmdir()
    except OSError as error:
        raise RunDirectoryError(f"the run directory cannot be removed: {error.strerror or error}", run_dir) from error
    finally:
        held.release()
