"""What the launcher of a run with islands and its hub leave for each other in a folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.atomic_files import write_atomically

BRIEF, ADDRESS, BEGUN = "hub.json", "address", "begun"
"""Files of the folder: what the launcher says, where the hub listens, and that islands have begun to train."""
MEMORY = {
    name: os.environ.get(name, str(1 << bits))
    for name, bits in (("MALLOC_MMAP_THRESHOLD_", 30), ("MALLOC_TRIM_THRESHOLD_", 32))
}
"""Of the environment of hub and islands: glibc keeps what is freed. An exchange fills large arrays for a moment, and
memory that comes anew from the kernel costs more than what is computed in it."""


@dataclass(frozen=True)
class HubBrief:
    """What the launcher says to the hub.

    Attributes:
        run_dir: of the run, open and locked by the launcher.
        key_file: of the key that all islands share.
        bind: where to listen.
        resume_from: checkpoint of the run; None: it begins.
        facts: of the run, for its record.
    """

    run_dir: str
    key_file: str
    bind: str
    resume_from: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Leave it in `folder`."""
        write_atomically(folder / BRIEF, json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> HubBrief:
        """Read what was left in `folder`."""
        return cls(**json.loads((folder / BRIEF).read_text()))
