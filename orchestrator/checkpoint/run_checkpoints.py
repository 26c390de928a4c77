"""List, select and delete the checkpoints of a run."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import DIRECTORY, MANIFEST, parse_json
from orchestrator.checkpoint.reference import MEASURED
from orchestrator.checkpoint.signing import Trust
from orchestrator.checkpoint.storage import (
    AnyPath,
    children,
    put_last,
    read_bounded,
    remove_file,
    remove_tree,
    size_of,
    there,
)
from orchestrator.errors import CheckpointError, shown

_MAX_MEASURED_BYTES = 1 << 16
MARK = "set-aside.json"
"""Beside the manifest of a checkpoint that its run does not go on from, and why. Its files stay as they were saved."""


def committed(parent: AnyPath) -> list[AnyPath]:
    """List the directories with a manifest, newest first.

    Args:
        parent: the directory of checkpoints.

    Raises:
        CheckpointError: they cannot be listed.
    """
    try:
        return _committed(parent)
    except OSError as error:
        raise CheckpointError(f"the checkpoints cannot be listed: {error.strerror or error}", got=parent) from error


def step_of(checkpoint: AnyPath) -> int:
    """Return the step that a committed checkpoint was saved after, by the name of its directory.

    Args:
        checkpoint: one of those that `committed` returns.
    """
    match = DIRECTORY.fullmatch(checkpoint.name)
    assert match, f"{checkpoint} is no checkpoint's directory"
    return int(match[1])


def _committed(parent: AnyPath) -> list[AnyPath]:
    found = []
    for path in children(parent):
        match = DIRECTORY.fullmatch(path.name)
        if match and size_of(path / MANIFEST) is not None:
            found.append((int(match[1]), int(match[2] or 1), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def newest_valid(
    parent: AnyPath,
    verify: bool,
    report: Callable[[str], object],
    trust: Trust = Trust(),
    before: AnyPath | None = None,
    until: int | None = None,
) -> AnyPath | None:
    """Return the directory of the checkpoint that `open_newest` opens, with these arguments; None where there is none.

    Args:
        parent: the directory of checkpoints.
        verify: hash the files beside the tensors, too.
        report: told of each checkpoint that is not valid.
        trust: whose signatures are accepted.
        before: look only at those older than this one.
        until: look only at those of at most this step; None: at all.
    """
    found = open_newest(parent, verify, report, trust, before, until)
    return None if found is None else found.directory


def open_newest(
    parent: AnyPath,
    verify: bool,
    report: Callable[[str], object],
    trust: Trust = Trust(),
    before: AnyPath | None = None,
    until: int | None = None,
) -> Checkpoint | None:
    """Open the newest checkpoint whose manifest, files and their sizes are right.

    Args:
        parent: the directory of checkpoints.
        verify: hash the files beside the tensors, too. Tensors are hashed when they are read.
        report: told of each checkpoint that is not valid.
        trust: whose signatures are accepted.
        before: look only at those older than this one.
        until: look only at those of at most this step; None: at all.
    """
    paths = [path for path in committed(parent) if until is None or step_of(path) <= until]
    if before is not None:
        names = [path.name for path in paths]
        paths = paths[names.index(before.name) + 1 :] if before.name in names else []
    for path in paths:
        try:
            if why := set_aside(path):
                report(f"skipping {path}: it was set aside: {why}")
                continue
            checkpoint = Checkpoint(path, trust)
            if verify:
                checkpoint.verify_beside()
            if diverged(path):
                report(f"skipping {path}: the run that saved it had diverged, its model is not finite")
                continue
        except CheckpointError as error:
            report(f"skipping {path}: {error}")
            continue
        return checkpoint
    return None


def diverged(path: AnyPath) -> bool:
    """Whether the model of a checkpoint gave a loss or gradients that are not finite when it was saved.

    So say saves of earlier versions; today's are refused. Where nothing was measured, or it cannot be read: no.

    Args:
        path: a path of this machine or of an object store.
    """
    try:
        numbers = parse_json(read_bounded(path / MEASURED, _MAX_MEASURED_BYTES))
        return numbers["loss"] is None or numbers["grad_norm"] is None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def set_aside(path: AnyPath) -> str:
    """Return why the run of a checkpoint does not go on from it; empty where nothing is said against it.

    Args:
        path: a path of this machine or of an object store.

    Raises:
        CheckpointError: it cannot be asked.
    """
    try:
        if not there(path / MARK):
            return ""
        said = parse_json(read_bounded(path / MARK, _MAX_MEASURED_BYTES))
        return shown(said["because"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return f"{MARK} does not say why"
    except OSError as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error.strerror or error}", got=path) from error


def put_aside(path: AnyPath, because: str) -> None:
    """Mark a checkpoint as one that its run does not go on from. The mark travels with its directory.

    Args:
        path: of the checkpoint.
        because: the reason, a sentence.

    Raises:
        OSError: it could not be marked.
    """
    put_last(path / MARK, json.dumps({"because": because, "time": time.time()}).encode())


def removable(
    parent: AnyPath, keep_last: int, keep_every_steps: int | None, trusted_step: int | None = None
) -> list[AnyPath]:
    """List the checkpoints older than the `keep_last` newest, at least one, without multiples of `keep_every_steps`.

    One whose model was not finite, or that was set aside, counts for nothing: no good one goes because of it.

    Args:
        parent: the directory of checkpoints.
        keep_last: number of the newest checkpoints to keep.
        keep_every_steps: keep checkpoints at multiples of this step, too; None: no others.
        trusted_step: keep the newest one of at most this step, too: later ones may turn out to be bad.
    """
    paths, kept = committed(parent), 0
    counts = functools.cache(lambda path: not diverged(path) and not set_aside(path))
    trusted = [path for path in paths if trusted_step is not None and step_of(path) <= trusted_step]
    spared = next(filter(counts, trusted), None)
    while paths and kept < max(1, keep_last):
        kept += counts(paths.pop(0))
    old = [path for path in paths if path != spared]
    return [path for path in old if not keep_every_steps or step_of(path) % keep_every_steps]


def prune(
    parent: AnyPath, keep_last: int, keep_every_steps: int | None, trusted_step: int | None = None
) -> list[AnyPath]:
    """Remove the checkpoints that are `removable`.

    Args:
        parent: the directory of checkpoints.
        keep_last: number of the newest checkpoints to keep.
        keep_every_steps: keep checkpoints at multiples of this step, too; None: no others.
        trusted_step: as of `removable`.

    Returns:
        The directories that were removed.
    """
    removed: list[AnyPath] = []
    try:
        old = removable(parent, keep_last, keep_every_steps, trusted_step)
    except CheckpointError:
        return removed  # a store that does not answer now: after the next save, then
    for path in old:
        # Without its manifest it is no checkpoint: an interrupted removal leaves nothing half valid.
        try:
            remove_file(path / MANIFEST)
        except OSError:
            continue  # what cannot be removed stays whole, and training goes on
        with contextlib.suppress(OSError):
            remove_tree(path)
        removed.append(path)
    return removed


def remove_uncommitted(parent: AnyPath) -> list[AnyPath]:
    """Remove what saves left that never committed. Only the holder of the run directory may call it.

    Args:
        parent: the directory of checkpoints.

    Raises:
        CheckpointError: the place cannot be listed.
    """
    removed = []
    try:
        found = [path for path in children(parent) if DIRECTORY.fullmatch(path.name) and not there(path / MANIFEST)]
    except OSError as error:
        raise CheckpointError(f"the checkpoints cannot be listed: {error.strerror or error}", got=parent) from error
    for path in found:
        with contextlib.suppress(OSError):
            remove_tree(path)
        removed.append(path)
    return removed
