"""Folders of LitData: `index.json` and chunks of items.

A chunk is uint32 items, uint32[items + 1] offsets, and the items: a uint32 length for every leaf, then the leaves.
Newer versions (0.2.76) write rows of plain values as an Arrow file at the end of the chunk instead, with its length and
a mark behind it.
"""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

from orchestrator.data.formats.arrow import read_source
from orchestrator.data.formats.reading import MAX_ROW_BYTES, Input, Rows, SourcePosition, decoded, no_column, too_long
from orchestrator.data.formats.rows import TextSpec
from orchestrator.data.formats.streams import open_input
from orchestrator.errors import DataError

_MAX_CHUNK_BYTES = 1 << 30
_ARROW_MARK = b"LDARW01\x00"
_TEXT = ("str", "string")


def read_litdata(item: Input, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield the items of all chunks in the order of the index, of which text is taken.

    Args:
        item: the input.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    index = json.loads((item.path / "index.json").read_bytes())
    config = index["config"]
    compression = _check_config(config, item.path)
    for file, fact in zip(item.files[:-1], index["chunks"], strict=True):
        place.file, place.row = file, 0
        chunk, wanted = _content(file, compression, place), fact["chunk_size"]
        _check_count(struct.unpack_from("<I", chunk)[0], wanted, place)
        if chunk.endswith(_ARROW_MARK):
            yield from _arrow_rows(chunk, spec, place)
        else:
            yield from _items(chunk, config, spec, place)
        _check_count(place.row, wanted, place)


def _check_count(count: int, wanted: int, place: SourcePosition) -> None:
    if count != wanted:
        raise DataError(
            f"the chunk is damaged: {place.file}", got=f"{count:,} items", allowed=f"{wanted:,}, by index.json"
        )


def _check_config(config: dict[str, Any], path: Path) -> str | None:
    compression, level = config.get("compression"), config.get("compression_level")
    loader = config.get("item_loader", "PyTreeLoader")
    if config.get("encryption") or compression not in (None, "zstd") or level not in (None, "chunk"):
        got = (
            f"compression {compression} by {level or 'chunk'}, encryption {'on' if config.get('encryption') else 'off'}"
        )
        raise DataError(
            f"the data set is stored in a way that is not read: {path}",
            got=got,
            allowed="compression null, or zstd by chunk; no encryption",
            fix="optimize the data again without",
        )
    if loader != "PyTreeLoader":
        raise DataError(f"the data set holds no text: {path}", got=f"item_loader {loader}", allowed="PyTreeLoader")
    return compression


def _content(file: Path, compression: str | None, place: SourcePosition) -> bytes:
    content, raw = open_input(Input(file, file.name, "litdata", compression))
    with raw, content:
        data: bytes = content.read(_MAX_CHUNK_BYTES + 1)
    if len(data) > _MAX_CHUNK_BYTES:
        raise DataError(
            f"the chunk is larger than {_MAX_CHUNK_BYTES >> 30} GiB: {place.file}",
            fix="optimize the data with a smaller chunk_bytes",
        )
    return data


def _arrow_rows(chunk: bytes, spec: TextSpec, place: SourcePosition) -> Rows:
    import pyarrow

    end = len(chunk) - len(_ARROW_MARK) - 4
    (length,) = struct.unpack_from("<I", chunk, end)
    if length > end:
        raise EOFError("the Arrow file is longer than the chunk")
    source = pyarrow.BufferReader(memoryview(chunk)[end - length : end])
    yield from read_source(source, spec, place)


def _items(chunk: bytes, config: dict[str, Any], spec: TextSpec, place: SourcePosition) -> Rows:
    formats = [str(name) for name in config["data_format"]]
    names = _leaf_names(json.loads(config["data_spec"])[1])
    if len(names) != len(formats):
        raise DataError(f"the data set's metadata is damaged: {place.file.parent}", got="data_spec, data_format")
    is_text = names == [()] and formats[0] in _TEXT
    (count,) = struct.unpack_from("<I", chunk)
    offsets = struct.unpack_from(f"<{count + 1}I", chunk, 4)
    for start, stop in pairwise(offsets):
        place.row += 1
        if stop - start > MAX_ROW_BYTES:
            too_long(place, "item")
        if not start < stop <= len(chunk):
            raise EOFError("the chunk is shorter than its offsets say")
        leaves = _leaves(chunk[start:stop], formats, place)
        yield leaves[0] if is_text else _row(leaves, names, formats, spec, place), stop - start


def _leaves(item: bytes, formats: list[str], place: SourcePosition) -> list[Any]:
    sizes = struct.unpack_from(f"<{len(formats)}I", item)
    at, leaves = 4 * len(formats), []
    for size, kind in zip(sizes, formats, strict=True):
        data, at = item[at : at + size], at + size
        leaves.append(decoded(data, place) if kind in _TEXT else None)
    if at != len(item):
        raise DataError(f"the item is damaged: {place}", got=f"{len(item):,} bytes", allowed=f"{at:,}")
    return leaves


def _row(
    leaves: list[Any], names: list[tuple[str, ...]], formats: list[str], spec: TextSpec, place: SourcePosition
) -> Any:
    row = {".".join(name): leaf for name, leaf, kind in zip(names, leaves, formats, strict=True) if kind in _TEXT}
    for field in spec.fields:
        if field not in row:
            shown = (f"{'.'.join(name) or 'item'} ({kind})" for name, kind in zip(names, formats, strict=True))
            no_column(place.file.parent, field, ", ".join(shown))
    return row


def _leaf_names(node: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where the leaves of an item are, from the tree that PyTorch wrote as JSON: keys of dicts, numbers of lists."""
    children = node["children_spec"]
    if not children:
        return [above]
    keys = json.loads(node["context"]) if node["type"] == "builtins.dict" else list(range(len(children)))
    pairs = zip(keys, children, strict=True)
    return [name for key, child in pairs for name in _leaf_names(child, (*above, str(key)))]
