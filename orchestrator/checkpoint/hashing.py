"""Hashing of files in pieces, so that damage is located and hashes are computed in parallel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import MissingExtraError


@dataclass(frozen=True)
class Piece:
    """A range of a file and the hash of its content.

    Attributes:
        bytes: its size.
        hash: in hex.
    """

    bytes: int
    hash: str


@dataclass(frozen=True)
class StoredFile:
    """The size of a file, and the hashes of its pieces.

    Attributes:
        bytes: its size.
        pieces: in order.
        sha256: of the whole file, in hex; empty where it was not asked for. No part of the manifest.
    """

    bytes: int
    pieces: tuple[Piece, ...]
    sha256: str = ""

    def ranges(self) -> Iterator[tuple[int, Piece]]:
        """Each piece with the offset where it begins."""
        offset = 0
        for piece in self.pieces:
            yield offset, piece
            offset += piece.bytes


def new_hash(name: str) -> Any:
    """Return an object as those of hashlib, of 32 bytes.

    Args:
        name: `sha256`, or `blake3`, which takes a fraction of the time.

    Raises:
        MissingExtraError: its library is not installed.
    """
    if name == "sha256":
        return hashlib.sha256()
    try:
        from blake3 import blake3
    except ImportError:
        raise MissingExtraError("blake3", "blake3", "a checkpoint with BLAKE3 hashes") from None
    return blake3()


def hash_of(name: str, content: bytes | memoryview) -> str:
    """Return the hash of `content`, in hex; `name` as for `new_hash`."""
    digest = new_hash(name)
    digest.update(content)
    return str(digest.hexdigest())
