"""The checkpoints of a run directory: which there are, which is the newest that can be trusted, which may go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from orchestrator.checkpoint.format import DIRECTORY, MANIFEST
from orchestrator.checkpoint.storage import AnyPath, remove_tree
from orchestrator.checkpoint.verify import Checkpoint
from orchestrator.errors import CheckpointError


def committed(parent: AnyPath) -> list[AnyPath]:
    """Directories with a manifest, newest first."""
    found = []
    for path in parent.iterdir() if parent.is_dir() else ():
        match = DIRECTORY.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            found.append((int(match[1]), int(match[2] or 1), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def newest_valid(parent: AnyPath, verify: bool, report: Callable[[str], object]) -> AnyPath | None:
    """The newest checkpoint that passes its checks; `report` is told of each one that does not."""
    for path in committed(parent):
        try:
            checkpoint = Checkpoint(path)
            if verify:
                checkpoint.verify()
        except CheckpointError as error:
            report(f"skipping {path}: {error}")
            continue
        return path
    return None


def removable(parent: AnyPath, keep_last: int, keep_every_steps: int | None) -> list[AnyPath]:
    """All but the `keep_last` newest checkpoints, at least one, and those at multiples of `keep_every_steps`."""
    found = []
    for path in committed(parent)[max(1, keep_last) :]:
        match = DIRECTORY.fullmatch(path.name)
        assert match
        if not keep_every_steps or int(match[1]) % keep_every_steps:
            found.append(path)
    return found


def prune(parent: AnyPath, keep_last: int, keep_every_steps: int | None) -> list[AnyPath]:
    """Remove what is `removable`.

    Returns:
        The directories that were removed.
    """
    removed = []
    for path in removable(parent, keep_last, keep_every_steps):
        # Without its manifest it is no checkpoint: an interrupted removal leaves nothing half valid.
        try:
            (path / MANIFEST).unlink()
        except OSError:
            continue  # what cannot be removed stays whole, and training goes on
        with contextlib.suppress(OSError):
            remove_tree(path)
        removed.append(path)
    return removed


def remove_uncommitted(parent: AnyPath) -> list[AnyPath]:
    """Remove what saves left that never committed. Only whoever holds the run directory may call it."""
    removed = []
    for path in parent.iterdir() if parent.is_dir() else ():
        if DIRECTORY.fullmatch(path.name) and not (path / MANIFEST).exists():
            with contextlib.suppress(OSError):
                remove_tree(path)
            removed.append(path)
    return removed
