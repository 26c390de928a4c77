"""Messages as ZeroMQ carries them: a line about who asks, the message, and the frames of its parts, in one piece.

One piece, since libzmq 4.3 can end the process where a connection breaks in the middle of a message of several frames
while the socket that sends it closes (its issue 3442): an island would die with its hub.
"""

from __future__ import annotations

import json
import struct
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
from orchestrator.islands.part_frames import frame_hash

_MAX_ABOUT = 1 << 12
_ALIGNED = 16  # bytes: numbers are read where they lie
LARGE = 1 << 16
"""Bytes from which on a message is not copied."""
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


def pack(frames: Sequence[Any]) -> bytes:
    """Return frames as one piece: their number and lengths, then each from a multiple of 16 bytes on.

    Args:
        frames: bytes, or what has a buffer.
    """
    lengths = [memoryview(frame).nbytes for frame in frames]
    pieces: list[Any] = [struct.pack(f"<{len(lengths) + 1}I", len(lengths), *lengths)]
    for before, frame in zip([len(pieces[0]), *lengths], frames, strict=False):
        pieces += [bytes(-before % _ALIGNED), frame]
    return b"".join(pieces)


def unpack(message: Any) -> list[memoryview]:
    """Return the frames of a message, where they lie.

    Args:
        message: what `pack` made, or anything.

    Raises:
        MessageError: it is none.
    """
    view = memoryview(message)
    count = int.from_bytes(view[:4], "little")
    if len(view) < 4 or count > MAX_FRAMES + 2 or len(view) < 4 * (count + 1):
        raise MessageError("a message does not have the frames that it says", got=f"{len(view)} bytes")
    at, frames = 4 * (count + 1), []
    for length in struct.unpack_from(f"<{count}I", view, 4):
        at += -at % _ALIGNED
        frames.append(view[at : at + length])
        at += length
    if at != len(view):
        raise MessageError("a message has another length than its frames", got=len(view), allowed=str(at))
    return frames


def about(peer: Peer, number: int) -> bytes:
    """Return the line about who asks.

    Args:
        peer: who it is.
        number: of the request.
    """
    return json.dumps([peer.island, peer.incarnation, peer.rank, number], separators=(",", ":")).encode()


def read_asked(message: Any) -> Asked | None:
    """Read a request; None where it does not even say who asks.

    Args:
        message: as it came.
    """
    try:
        frames = unpack(message)
        if len(frames) < 2 or len(frames[0]) > _MAX_ABOUT:
            return None
        found = json.loads(bytes(frames[0]))
    except (ValueError, RecursionError, MessageError):
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


def read_answer(message: Any) -> tuple[int, Answer, list[Any]]:
    """Read an answer: its number, what it says, and its frames.

    Args:
        message: as it came.

    Raises:
        MessageError: it is damaged.
    """
    frames = unpack(message)
    if len(frames) < 2 or len(bytes(frames[0])) != 8:
        raise MessageError("an answer has no number")
    answer, parts = read(bytes(frames[1]), ANSWERS), list(frames[2:])
    check_frames(answer, parts)
    return int.from_bytes(bytes(frames[0]), "little"), answer, parts


def write_answer(number: int, answer: Answer, frames: Sequence[Any]) -> bytes:
    """Return an answer as it is sent.

    Args:
        number: of the request.
        answer: to it.
        frames: of its parts.
    """
    return pack([number.to_bytes(8, "little"), write(answer), *frames])


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
        if frame_hash(frame) != part.hash:
            raise MessageError(f"a part of '{part.name}' was damaged on the way", got=f"{len(frame)} bytes")
