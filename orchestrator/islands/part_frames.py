"""Headers of tensor parts on the way."""

from __future__ import annotations

import hashlib
from typing import Any

from orchestrator.islands.boxes import Box
from orchestrator.islands.island_messages import PartHeader


def part_header(box: Box, frame: Any, version: int = 0) -> PartHeader:
    """Return the header of a part, with the hash of its frame.

    Args:
        box: the part.
        frame: its bytes.
        version: of the outer weights that it makes, where it is part of an update.
    """
    return PartHeader(box.name, box.start, box.stop, hashlib.sha256(frame).hexdigest(), version)
