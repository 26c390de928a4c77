"""Token columns of MosaicML's MDS folders.

Format: streaming/base/format/mds of mosaicml-streaming 0.13 (version 2 of the index). Columns of pickles are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.plain_files import read_bounded, regular_size
from orchestrator.data.tokens.columns import choose_column
from orchestrator.data.tokens.token_reader import TokenRow, TokenSpec, integers
from orchestrator.errors import DataError

_MAX_INDEX_BYTES = 1 << 26
_FIXED = {"int": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "int8": 1, "int16": 2, "int32": 4, "int64": 8}
_FIXED |= {"float16": 2, "float32": 4, "float64": 8}
_ARRAY_CODES = {8: "u1", 9: "i1", 16: "u2", 17: "i2", 32: "u4", 33: "i4", 64: "u8", 65: "i8"}
_NAMES = {"uint8": "u1", "int8": "i1", "uint16": "u2", "int16": "i2", "uint32": "u4", "int32": "i4"}
_NAMES |= {"uint64": "u8", "int64": "i8"}


def read(folder: Path, spec: TokenSpec) -> Iterator[TokenRow]:
    """Yield the samples of a folder, by its index.json. A column of plain bytes needs `spec.dtype`.

    Args:
        folder: of the data set.
        spec: how ids are to be read.

    Raises:
        DataError: a file is damaged, compressed, or the column holds something else.
    """
    index_file = folder / "index.json"
    try:
        shards = json.loads(read_bounded(index_file, _MAX_INDEX_BYTES))["shards"]
        for shard in shards:
            yield from _shard(folder, shard, spec)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(
            f"the MDS folder is damaged: {folder}", got=f"{type(error).__name__}: {error}"[:200], fix="fetch it again"
        ) from error


def _shard(folder: Path, shard: Mapping[str, Any], spec: TokenSpec) -> Iterator[TokenRow]:
    names, encodings = list(shard["column_names"]), list(shard["column_encodings"])
    if shard.get("compression") or shard.get("zip_data"):
        raise DataError(
            f"the MDS folder is compressed: {folder}",
            got=str(shard.get("compression")),
            allowed="shards without compression",
            fix="write it again with compression=None",
        )
    arrays = [n for n, kind in zip(names, encodings, strict=True) if kind.startswith("ndarray") or kind == "bytes"]
    column = names.index(choose_column(arrays, spec.column, str(folder)))
    basename = shard["raw_data"]["basename"]
    if Path(basename).name != basename:
        raise ValueError(f"file name {basename!r}")
    file = folder / basename
    size, samples = regular_size(file, within=folder), int(shard["samples"])
    if size != shard["raw_data"]["bytes"] or not 0 <= samples < 1 << 32 or size < 4 * (samples + 2):
        raise ValueError(f"{size} bytes of {basename}, {samples} samples")
    data = np.memmap(file, np.uint8, "r")
    offsets = np.frombuffer(data[4 : 4 * (samples + 2)].tobytes(), "<u4").astype(np.int64)
    if offsets[-1] > size or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets of {basename}")
    for number in range(samples):
        low, high = int(offsets[number]), int(offsets[number + 1])
        where = f"{file}, sample {number:,}"
        yield TokenRow(_ids(data[low:high].tobytes(), encodings, column, spec, where), where, high - low)


def _ids(sample: bytes, encodings: list[str], column: int, spec: TokenSpec, where: str) -> np.ndarray:
    sizes, at = [], 0
    for kind in encodings:
        if (fixed := _fixed_size(kind)) is not None:
            sizes.append(fixed)
        else:
            sizes.append(int.from_bytes(sample[at : at + 4], "little"))
            at += 4
    at += sum(sizes[:column])
    value = sample[at : at + sizes[column]]
    if len(value) != sizes[column]:
        raise ValueError(f"{where} ends early")
    if encodings[column] == "bytes":
        if spec.dtype is None:
            raise DataError(
                f"the column of bytes does not say what ids it holds: {where}",
                got="encoding bytes",
                allowed="data.tokens.dtype: uint16, uint32, int32 or int64",
                fix="set data.tokens.dtype to the type that they were written with",
            )
        return np.frombuffer(value, spec.raw_dtype)
    return integers(_array(value, encodings[column]), where)


def _fixed_size(kind: str) -> int | None:
    name, _, shape = kind.removeprefix("ndarray:").partition(":")
    if kind.startswith("ndarray:") and shape and name in _FIXED:
        return _FIXED[name] * int(np.prod([int(dim) for dim in shape.split(",")], dtype=object))
    return _FIXED.get(kind)


def _array(value: bytes, kind: str) -> np.ndarray:
    name, _, shape = kind.removeprefix("ndarray").removeprefix(":").partition(":")
    at = 0
    if not name:
        dtype, at = _ARRAY_CODES[value[0]], 1
    else:
        dtype = _NAMES[name]
    if not shape:
        dims, width = value[at] >> 2, 1 << (value[at] & 3)
        if dims != 1:
            raise ValueError(f"an array of {dims} dimensions")
        at += 1 + dims * width
    return np.frombuffer(value[at:], f"<{dtype}")
