"""The folder of a run on the memory file system of a host: private, held while the run lives, removed when it is over.

    /dev/shm/orchestrator-<uid>/<uuid of the run>/step-00000100/

Processes die with their memory; what lies there outlives them, though not the host.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import time
from pathlib import Path

from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.checkpoint.storage import AnyPath
from orchestrator.errors import CheckpointError

STALE_SECONDS = 3600.0
"""What nobody holds for so long waits for no restart any more. It goes earlier where its room is needed."""
_LOCK = ".lock"
_RUN = re.compile(r"[0-9a-f]{32}")
_TRIES = 20
_RETRY_SECONDS = 0.05


class MemoryFolder:
    """The folder of one run, made and held by this process. Several processes of the run hold it together.

    Args:
        place: folder of the memory file system.
        run: uuid of the run.

    Attributes:
        path: of the folder.

    Raises:
        CheckpointError: it cannot be made, or is not this user's alone.
    """

    def __init__(self, place: Path, run: str):
        assert _RUN.fullmatch(run), run
        if not place.is_dir():
            raise CheckpointError("there is no memory file system", got=place, allowed="a folder on a tmpfs")
        self._of_user = _of_user(place)
        self.path = self._of_user / run
        try:
            self._lock = self._hold()
        except OSError as error:
            raise CheckpointError(
                f"the folder for snapshots in memory cannot be used: {error.strerror or error}", got=self.path
            ) from error

    def _hold(self) -> int:
        for _ in range(_TRIES):
            _make_private(self._of_user)
            _make_private(self.path)
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                handle = _lock(self.path, fcntl.LOCK_SH)
                if os.fstat(handle).st_nlink:
                    return handle
                os.close(handle)
            time.sleep(_RETRY_SECONDS)  # another process is removing what nobody held
        raise OSError("another process keeps it locked")

    @property
    def identity(self) -> str:
        """Names the memory that it is in: the same for processes that see the same folder."""
        about = os.stat(self._of_user)
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            boot = ""
        return f"{boot}/{about.st_dev}/{about.st_ino}"

    def free_bytes(self) -> int:
        """Return how much the file system still takes."""
        about = os.statvfs(self.path)
        return about.f_bavail * about.f_frsize

    def used_bytes(self) -> int:
        """Return how much the snapshots take that are there."""
        return sum(os.lstat(path).st_blocks * 512 for path in self.path.rglob("*"))

    def keep_only(self, name: str | None) -> None:
        """Remove every snapshot but one.

        Args:
            name: of the one to keep; None: none.
        """
        for child in self.path.iterdir():
            if child.name not in (name, _LOCK):
                remove_snapshot(child)

    def clear_others(self, older_than: float = STALE_SECONDS) -> list[Path]:
        """Remove the folders of this user's other runs that no process holds.

        Args:
            older_than: seconds for which nothing was written there.

        Returns:
            What was removed.
        """
        removed = []
        for other in self._of_user.iterdir():
            if other != self.path and _RUN.fullmatch(other.name) and _age(other) >= older_than and _remove_run(other):
                removed.append(other)
        return removed

    def release(self) -> None:
        """Hold it no more; what is in it stays."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Remove the folder, if no other process holds it: the last one that goes removes it."""
        self.release()
        with contextlib.suppress(OSError):
            _remove_run(self.path)


def snapshots_here(place: Path, run: object) -> list[AnyPath]:
    """List the snapshots of a run whose manifest is on this host, the newest first, without holding them.

    Args:
        place: folder of the memory file system.
        run: uuid of the run; anything else has none.
    """
    if not isinstance(run, str) or not _RUN.fullmatch(run):
        return []
    try:
        return committed(_of_user(place) / run) if _is_private(_of_user(place)) else []
    except CheckpointError:
        return []


def remove_snapshot(directory: AnyPath) -> None:
    """Remove a snapshot, its manifest first. What cannot be removed stays: nothing of it counts without.

    Args:
        directory: of the snapshot.
    """
    with contextlib.suppress(OSError):
        (directory / MANIFEST).unlink()
    shutil.rmtree(directory, ignore_errors=True)


def _of_user(place: Path) -> Path:
    return place / f"orchestrator-{os.geteuid()}"


def _is_private(path: Path) -> bool:
    try:
        about = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o077


def _make_private(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if not _is_private(path):
        about = os.lstat(path)
        raise CheckpointError(
            "the folder for snapshots in memory is not this user's alone",
            got=f"{path}, {stat.filemode(about.st_mode)} of user {about.st_uid}",
            allowed=f"a folder, drwx------ of user {os.geteuid()}",
            fix="remove it, or set checkpoint.memory.dir to a place that is yours",
        )


def _lock(folder: Path, kind: int) -> int:
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _age(folder: Path) -> float:
    try:
        times = [os.lstat(path).st_mtime for path in (folder, *folder.iterdir())]
    except OSError:
        return 0.0  # another process is at it
    return time.time() - max(times)


def _remove_run(folder: Path) -> bool:
    """Remove the folder of a run that nobody holds."""
    try:
        about = os.lstat(folder)
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            return False
        handle = _lock(folder, fcntl.LOCK_EX)
    except OSError:
        return False
    try:
        for child in folder.iterdir():
            if child.name != _LOCK:
                remove_snapshot(child)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
    return not os.path.lexists(folder)
