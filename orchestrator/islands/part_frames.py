"""Headers of tensor parts on the way."""

from __future__ import annotations

from typing import Any

from orchestrator.checkpoint.hashing import hash_of
from orchestrator.islands.boxes import Box
from orchestrator.islands.island_messages import PartHeader


def frame_hash(frame: Any) -> str:
    """Return the BLAKE3 of a frame, in hex: SHA-256 would take several times as long, at four places of an exchange.

    Args:
        frame: bytes, or what has a buffer.
    """
    return hash_of("blake3", frame)


def part_header(box: Box, frame: Any, version: int = 0) -> PartHeader:
    """Return the header of a part, with the hash of its frame.

    Args:
        box: the part.
        frame: its bytes.
        version: of the outer weights that it makes, where it is part of an update.
    """
    return PartHeader(box.name, box.start, box.stop, frame_hash(frame), version)
