"""Folders of MosaicML streaming (MDS): `index.json` and shards of samples with typed columns.

A shard is uint32 samples, uint32[samples + 1] offsets, the configuration as JSON, and the samples. A sample is a uint32
length for every column of variable size, then the columns. All integers are little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from orchestrator.data.formats.reading import MAX_ROW_BYTES, Input, Rows, SourcePosition, decoded, no_column, too_long
from orchestrator.data.formats.rows import TextSpec
from orchestrator.data.formats.streams import open_input
from orchestrator.errors import DataError

_COMPRESSIONS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2"}
_MAX_HEADER_BYTES = 1 << 28


def read_mds(item: Input, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield the samples of all shards in the order of the index, of which text, JSON and integers are taken.

    Args:
        item: the input.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    index = json.loads((item.path / "index.json").read_bytes())
    shards = item.files[:-1]
    for file, shard in zip(shards, index["shards"], strict=True):
        place.file, place.row = file, 0
        compression = _compression(shard, place)
        content, raw = open_input(Input(file, file.name, "mds", compression))
        share = file.stat().st_size // max(1, int(shard["samples"]))
        with raw, content:
            for sample in _samples(content, int(shard["samples"]), place):
                place.row += 1
                yield _row(sample, shard, spec, place), share


def _compression(shard: dict[str, Any], place: SourcePosition) -> str | None:
    name = shard.get("compression") if shard.get("zip_data") else None
    if name is None:
        return None
    found = _COMPRESSIONS.get(str(name).split(":")[0])
    if found is None:
        raise DataError(
            f"the shard is compressed in a way that is not read: {place.file}",
            got=name,
            allowed=", ".join(_COMPRESSIONS),
            fix="write the data set with compression=None or 'zstd'",
        )
    return found


def _samples(content: Any, wanted: int, place: SourcePosition) -> Iterator[bytes]:
    (count,) = struct.unpack("<I", _exactly(content, 4))
    if count != wanted or 4 * count > _MAX_HEADER_BYTES:
        raise DataError(
            f"the shard is damaged: {place.file}", got=f"{count:,} samples", allowed=f"{wanted:,}, by index.json"
        )
    offsets = struct.unpack(f"<{count + 1}I", _exactly(content, 4 * (count + 1)))
    _exactly(content, offsets[0] - 4 * (count + 2))
    for start, stop in pairwise(offsets):
        if stop - start > MAX_ROW_BYTES:
            too_long(place, "sample")
        yield _exactly(content, stop - start)


def _row(sample: bytes, shard: dict[str, Any], spec: TextSpec, place: SourcePosition) -> dict[str, Any]:
    sizes = shard["column_sizes"]
    variable = sum(size is None for size in sizes)
    lengths = iter(struct.unpack_from(f"<{variable}I", sample))
    at, row = 4 * variable, {}
    for name, encoding, size in zip(shard["column_names"], shard["column_encodings"], sizes, strict=True):
        length = next(lengths) if size is None else size
        data, at = sample[at : at + length], at + length
        if encoding == "str":
            row[name] = decoded(data, place)
        elif encoding == "json":
            row[name] = json.loads(data)
        elif encoding == "int":
            (row[name],) = struct.unpack("<q", data)
    if at != len(sample):
        raise DataError(f"the sample is damaged: {place}", got=f"{len(sample):,} bytes", allowed=f"{at:,}")
    for field in spec.columns(list(row)):
        if field not in row and field.split(".")[0] not in row:
            columns = zip(shard["column_names"], shard["column_encodings"], strict=True)
            no_column(place.file.parent, field, ", ".join(f"{name} ({encoding})" for name, encoding in columns))
    return row


def _exactly(content: Any, length: int) -> bytes:
    """`length` bytes; a stream that ends before is an EOFError."""
    data: bytes = content.read(length) if length >= 0 else b""
    if len(data) != length:
        raise EOFError("the shard is shorter than its offsets say")
    return data
