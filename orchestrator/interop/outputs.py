"""Directories that tools write: whole or not at all, and nothing that is there is written over."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import CheckpointError


@contextlib.contextmanager
def written_aside(output: str | Path) -> Iterator[Path]:
    """Yield a new directory that becomes `output` when the block ends well, and is removed when it does not.

    Raises:
        CheckpointError: `output` holds something, or cannot be written.
    """
    if "://" in str(output):
        raise CheckpointError(
            "the output is a folder of this machine", got=output, fix="write it to a disk and copy it from there"
        )
    target = Path(output).expanduser()
    _refuse_what_is_there(target)
    aside = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        _refuse_what_is_there(target)
        if target.exists():
            target.rmdir()
        aside.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"the output cannot be written: {error.strerror or error}", got=target, fix="free space, or another output="
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refuse_what_is_there(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            "the output exists already; nothing is written over",
            got=target,
            allowed="a path that does not exist yet, or an empty directory",
            fix="choose another output=, or move this one away",
        )
