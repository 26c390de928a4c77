"""Signs of life of the processes of a job, to find the one that is missing.

Beside a store that is a file each process has a file for them, of a fixed size, made before the process starts and
written over in place: it needs no room on a full disk, and what a killed process wrote last is there.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_BYTES = 512


@dataclass(frozen=True)
class Beat:
    """A sign of life of one process.

    Attributes:
        step: optimizer steps completed.
        host: name of the machine.
        pid: of the process.
        count: signs of life so far; a process whose count stays the same is not there, or does not run.
        phase: what it is at, one of `distributed.standing`.
        marks: pieces of work begun or completed so far.
        born: when the process began, by which it is known again.
    """

    step: int
    host: str
    pid: int
    count: int
    phase: str = ""
    marks: int = 0
    born: float = 0.0

    def to_text(self) -> str:
        """Serialize to JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> Beat:
        """Parse what `to_text` wrote.

        Args:
            text: JSON.
        """
        return Beat(**json.loads(text))


def make_room(store: Path, size: int) -> None:
    """Allocate the files of the beats.

    Args:
        store: the file where the processes meet.
        size: number of processes.

    Raises:
        OSError: there is no room.
    """
    for rank in range(size):
        _path(store, rank).write_bytes(b" " * _BYTES)


class BeatFile:
    """The file of one process's beats.

    Args:
        store: the file where the processes meet.
        rank: of the process.
    """

    def __init__(self, store: Path, rank: int):
        self._path, self._file = _path(store, rank), -1

    def write(self, text: str) -> None:
        """Write a beat over the last one. What fails is tried again with the next one.

        Args:
            text: the beat, as `Beat.to_text` gives it.
        """
        with suppress(OSError):
            if self._file < 0:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(self._file, text.encode().ljust(_BYTES), 0)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_beat(store: Path, rank: int) -> Beat | None:
    """Read the last beat of a process; None where there is none yet.

    Args:
        store: the file where the processes meet.
        rank: of the process.
    """
    try:
        return Beat.from_text(_path(store, rank).read_text())
    except (OSError, ValueError, TypeError):
        return None


def _path(store: Path, rank: int) -> Path:
    return store.with_name(f"{store.name}-beat-{rank}")
