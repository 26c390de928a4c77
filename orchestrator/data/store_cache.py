"""The user's cache of prepared data: built once, by one process, and never visible in part."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from orchestrator.atomic_files import write_atomically
from orchestrator.data.formats.reading import Input
from orchestrator.data.plain_files import read_bounded
from orchestrator.data.store import hash_file
from orchestrator.errors import DataError
from orchestrator.output import tell

T = TypeVar("T")
_MEMO_FROM_BYTES = 64 << 20  # below that, hashing again is as fast as it is safe
_RACY_SECONDS = 2.0  # a file may change again within the resolution of its time stamp


def cache_root(cache_dir: str) -> Path:
    """Return the cache directory: the configured one, else $ORCHESTRATOR_CACHE, $XDG_CACHE_HOME or ~/.cache.

    Args:
        cache_dir: as configured; `auto` for the default.
    """
    if cache_dir != "auto":
        return Path(cache_dir).expanduser()
    if own := os.environ.get("ORCHESTRATOR_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "orchestrator"


def key_of(**facts: object) -> str:
    """Return a short key that changes when any of the facts does.

    Args:
        **facts: whatever can be put into JSON.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def content_digest(inputs: Sequence[Input], root: Path) -> str:
    """Hash names, formats and contents of the inputs, in order, by sha256.

    Large inputs are not read again while paths, sizes and times of modification are those of the last time.

    Args:
        inputs: the input files.
        root: of the cache, where digests of large inputs are kept.

    Raises:
        DataError: a file cannot be read.
    """
    files = [(item, file, file.stat()) for item in inputs for file in item.files]
    large = sum(stat.st_size for *_, stat in files) >= _MEMO_FROM_BYTES
    settled = all(abs(time.time() - stat.st_mtime) > _RACY_SECONDS for *_, stat in files)
    facts = [
        [str(file.resolve()), item.name, item.format, stat.st_size, stat.st_mtime_ns] for item, file, stat in files
    ]
    memo = root / "digests" / key_of(files=facts)
    if large and (known := _remembered(memo)):
        return known
    digest = hashlib.sha256()
    for item, file, _ in files:
        try:
            content = hash_file(file)
        except OSError as error:
            raise DataError(
                f"the input cannot be read: {file}",
                got=error.strerror or str(error),
                allowed="a regular file that this user may read",
                fix="check the path",
            ) from error
        digest.update(f"{item.name}\0{item.format}\0{content}\n".encode("utf-8", "surrogateescape"))
    if large and settled:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memo, digest.hexdigest(), shared=True)
    return digest.hexdigest()


def _remembered(memo: Path) -> str | None:
    if not memo.is_file():
        return None
    try:
        text = read_bounded(memo, 64).decode("ascii", "replace")
    except DataError:
        return None
    return text if len(text) == 64 and set(text) <= set("0123456789abcdef") else None


def cached(root: Path, kind: str, key: str, load: Callable[[Path], T], build: Callable[[Path], object], say: bool) -> T:
    """Load the directory `root/kind/key`, or build it first.

    Of several processes one builds and the others wait for it. It builds aside and renames, so a crash leaves
    nothing that looks complete; what a crash left is removed by the next build of the same key.

    Args:
        root: of the cache.
        kind: folder in it, such as `stores`.
        key: name of the directory: a hash of what it is built from.
        load: reads the directory; a DataError means that it is damaged. It is built again, and that is said.
        build: fills an empty directory.
        say: tell on standard error when another process is waited for, or something is built again.

    Raises:
        DataError: the cache cannot be written.
    """
    from filelock import FileLock, Timeout

    target = root / kind / key
    if (found := _try_load(target, load, say=False)) is not None:
        return found
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f"{key}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            note(f"waiting for another process that prepares the same data ({target})", say)
            lock.acquire()
        try:
            if (found := _try_load(target, load, say)) is not None:
                return found
            _build_aside(target, build)
            return load(target)
        finally:
            lock.release()
    except OSError as error:
        raise DataError(
            "the cache of prepared data cannot be written",
            got=f"{target}: {error.strerror or error}",
            allowed="a directory with room that this user may write",
            fix="choose another: data.cache_dir=<directory>, or set ORCHESTRATOR_CACHE",
        ) from error


def note(text: str, say: bool, level: int = logging.INFO) -> None:
    """Tell the user one line, if `say` is on.

    Args:
        text: the line.
        say: whether to tell.
        level: of `logging`.
    """
    if say:
        tell(text, level=level)


def _try_load(target: Path, load: Callable[[Path], T], say: bool) -> T | None:
    if not os.path.lexists(target):
        return None
    try:
        return load(target)
    except DataError as error:
        note(f"the cache is damaged, and is prepared again: {error}", say, logging.WARNING)
        return None


def _build_aside(target: Path, build: Callable[[Path], object]) -> None:
    for left in target.parent.glob(f"{target.name}.building-*"):
        shutil.rmtree(left, ignore_errors=True)
    aside = target.with_name(f"{target.name}.building-{os.getpid()}")
    aside.mkdir()
    try:
        build(aside)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        elif os.path.lexists(target):
            target.unlink()
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
