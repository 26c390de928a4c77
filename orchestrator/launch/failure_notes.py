"""What a process that fails leaves for the launcher: its error, and where it was raised."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.distributed.world import OWN_PREFIX
from orchestrator.errors import LostPeerError, UserError, error_from_dict, error_to_dict, printable

FOLDER = "ERRORS"
"""Variable, behind OWN_PREFIX: the folder where processes leave their notes."""
_FRAMES = 12


@dataclass(frozen=True)
class Note:
    """The error of one process.

    Attributes:
        rank: of the process.
        kind: type of the error.
        said: its first line.
        place: file and line where it was raised: of the user's own code, where it came through such.
        lost_peer: it knows no more than that another process is gone.
        stack: the last frames, as Python prints them.
        error: as JSON data, if it is one that a user can act on.
    """

    rank: int
    kind: str
    said: str
    place: str
    lost_peer: bool
    stack: str
    error: dict[str, Any] | None = None

    @property
    def identity(self) -> str:
        """What errors of one kind have in common. Not their words, which may hold addresses and times."""
        return f"{self.kind} at {self.place}"

    def user_error(self) -> UserError | None:
        """Return the error, if it is one that a user can act on."""
        return error_from_dict(self.error) if self.error else None


def leave_note(rank: int, error: BaseException) -> None:
    """Leave a note, if the launcher has named a folder. What fails is left out.

    Args:
        rank: of this process.
        error: that ends it.
    """
    folder = os.environ.get(OWN_PREFIX + FOLDER)
    if not folder:
        return
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    frames = traceback.extract_tb(root.__traceback__)
    last = frames[-1] if frames else None
    note = {
        "rank": rank,
        "kind": type(root).__name__,
        "said": printable(str(error).partition("\n")[0])[:500],
        "place": f"{last.filename}:{last.lineno}" if last else "",
        "lost_peer": isinstance(error, LostPeerError),
        "stack": printable("".join(traceback.format_list(frames[-_FRAMES:]))),
        "error": error_to_dict(error) if isinstance(error, UserError) else None,
    }
    with contextlib.suppress(OSError):
        Path(folder, f"{rank}.json").write_text(json.dumps(note))


def read_notes(folder: Path) -> list[Note]:
    """Return what the processes have left; those first that know more than that another one is gone.

    Args:
        folder: that they were told.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Note(**json.loads(path.read_text())))
    return sorted(found, key=lambda note: (note.lost_peer, note.rank))


def first_error(notes: Sequence[Note]) -> UserError | None:
    """Return the first error of `notes` that a user can act on.

    Args:
        notes: as `read_notes` returns them.
    """
    return next((error for note in notes if (error := note.user_error())), None)
