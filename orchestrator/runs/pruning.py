"""Remove old checkpoints of a run that is not running. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.run_checkpoints import committed, diverged, prune, removable, set_aside
from orchestrator.checkpoint.storage import AnyPath
from orchestrator.errors import CheckpointError
from orchestrator.runs import resume, run_directory
from orchestrator.runs.stored_model import checkpoints_of


def prune_checkpoints(
    path: AnyPath,
    keep_last: int,
    keep_every_steps: int | None,
    dry_run: bool,
    verify: bool = True,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[list[AnyPath], list[AnyPath]]:
    """Remove all but the newest checkpoints and the ones at multiples of `keep_every_steps`.

    Args:
        path: a run directory, or a directory of checkpoints.
        keep_last: number of the newest checkpoints to keep.
        keep_every_steps: keep checkpoints at multiples of this step, too; None: no others.
        dry_run: remove nothing.
        verify: believe that one of those that stay is whole only by its hashes.
        progress: told the number of bytes of each stretch that was hashed.

    Returns:
        The directories that were removed, or would be, and those that are kept.

    Raises:
        CheckpointError: there are none, a run is using them, or none that is whole and finite would be left.
    """
    parent = checkpoints_of(path)
    found = committed(parent)
    if not found:
        raise CheckpointError(
            "there are no checkpoints here", got=path, allowed="a run directory, or a directory of step-* checkpoints"
        )
    # Who only looks needs no lock, and the directory may be read-only.
    lock = None if dry_run else _lock(path, parent, found[0])
    try:
        going = removable(parent, keep_last, keep_every_steps)
        kept = [one for one in found if one not in going]
        if going and not any(_is_whole(one, verify, progress) for one in kept):
            raise CheckpointError(
                "all the checkpoints that would be kept are damaged or not finite",
                got=", ".join(one.name for one in kept),
                fix="keep more: keep_last=...",
            )
        return (going if dry_run else prune(parent, keep_last, keep_every_steps)), kept
    finally:
        if lock is not None:
            lock.release()


def _lock(path: AnyPath, parent: AnyPath, checkpoint: AnyPath) -> FileLock | None:
    """Hold the run that the checkpoints belong to, where it is on this machine."""
    if isinstance(path, Path) and (path / run_directory.CONFIG).is_file():
        return run_directory.lock(path)
    if not isinstance(parent, Path):
        return None
    try:
        saved = Checkpoint(checkpoint).config()
    except CheckpointError:
        saved = {}
    run_dir = resume.run_of(checkpoint.resolve(), saved)
    return None if run_dir is None else run_directory.lock(run_dir)


def _is_whole(path: AnyPath, verify: bool, progress: Callable[[int], object]) -> bool:
    try:
        checkpoint = Checkpoint(path)
        if verify:
            checkpoint.verify(progress)
        return not diverged(path) and not set_aside(path)
    except CheckpointError:
        return False
