"""Folders of LitData whose items are tensors of ids.

Format: litdata/streaming/writer.py of litdata 0.2 (a chunk is a count, offsets, and the items).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.plain_files import read_bounded, regular_size
from orchestrator.data.tokens.token_reader import TokenRow
from orchestrator.errors import DataError

_MAX_INDEX_BYTES = 1 << 26
_TORCH = {11: "<u1", 12: "<i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
_NUMPY = {0: "<i1", 1: "<i2", 2: "<i4", 3: "<i8", 4: "<u1", 5: "<u2", 6: "<u4", 7: "<u8"}


def read(folder: Path) -> Iterator[TokenRow]:
    """Yield the items of a folder, by its index.json.

    Args:
        folder: of the data set.

    Raises:
        DataError: a file is damaged, compressed, or its items are no tensors of ids.
    """
    try:
        index = json.loads(read_bounded(folder / "index.json", _MAX_INDEX_BYTES))
        dtype = _dtype(folder, index["config"])
        headed = index["config"].get("item_loader") != "TokensLoader"
        for chunk in index["chunks"]:
            yield from _chunk(folder, chunk, dtype, headed)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(
            f"the LitData folder is damaged: {folder}",
            got=f"{type(error).__name__}: {error}"[:200],
            fix="fetch it again",
        ) from error


def _dtype(folder: Path, config: Mapping[str, Any]) -> np.dtype:
    formats = config["data_format"]
    kind, _, code = str(formats[0]).partition(":") if len(formats) == 1 else ("", "", "")
    table = {"no_header_tensor": _TORCH, "no_header_numpy": _NUMPY}.get(kind, {})
    found = table.get(int(code)) if code.isdecimal() else None
    if found is None or config.get("compression") or config.get("encryption"):
        raise DataError(
            f"the LitData folder does not hold plain tensors of ids: {folder}",
            got=f"format {formats}, compression {config.get('compression')}, encryption {config.get('encryption')}",
            allowed="one tensor of whole numbers per item, neither compressed nor encrypted",
            fix="write it again as one tensor of one dimension per item",
        )
    return np.dtype(found)


def _chunk(folder: Path, chunk: Mapping[str, Any], dtype: np.dtype, headed: bool) -> Iterator[TokenRow]:
    name, items = chunk["filename"], int(chunk["chunk_size"])
    if Path(name).name != name:
        raise ValueError(f"file name {name!r}")
    file = folder / name
    size, begin = regular_size(file, within=folder), 4 * (items + 2)
    if not 0 <= items < 1 << 32 or size < begin:
        raise ValueError(f"{size} bytes of {name}, {items} items")
    data = np.memmap(file, np.uint8, "r")
    head = np.frombuffer(data[:begin].tobytes(), "<u4").astype(np.int64)
    offsets = head[1:]
    if head[0] != items or offsets[0] != begin or offsets[-1] != size or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets of {name}")
    skip = 4 if headed else 0  # the size of the one tensor
    for number in range(items):
        low, high = int(offsets[number]), int(offsets[number + 1])
        yield TokenRow(np.frombuffer(data[low + skip : high].tobytes(), dtype), f"{file}, item {number:,}", high - low)
