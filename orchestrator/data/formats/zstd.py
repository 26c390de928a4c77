"""Check the frames of a zstd file by their headers: pyarrow takes a truncated file for a whole one.

The layout is that of RFC 8878, section 3.1.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, NoReturn

from orchestrator.errors import DataError

MAX_WINDOW_BYTES = 1 << 27  # of the decoder, without being told otherwise
_MAGIC, _SKIPPABLE = 0xFD2FB528, 0x184D2A50
_DICTIONARY_ID_BYTES, _CONTENT_SIZE_BYTES = (0, 1, 2, 4), (0, 2, 4, 8)
_BLOCK_RUN, _BLOCK_RESERVED = 1, 3


def check_frames(path: Path) -> None:
    """Check that a file consists of whole zstd frames which can be decoded here. Reads headers only.

    Args:
        path: the file.

    Raises:
        DataError: it ends early, is damaged, has a window that is too large or needs a dictionary; names the byte.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while file.tell() < size:
            start = file.tell()
            magic = _number(file, 4, path)
            if magic & ~0xF == _SKIPPABLE:
                _skip(file, _number(file, 4, path), size, path)
            elif magic == _MAGIC:
                _frame(file, size, path)
            else:
                raise DataError(
                    f"the zstd file is damaged: {path}, byte {start:,}",
                    got=f"0x{magic:08x} where a frame begins",
                    fix="fetch or write it again",
                )


def _frame(file: IO[bytes], size: int, path: Path) -> None:
    descriptor = _number(file, 1, path)
    single_segment, has_checksum = bool(descriptor & 0x20), bool(descriptor & 0x04)
    window = 0
    if not single_segment:
        byte = _number(file, 1, path)
        base = 1 << (10 + (byte >> 3))
        window = base + base // 8 * (byte & 7)
    if _number(file, _DICTIONARY_ID_BYTES[descriptor & 3], path):
        raise DataError(f"the zstd file needs a dictionary: {path}", fix="decompress it with its dictionary (zstd -D)")
    content_bytes = _CONTENT_SIZE_BYTES[descriptor >> 6] or int(single_segment)
    content = _number(file, content_bytes, path) + (256 if content_bytes == 2 else 0)
    if (window or content) > MAX_WINDOW_BYTES:
        _too_wide(path, window or content)
    last = False
    while not last:
        at = file.tell()
        header = _number(file, 3, path)
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        if kind == _BLOCK_RESERVED:
            raise DataError(f"the zstd file is damaged: {path}, byte {at:,}", fix="fetch or write it again")
        _skip(file, 1 if kind == _BLOCK_RUN else length, size, path)
    _skip(file, 4 * has_checksum, size, path)


def _number(file: IO[bytes], length: int, path: Path) -> int:
    data = file.read(length)
    if len(data) < length:
        _ends_early(path, file.tell())
    return int.from_bytes(data, "little")


def _skip(file: IO[bytes], length: int, size: int, path: Path) -> None:
    if file.seek(length, os.SEEK_CUR) > size:
        _ends_early(path, size)


def _ends_early(path: Path, size: int) -> NoReturn:
    raise DataError(
        f"the compressed file ends early: {path}, byte {size:,}",
        got="a zstd frame that is not complete",
        fix="fetch or write it again",
    )


def _too_wide(path: Path, window: int) -> NoReturn:
    raise DataError(
        f"the zstd file was compressed with a window that is not decoded here: {path}",
        got=f"a window of {window >> 20:,} MiB",
        allowed=f"up to {MAX_WINDOW_BYTES >> 20} MiB (zstd without --long, or --long=27)",
        fix=f"compress it again: zstd -d --long=31 --stdout {path} | zstd -o NEW.zst",
    )
