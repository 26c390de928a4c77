"""Signs of life of the processes of a job, to find the one that is missing."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.atomic_files import write_atomically


@dataclass(frozen=True)
class Beat:
    """A sign of life of one process.

    Attributes:
        step: optimizer steps completed.
        host: name of the machine.
        pid: of the process.
        count: signs of life so far; a process whose count stays the same is not there, or does not run.
    """

    step: int
    host: str
    pid: int
    count: int

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


def write_beat(store: Path, rank: int, text: str) -> None:
    """Write a process's beat beside the file where the processes meet. A full disk is no error.

    Args:
        store: that file.
        rank: of the process.
        text: the beat, as `Beat.to_text` gives it.
    """
    path = _path(store, rank)
    with suppress(OSError):
        write_atomically(path, text)


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
