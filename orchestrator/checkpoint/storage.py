"""Files of checkpoints: in a folder, or below a prefix of an object store (universal_pathlib).

A file of a folder is on disk when `write_file` returns; an object appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from orchestrator.checkpoint import gcs
from orchestrator.checkpoint.hashing import Piece, StoredFile, hash_of
from orchestrator.checkpoint.store_timeouts import FINAL, PatientFile, as_os_error, briefly, client_options, retried
from orchestrator.errors import CheckpointError, MissingExtraError

AnyPath: TypeAlias = Path
"""A `pathlib.Path`, or a `upath.UPath`, which has its methods and is no subclass of it."""


PIECE_BYTES = 1 << 24
"""A hash covers at most so many bytes: damage is found to that range, and all cores can look for it."""
READ_BYTES = 1 << 20
"""What is read at a time where it is hashed on the way."""
_MULTIPART_BYTES = 1 << 25
_FLUSH_BYTES = 1 << 26
_WITHOUT_DIRECTORIES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EISDIR, errno.ENOSYS)
_HASHING_THREADS = min(4, os.cpu_count() or 1)


class UndecidedError(OSError):
    """A store has been asked for an operation, and it is unknown whether it is done."""


def locate(where: str | Path) -> AnyPath:
    """Return the path that a user names: of this machine, or `scheme://...` of an object store.

    Args:
        where: the path or URL.

    Raises:
        MissingExtraError: a URL, and the libraries of its store are not installed.
        CheckpointError: a URL of no known kind, or its store cannot be used as it is set up.
    """
    text = str(where)
    if "://" not in text:
        return Path(where)
    try:
        from upath import UPath
    except ImportError:
        raise MissingExtraError("universal-pathlib", "remote", f"a checkpoint at {text}") from None
    try:
        scheme = text.partition("://")[0]
        if scheme in gcs.SCHEMES:
            gcs.prepare()
        # Without a cache of listings: other ranks and other runs write there too.
        path: Any = UPath(text, use_listings_cache=False, **client_options(scheme))
        path.fs  # noqa: B018 - loads the store's library
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or str(error)
        raise MissingExtraError(missing.partition(".")[0], "remote", f"a checkpoint at {text}") from None
    except Exception as error:
        raise CheckpointError(
            f"the address of a checkpoint is not understood, or its store not set up: {error}",
            got=text,
            allowed="a path, s3://..., gs://...",
        ) from None
    return path


def is_remote(path: AnyPath) -> bool:
    """Whether the path is one of an object store.

    Args:
        path: a path of this machine or of an object store.
    """
    return not isinstance(path, Path)


def resolved(path: Path) -> Path:
    """Return an absolute path of this machine, without links.

    Args:
        path: a path of this machine.

    Raises:
        CheckpointError: links that lead back to themselves.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: Python before 3.13
        raise CheckpointError("the path is a link that leads back to itself", got=path) from None


def size_of(path: AnyPath) -> int | None:
    """Return the size of a plain file in bytes, else None.

    A link counts as none: a checkpoint holds its files itself.

    Args:
        path: a path of this machine or of an object store.

    Raises:
        OSError: the store does not answer.
    """
    if not is_remote(path):
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None
    try:
        about = retried(lambda: _store(path).info(_key(path)), "read", path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return int(about["size"]) if about["type"] == "file" else None


def there(path: AnyPath) -> bool:
    """Return whether anything has that name: a file, a directory, a link, or objects with that prefix.

    Args:
        path: a path of this machine or of an object store.

    Raises:
        OSError: the store does not answer.
    """
    if is_remote(path):
        return bool(retried(lambda: _store(path).exists(_key(path)), "list", path))
    return os.path.lexists(path)


def read_bounded(path: AnyPath, limit: int) -> bytes:
    """Read a file of at most `limit` bytes.

    Args:
        path: a path of this machine or of an object store.
        limit: largest size in bytes.

    Raises:
        CheckpointError: it is larger.
        OSError: there is no such file, or it cannot be read.
    """
    size = size_of(path)
    if size is None:
        # Not what a link or a device holds: that is for others, or without end.
        what = errno.EISDIR if there(path) else errno.ENOENT
        raise OSError(what, "not a plain file" if what == errno.EISDIR else os.strerror(what))
    if size > limit:
        raise CheckpointError("the file is too large to be what it claims", got=path, allowed=f"{limit} bytes")
    return read_range(path, 0, size)


def children(parent: AnyPath) -> list[AnyPath]:
    """List a directory, or what lies directly below a prefix; empty where there is none.

    Args:
        parent: a directory, or a prefix.

    Raises:
        OSError: it cannot be listed.
    """
    if not is_remote(parent):
        return list(parent.iterdir()) if parent.is_dir() else []
    try:
        found = retried(lambda: _store(parent).ls(_key(parent), detail=False), "list", parent)
    except (FileNotFoundError, NotADirectoryError):
        return []
    # A file is listed as itself, and so is an object that stands for a directory.
    keys = {str(key).strip("/") for key in found} - {_key(parent).strip("/")}
    return [parent / name for name in sorted(key.rpartition("/")[2] for key in keys)]


def modified(path: AnyPath) -> float:
    """Return when a file was written, in seconds since 1970, by the store's own clock; 0 where it is not known.

    Args:
        path: a path of this machine or of an object store.
    """
    if not is_remote(path):
        return path.stat().st_mtime
    try:
        return float(retried(lambda: _store(path).modified(_key(path)), "read", path).timestamp())
    except NotImplementedError:
        return 0.0


def make_directory(path: AnyPath) -> None:
    """Make a directory and its parents. An object store has none: a mistyped name makes no bucket.

    Args:
        path: a path of this machine or of an object store.
    """
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
    elif getattr(path, "protocol", "") not in _WITHOUT_DIRECTORIES:
        retried(lambda: _store(path).makedirs(_key(path), exist_ok=True), "write", path)


def claim(path: AnyPath, owner: bytes) -> bytes:
    """Write an object unless it exists: of several writers, one succeeds. Returns the content that is there.

    Args:
        path: a path of this machine or of an object store.
        owner: the content to write.

    Raises:
        OSError: the store cannot be written.
    """
    try:
        retried(lambda: _store(path).pipe_file(_key(path), owner, mode="create"), "write", path)
    except FileExistsError:
        return read_range(path, 0, 1 << 16)
    return owner


def _store(path: AnyPath) -> Any:
    return path.fs  # type: ignore[attr-defined]


def _key(path: AnyPath) -> str:
    return str(path.path)  # type: ignore[attr-defined]


def write_file(path: AnyPath, parts: Iterable[Any], hash: str = "sha256", whole: bool = False) -> StoredFile:
    """Write bytes-like parts one after the other, hashing beside it; flushed to disk, or put whole into the store.

    Args:
        path: the file, whose directory exists, or an object of a store.
        parts: bytes-like objects.
        hash: a name that `new_hash` takes.
        whole: compute the SHA-256 of the whole file, too: one piece after the other, in a thread beside.

    Returns:
        Size and the hashes of its pieces, each of one part or of `PIECE_BYTES` of it.
    """
    content = hashlib.sha256()
    with ThreadPoolExecutor(_HASHING_THREADS) as pool, ThreadPoolExecutor(1) as in_order:
        hashes: list[tuple[int, Future[str]]] = []
        added: list[Future[None]] = []
        with _open_whole(path) as file:
            for piece in _pieces(parts):
                hashes.append((len(piece), pool.submit(hash_of, hash, piece)))
                if whole:
                    added.append(in_order.submit(content.update, piece))
                file.write(piece)
                # The pieces wait for their hash in memory: not many of them.
                if len(hashes) > 2 * _HASHING_THREADS:
                    hashes[-2 * _HASHING_THREADS][1].result()
                    for waiting in added[-2 * _HASHING_THREADS :][:1]:
                        waiting.result()
        pieces = tuple(Piece(size, future.result()) for size, future in hashes)
    return StoredFile(sum(piece.bytes for piece in pieces), pieces, content.hexdigest() if whole else "")


def read_range(path: AnyPath, start: int, stop: int) -> bytes:
    """Read the bytes `[start, stop)` of a file, fewer where it ends before.

    Args:
        path: a path of this machine or of an object store.
        start: first byte.
        stop: the byte behind the last one.

    Raises:
        OSError: it cannot be read.
    """
    if is_remote(path):
        if stop <= start:
            return b""
        data: bytes = retried(lambda: _store(path).cat_file(_key(path), start=start, end=stop), "read", path)
        return data
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        return file.read(stop - start)


def read_range_into(
    path: AnyPath, start: int, out: memoryview, tell: Callable[[memoryview], object] = lambda part: None
) -> int:
    """Fill `out` with the bytes of a file from `start` on. Returns how many there were.

    Args:
        path: the file.
        start: offset of the first byte.
        out: the buffer to fill.
        tell: given each part of `out` as it is filled; on this machine so soon that it lies in the processor's cache.

    Raises:
        OSError: it cannot be read.
    """
    done = 0
    if is_remote(path):
        while done < len(out):
            # A piece at a time: it is in memory twice.
            data = read_range(path, start + done, start + min(len(out), done + PIECE_BYTES))
            if not data:
                break
            out[done : done + len(data)] = data
            tell(out[done : done + len(data)])
            done += len(data)
        return done
    with open(path, "rb", buffering=0) as file:
        while done < len(out):
            count = os.preadv(file.fileno(), [out[done : done + READ_BYTES]], start + done)
            if not count:
                break
            tell(out[done : done + count])
            done += count
    return done


def read_runs(path: AnyPath, starts: Sequence[int], length: int, out: memoryview) -> bool:
    """Read stretches of `length` bytes, one behind the other into `out`.

    Args:
        path: a path of this machine or of an object store.
        starts: first byte of each stretch.
        length: of each, in bytes.
        out: the buffer to fill.

    Returns:
        False where the file is too short.

    Raises:
        OSError: it cannot be read.
    """
    places = range(0, len(out), length)
    if is_remote(path):
        stops = [start + length for start in starts]
        runs = retried(
            lambda: _store(path).cat_ranges([_key(path)] * len(starts), list(starts), stops, on_error="raise"),
            "read",
            path,
        )
        if any(len(run) != length for run in runs):
            return False
        for place, run in zip(places, runs, strict=True):
            out[place : place + length] = run
        return True
    with open(path, "rb", buffering=0) as file:
        handle = file.fileno()
        return all(
            os.preadv(handle, [out[place : place + length]], start) == length
            for place, start in zip(places, starts, strict=True)
        )


def put_last(path: AnyPath, content: bytes) -> None:
    """Publish a commit marker atomically, after all other files are durable.

    Args:
        path: a path of this machine or of an object store.
        content: of the file.

    Raises:
        UndecidedError: a store has not said that it is there, and it may still appear.
        OSError: it is not there.
    """
    if is_remote(path):
        _put_whole(path, content)
        return
    aside = path.with_name(f"{path.name}.partial")
    write_file(aside, [content])
    # The names of the files around it first: a rename may reach the disk before them.
    _sync_directory(path.parent)
    aside.rename(path)
    _sync_directory(path.parent)
    _sync_directory(path.parent.parent)


def _put_whole(path: AnyPath, content: bytes) -> None:
    try:
        # One request: it is there whole or not at all.
        retried(lambda: _store(path).pipe_file(_key(path), content), "commit", path)
    except FINAL:
        raise
    except OSError as error:
        # What the store has done and only not answered is done.
        with contextlib.suppress(Exception):
            if briefly(lambda: _store(path).cat_file(_key(path))) == content:
                return
        said = error.strerror or str(error)
        raise UndecidedError(
            error.errno or errno.EIO, f"{said}; the store may still do it, so its files stay"
        ) from error


def remove_tree(directory: AnyPath) -> None:
    """Remove a directory and what is in it; in a store it may be gone.

    Args:
        directory: the directory, or a prefix.

    Raises:
        OSError: something cannot be removed.
    """
    if is_remote(directory):
        # The libraries take a key for a pattern: it could match the directories of others.
        key = glob.escape(_key(directory))
        with contextlib.suppress(FileNotFoundError):  # as below
            retried(lambda: _store(directory).rm(key, recursive=True), "remove", directory)
    else:
        shutil.rmtree(directory)


def remove_file(path: AnyPath) -> None:
    """Remove a file; in a store it may be gone.

    Args:
        path: a path of this machine or of an object store.

    Raises:
        OSError: it cannot be removed.
    """
    if is_remote(path):
        # Not there any more where an answer was lost and it was tried again; and S3 never says so.
        with contextlib.suppress(FileNotFoundError):
            retried(lambda: _store(path).rm_file(_key(path)), "remove", path)
    else:
        path.unlink()


@contextlib.contextmanager
def _open_whole(path: AnyPath) -> Iterator[Any]:
    if not is_remote(path):
        with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as flusher:
            flushed = _Flushed(file, flusher)
            yield flushed
            flushed.finish()
        return
    # The store's library sends the parts of a large object one by one, and each again where that fails.
    opened = retried(lambda: _store(path).open(_key(path), "wb", block_size=_MULTIPART_BYTES), "write", path)
    remote = PatientFile(opened, path)
    try:
        yield remote
        remote.close()
    except BaseException as error:
        remote.give_up()
        if not isinstance(error, TimeoutError):
            with contextlib.suppress(Exception):
                briefly(lambda: _store(path).rm_file(_key(path)))  # some stores show an object while it is written
        if isinstance(error, Exception):
            raise as_os_error(error) from error
        raise


class _Flushed:
    """An unbuffered file that writes all it is given, and flushes it to disk while the rest is written and hashed.

    A copy through a buffer would cost as much as the hash, and flushing all of it at the end as much as both.
    """

    def __init__(self, file: Any, flusher: ThreadPoolExecutor):
        self._file, self._flusher = file, flusher
        self._unflushed = 0
        self._flush: Future[None] | None = None

    def write(self, data: memoryview) -> None:
        self._unflushed += len(data)
        while data:
            data = data[self._file.write(data) :]
        if self._unflushed >= _FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._settle()
            self._flush, self._unflushed = self._flusher.submit(os.fsync, self._file.fileno()), 0

    def finish(self) -> None:
        self._settle()
        os.fsync(self._file.fileno())

    def _settle(self) -> None:
        # The system reports a failed flush once: the caller must see it.
        if self._flush is not None:
            self._flush.result()


def _pieces(parts: Iterable[Any]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part).cast("B")
        yield from (view[start : start + PIECE_BYTES] for start in range(0, len(view), PIECE_BYTES))


def _sync_directory(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # Some file systems refuse to flush a directory; there the rename is as durable as it gets.
        if error.errno not in _NO_FLUSH:
            raise
