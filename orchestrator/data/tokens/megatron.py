"""Megatron's indexed data sets: NAME.idx says where the sequences of NAME.bin lie and which are one document.

Formats: megatron/core/datasets/indexed_dataset.py of Megatron-LM (MMIDIDX, version 1; GPT-NeoX adds codes 9 and 10),
and the older fairseq kind of it (TNTIDX, version 1).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.data.plain_files import regular_size
from orchestrator.data.tokens.token_reader import TokenRow, map_ids
from orchestrator.errors import DataError

MAPPED, OLDER = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}


@dataclass(frozen=True)
class _Index:
    dtype: np.dtype
    sizes: np.ndarray  # tokens of each sequence
    documents: np.ndarray  # number of the first sequence of each document, and the end


def read(files: tuple[Path, ...]) -> Iterator[TokenRow]:
    """Yield the documents of a .bin by the .idx beside it; `files` are both, in any order.

    Raises:
        DataError: one of the files is damaged, or of a kind that holds more than tokens.
    """
    index_file = next(file for file in files if file.suffix == ".idx")
    content = index_file.with_suffix(".bin")
    index = _read_index(index_file)
    ids = map_ids(content, index.dtype, count=int(index.sizes.sum()))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(index.sizes, dtype=np.int64)])
    bounds = starts[index.documents]
    for number in range(bounds.size - 1):
        low, high = int(bounds[number]), int(bounds[number + 1])
        yield TokenRow(ids[low:high], f"{content}, document {number:,}", (high - low) * ids.itemsize)


def _read_index(file: Path) -> _Index:
    size = regular_size(file)
    data = np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8)
    magic = data[:9].tobytes()
    try:
        if magic == MAPPED:
            return _mapped(file, data)
        if magic[:8] == OLDER:
            return _older(file, data)
    except (struct.error, ValueError) as error:
        raise _damaged(file, f"{size:,} bytes ({error})") from error
    raise _damaged(file, f"it begins with {magic!r}")


def _mapped(file: Path, data: np.ndarray) -> _Index:
    version, code, sequences, documents = struct.unpack("<QBQQ", data[9:34].tobytes())
    _check_head(file, version, code)
    at = 34
    sizes, at = _take(data, "<i4", sequences, at)
    pointers, at = _take(data, "<i8", sequences, at)
    bounds, at = _take(data, "<i8", documents, at)
    left, dtype = data.size - at, np.dtype(_DTYPES[code])
    if left not in (0, sequences) or (left and data[at:].any()):
        raise DataError(
            f"the index has more than tokens: {file}",
            got=f"{left:,} bytes of modes: a data set of several modalities",
            allowed="text",
        )
    return _checked(file, dtype, sizes, pointers, bounds, dtype.itemsize)


def _older(file: Path, data: np.ndarray) -> _Index:
    version, code, width, count, sequences, documents = struct.unpack("<QQQQQQ", data[8:56].tobytes())
    _check_head(file, version, code)
    if width != np.dtype(_DTYPES[code]).itemsize or count != sequences:
        raise _damaged(file, f"elements of {width} bytes, {count} entries of {sequences} sequences")
    _, at = _take(data, "<i8", count + 1, 56)
    pointers, at = _take(data, "<i8", count + 1, at)
    sizes, at = _take(data, "<i8", sequences, at)
    bounds, at = _take(data, "<i8", documents, at)
    return _checked(file, np.dtype(_DTYPES[code]), sizes, pointers[:-1], bounds, 1)


def _check_head(file: Path, version: int, code: int) -> None:
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"the index is of a kind that is not read: {file}",
            got=f"version {version}, dtype code {code}",
            allowed=f"version 1, codes of whole numbers: {', '.join(map(str, _DTYPES))}",
        )


def _take(data: np.ndarray, dtype: str, count: int, at: int) -> tuple[np.ndarray, int]:
    end = at + count * np.dtype(dtype).itemsize
    if end > data.size:
        raise ValueError(f"{count} entries end at byte {end}")
    return np.frombuffer(data[at:end].tobytes(), dtype), end


def _checked(
    file: Path, dtype: np.dtype, sizes: np.ndarray, pointers: np.ndarray, bounds: np.ndarray, unit: int
) -> _Index:
    expected = (np.cumsum(sizes, dtype=np.int64) - sizes) * unit
    if sizes.size and (sizes.min() < 0 or (pointers != expected).any()):
        raise _damaged(file, "sequences that do not follow each other")
    if bounds.size < 2:  # a writer that never ended a document: each sequence is one
        bounds = np.arange(sizes.size + 1)
    if bounds[0] != 0 or bounds[-1] != sizes.size or (np.diff(bounds) < 0).any():
        raise _damaged(file, "documents that do not cover the sequences")
    return _Index(dtype, sizes, bounds)


def _damaged(file: Path, got: str) -> DataError:
    return DataError(
        f"this is no index of Megatron's, or it is damaged: {file}",
        got=got,
        allowed=f"a file that begins with {MAPPED!r} or {OLDER!r}",
        fix="fetch it again, with the .bin of the same name",
    )
