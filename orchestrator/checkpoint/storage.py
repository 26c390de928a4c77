"""Where checkpoints lie: a folder, or a prefix of an object store. Both are paths here (universal_pathlib).

A file of a folder is on disk when `write_file` returns; an object appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from orchestrator.checkpoint.format import Piece, StoredFile
from orchestrator.errors import CheckpointError, MissingExtraError

AnyPath: TypeAlias = Path
"""A `pathlib.Path`, or a `upath.UPath`, which has its methods and is no subclass of it."""

PIECE_BYTES = 1 << 24
"""A hash covers at most so many bytes: damage is found to that range, and all cores can look for it."""
_MULTIPART_BYTES = 1 << 25
_ATTEMPTS, _PAUSE_SECONDS = 3, 0.5
_HASHING_THREADS = min(4, os.cpu_count() or 1)


def locate(where: str | Path) -> AnyPath:
    """The path that a user names: of this machine, or `scheme://...` of an object store.

    Raises:
        MissingExtraError: a URL, and the libraries of its store are not installed.
        CheckpointError: a URL of no known kind.
    """
    text = str(where)
    if "://" not in text:
        return Path(where)
    try:
        from upath import UPath
    except ImportError:
        raise MissingExtraError("universal-pathlib", "remote", f"a checkpoint at {text}") from None
    try:
        path: Any = UPath(text)
        path.fs  # noqa: B018 - loads the store's library
    except ImportError as error:
        raise MissingExtraError(str(error), "remote", f"a checkpoint at {text}") from None
    except ValueError as error:
        raise CheckpointError(
            f"the address of a checkpoint is not understood: {error}", got=text, allowed="a path, s3://..., gs://..."
        ) from None
    return path


def is_remote(path: AnyPath) -> bool:
    return not isinstance(path, Path)


def write_file(path: AnyPath, parts: Iterable[Any]) -> StoredFile:
    """Write bytes-like parts one after the other, hashing beside it; flushed to disk, or put whole into the store.

    Returns:
        Size and the hashes of its pieces, each of one part or of `PIECE_BYTES` of it.
    """
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes: list[tuple[int, Future[str]]] = []
        with _open_whole(path) as file:
            for piece in _pieces(parts):
                hashes.append((len(piece), pool.submit(_sha256, piece)))
                file.write(piece)
                # The pieces wait for their hash in memory: not many of them.
                if len(hashes) > 2 * _HASHING_THREADS:
                    hashes[-2 * _HASHING_THREADS][1].result()
        pieces = tuple(Piece(size, future.result()) for size, future in hashes)
    return StoredFile(sum(piece.bytes for piece in pieces), pieces)


def read_range(path: AnyPath, start: int, stop: int) -> bytes:
    """The bytes `[start, stop)` of a file, fewer where it ends before.

    Raises:
        OSError: it cannot be read.
    """
    if is_remote(path):
        store: Any = path
        data: bytes = retried(lambda: store.fs.cat_file(store.path, start=start, end=stop)) if stop > start else b""
        return data
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        return file.read(stop - start)


def read_range_into(path: AnyPath, start: int, out: memoryview) -> int:
    """Fill `out` with the bytes of a file from `start` on. Returns how many there were.

    Raises:
        OSError: it cannot be read.
    """
    if is_remote(path):
        data = read_range(path, start, start + len(out))
        out[: len(data)] = data
        return len(data)
    done = 0
    with open(path, "rb", buffering=0) as file:
        while done < len(out) and (count := os.preadv(file.fileno(), [out[done:]], start + done)):
            done += count
    return done


def put_last(path: AnyPath, content: bytes) -> None:
    """Write a file that stands for all those around it: it appears whole, and after them."""
    if is_remote(path):
        write_file(path, [content])
        return
    aside = path.with_name(f"{path.name}.partial")
    write_file(aside, [content])
    # The names of the files around it first: a rename may reach the disk before them.
    _sync_directory(path.parent)
    aside.rename(path)
    _sync_directory(path.parent)
    _sync_directory(path.parent.parent)


def remove_tree(directory: AnyPath) -> None:
    """Remove a directory and what is in it.

    Raises:
        OSError: something cannot be removed.
    """
    if is_remote(directory):
        retried(lambda: directory.fs.rm(directory.path, recursive=True))  # type: ignore[attr-defined]
    else:
        shutil.rmtree(directory)


def retried(action: Callable[[], Any]) -> Any:
    """What `action` returns; after an error of the store it is tried again a few times."""
    for attempt in range(_ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_PAUSE_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _open_whole(path: AnyPath) -> Iterator[Any]:
    if not is_remote(path):
        with open(path, "wb", buffering=0) as file:
            yield _Raw(file)
            os.fsync(file.fileno())
        return
    file = retried(lambda: path.open("wb", block_size=_MULTIPART_BYTES))  # type: ignore[call-overload]
    try:
        yield file
    except BaseException:
        # Closing it would make an object of what there is.
        with contextlib.suppress(Exception):
            file.discard()
        raise
    file.close()


class _Raw:
    """An unbuffered file that writes all it is given; a copy through a buffer costs as much as the hash."""

    def __init__(self, file: Any):
        self._file = file

    def write(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]


def _pieces(parts: Iterable[Any]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part).cast("B")
        yield from (view[start : start + PIECE_BYTES] for start in range(0, len(view), PIECE_BYTES))


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync_directory(path: Path) -> None:
    # Some file systems refuse to flush a directory; there the rename is as durable as it gets.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
