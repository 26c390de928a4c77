"""Decompressed streams of files, and lines of bounded length."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from orchestrator.data.formats.reading import MAX_ROW_BYTES, Input, SourcePosition, too_long
from orchestrator.data.formats.zstd import check_frames

# compression -> how it begins, and the suffixes of its files
MAGIC: dict[str, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b",),
    "bz2": (b"BZh",),
    "xz": (b"\xfd7zXZ\x00",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))),
    "lz4": (b"\x04\x22\x4d\x18",),
}
SUFFIXES = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".tgz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".lz4": "lz4",
}


class Stream(NamedTuple):
    """A decompressed stream, and the file underneath, whose position is the progress."""

    content: Any
    raw: IO[bytes]


def compression_of(head: bytes) -> str | None:
    """Recognise the compression of a file by its first bytes; None if there is none.

    Args:
        head: first bytes of the file.
    """
    return next((name for name, magics in MAGIC.items() if head.startswith(magics)), None)


def open_stream(path: Path, compression: str | None) -> Stream:
    """Open a file for reading; close both parts of the result.

    Args:
        path: the file.
        compression: as `compression_of` gives it; None: none.

    Raises:
        OSError: it cannot be opened. What the decoder raises later is of its own kind.
    """
    raw = open(path, "rb")  # noqa: SIM115
    if compression == "gzip":
        import gzip

        return Stream(gzip.GzipFile(fileobj=raw), raw)
    if compression == "bz2":
        import bz2

        return Stream(bz2.BZ2File(raw), raw)
    if compression == "xz":
        import lzma

        return Stream(lzma.LZMAFile(raw), raw)
    if compression in ("zstd", "lz4"):
        import pyarrow

        return Stream(io.BufferedReader(pyarrow.CompressedInputStream(raw, compression), 1 << 20), raw)
    return Stream(raw, raw)


def open_input(item: Input) -> Stream:
    """Open an input that is one file, to read all of it; close both parts of the result.

    Args:
        item: the input.

    Raises:
        OSError: it cannot be opened.
        DataError: a zstd file is not whole, or cannot be decoded here.
    """
    if item.compression == "zstd":
        check_frames(item.path)
    return open_stream(item.path, item.compression)


def read_lines(item: Input, place: SourcePosition) -> Iterator[tuple[bytes, int]]:
    """Yield lines with their ends, and the number of bytes of the file that each took. A byte order mark is dropped.

    Args:
        item: the input.
        place: where reading is, for messages.

    Raises:
        DataError: a line is too long.
    """
    place.lines = True
    content, raw = open_input(item)
    before = 0
    with raw, content:
        while line := content.readline(MAX_ROW_BYTES + 1):
            place.row += 1
            if len(line) > MAX_ROW_BYTES:
                too_long(place)
            # The position of a compressed file is that of the read-ahead buffer: it moves in steps.
            now = raw.tell() if item.compression else before + len(line)
            yield line.removeprefix(b"\xef\xbb\xbf") if place.row == 1 else line, now - before
            before = now
