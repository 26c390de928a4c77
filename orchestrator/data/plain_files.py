"""Read files of untrusted origin: regular files only, and up to a size limit.

Opening a FIFO waits for a writer that may never come, a device has no end, and a link may lead out of the directory
that was named.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from orchestrator.errors import DataError

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def regular_size(file: Path, within: Path | None = None) -> int:
    """Return the size of a regular file in bytes.

    Args:
        file: its path.
        within: a directory that links may not lead out of.

    Raises:
        DataError: it is missing, is no regular file, or lies elsewhere.
    """
    try:
        status = file.stat()
        outside = within is not None and not file.resolve().is_relative_to(within.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"there is no such file: {file}", got=reason, allowed="a regular file") from error
    if outside:
        raise DataError(
            f"the file is a link to another place: {file}",
            got=os.path.realpath(file),
            allowed=f"a file in {within}",
            fix="copy the file there in place of the link",
        )
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "no regular file")
        raise DataError(f"this is not a file that can be read: {file}", got=kind, allowed="a regular file")
    return status.st_size


def read_regular(path: Path, limit: int) -> bytes:
    """Read a plain file: a pipe or a device, which may never end, is refused, and so is a larger file.

    Args:
        path: a file or a directory.
        limit: largest size in bytes.

    Raises:
        OSError: it cannot be read.
        DataError: it is no plain file, or larger than `limit` bytes.
    """
    # A blocking open of a pipe without a writer would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DataError("this is not a plain file", got=path, allowed="a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DataError("the file is too large", got=f"{path}: {found.st_size:,} bytes", allowed=f"at most {limit:,}")
    return content


def read_bounded(file: Path, limit: int, within: Path | None = None) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Args:
        file: its path.
        limit: bytes.
        within: a directory that links may not lead out of.

    Raises:
        DataError: it is missing, too large, no regular file, or cannot be read.
    """
    size = regular_size(file, within)
    if size > limit:
        raise DataError(f"the file is too large for what it should hold: {file}", got=size, allowed=f"{limit} bytes")
    try:
        return read_regular(file, limit)  # what was a file a moment ago may be something else now
    except OSError as error:
        raise DataError(f"the file cannot be read: {file}", got=error.strerror or str(error)) from error
