"""Write files atomically: a reader sees the old content or the new one, whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False, shared: bool = False) -> None:
    """Write a file beside `path` (`<name>.partial`) and rename it to `path`.

    Args:
        path: the file, in an existing directory of this machine.
        content: text, written as UTF-8, or bytes.
        durable: wait until the content is on disk before the file is renamed.
        shared: several processes may write the file at one time; the name of the file beside has the process id.

    Raises:
        OSError: the file could not be written. It is as it was, and the file beside it is gone.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial" if shared else f"{path.name}.partial")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            with open(aside, "rb") as stream:
                os.fsync(stream.fileno())
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
