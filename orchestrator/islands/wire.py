"""Messages as ZeroMQ carries them: a line about who asks, the message, and the frames of its parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.islands.island_messages import (
    ANSWERS,
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    REQUESTS,
    Answer,
    MessageError,
    Peer,
    Request,
    read,
    write,
)

_MAX_ABOUT = 1 << 12
LARGE = 1 << 16
"""Bytes from which on a frame is not copied."""
PREFERENCES: dict[str, int] = {
    "MAXMSGSIZE": MAX_FRAME_BYTES,
    "HEARTBEAT_IVL": 2000,
    "HEARTBEAT_TIMEOUT": 15000,
    "TCP_KEEPALIVE": 1,
    "LINGER": 0,
    "SNDHWM": 64,
    "RCVHWM": 64,
    "HANDSHAKE_IVL": 10000,
}
"""Options of both sockets. High-water marks count messages: what is under way is bounded by the links."""


@dataclass(frozen=True)
class Asked:
    """A request as it came.

    Attributes:
        peer: who asks.
        number: of the request.
        request: of the protocol; None: it was refused when it was read.
        frames: of its parts.
        problem: what is wrong with it.
    """

    peer: Peer
    number: int
    request: Request | None
    frames: list[Any]
    problem: MessageError | None = None


def about(peer: Peer, number: int) -> bytes:
    """Return the line about who asks.

    Args:
        peer: who it is.
        number: of the request.
    """
    return json.dumps([peer.island, peer.incarnation, peer.rank, number], separators=(",", ":")).encode()


def read_asked(frames: Sequence[Any]) -> Asked | None:
    """Read a request; None where it does not even say who asks.

    Args:
        frames: of the message, without ZeroMQ's own.
    """
    if len(frames) < 2 or len(frames) - 2 > MAX_FRAMES:
        return None
    line = bytes(frames[0])
    if len(line) > _MAX_ABOUT:
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or [type(one) for one in found] != [str, str, int, int]:
        return None
    island, incarnation, rank, number = found
    if len(island) > 256 or len(incarnation) > 256 or not 0 <= rank < 1 << 32 or not 0 <= number < 1 << 63:
        return None
    if not (island + incarnation).isascii():
        return None
    peer, parts = Peer(island, incarnation, rank), list(frames[2:])
    try:
        request = read(bytes(frames[1]), REQUESTS)
        check_frames(request, parts)
    except MessageError as error:
        return Asked(peer, number, None, [], error)
    return Asked(peer, number, request, parts)


def read_answer(frames: Sequence[Any]) -> tuple[int, Answer, list[Any]]:
    """Read an answer: its number, what it says, and its frames.

    Args:
        frames: of the message.

    Raises:
        MessageError: it is damaged.
    """
    if len(frames) < 2 or len(bytes(frames[0])) != 8:
        raise MessageError("an answer has no number")
    answer, parts = read(bytes(frames[1]), ANSWERS), list(frames[2:])
    check_frames(answer, parts)
    return int.from_bytes(bytes(frames[0]), "little"), answer, parts


def answer_frames(number: int, answer: Answer, frames: Sequence[Any]) -> list[Any]:
    """Return an answer as frames.

    Args:
        number: of the request.
        answer: to it.
        frames: of its parts.
    """
    return [number.to_bytes(8, "little"), write(answer), *frames]


def check_frames(message: Request | Answer, frames: Sequence[Any]) -> None:
    """Hold the frames of a message against the hashes that it says.

    Args:
        message: with or without `parts`.
        frames: of the message.

    Raises:
        MessageError: one was damaged on the way, or there are more or fewer.
    """
    parts = getattr(message, "parts", ())
    if len(parts) != len(frames):
        raise MessageError(
            "a message has another number of frames than parts", got=len(frames), allowed=str(len(parts))
        )
    for part, frame in zip(parts, frames, strict=True):
        if hashlib.sha256(frame).hexdigest() != part.hash:
            raise MessageError(f"a part of '{part.name}' was damaged on the way", got=f"{len(frame)} bytes")
