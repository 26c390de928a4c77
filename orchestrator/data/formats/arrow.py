"""Tables of Apache Arrow: Parquet, Arrow files and streams, and folders of `datasets.save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.data.formats.reading import Input, Rows, SourcePosition, no_column, not_utf8
from orchestrator.data.formats.rows import TextSpec

_BATCH_BYTES = 32 << 20
_BATCH_ROWS = 1024


def read_parquet(item: Input, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield the rows of a Parquet file, of which only the wanted columns are read.

    Args:
        item: the input.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    import pyarrow.parquet as parquet

    size = item.size_bytes
    with parquet.ParquetFile(item.path) as table:
        paths = [
            _column(table.schema_arrow, column, spec, item.path) for column in spec.columns(table.schema_arrow.names)
        ]
        rows = max(1, table.metadata.num_rows)
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
        row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))
        for batch in table.iter_batches(batch_size=batch_rows, columns=paths):
            yield from _rows(batch, place, size // rows)


def read_arrow(item: Input, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield the rows of one or several Arrow files or streams in order.

    Args:
        item: the input.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    import pyarrow

    for file in item.files:
        place.file, place.row = file, 0
        with pyarrow.memory_map(str(file)) as source:
            yield from read_source(source, spec, place)


def read_source(source: Any, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield the rows of an open Arrow file or stream, of which only the wanted columns are taken.

    Args:
        source: a reader of pyarrow.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    schema, batches = _batches(source)
    wanted = [_column(schema, column, spec, place.file) for column in spec.columns(schema.names)]
    roots = list(dict.fromkeys(column if column in schema.names else column.split(".")[0] for column in wanted))
    for batch in batches:
        share = batch.nbytes // max(1, batch.num_rows)
        step = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, share)))
        picked = batch.select(roots)
        for start in range(0, picked.num_rows, step):
            yield from _rows(picked.slice(start, step), place, share)


def _batches(source: Any) -> tuple[Any, Iterator[Any]]:
    import pyarrow

    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(source)
        return reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
    reader = pyarrow.ipc.open_stream(source)
    return reader.schema, iter(reader)


def _rows(batch: Any, place: SourcePosition, share: int) -> Rows:
    rows: list[Mapping[str, Any]]
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        _name_the_damage(batch, place)
        raise
    for row in rows:
        place.row += 1
        yield row, share


def _name_the_damage(batch: Any, place: SourcePosition) -> None:
    """Raise an error that names the row that cannot be decoded."""
    for number in range(batch.num_rows):
        try:
            batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            place.row += number + 1
            not_utf8(str(place), error.object[error.start], error.start, error.reason)


def _column(schema: Any, wanted: str, spec: TextSpec, path: Path) -> str:
    """Return the column of text that `wanted` names: one of that very name, else a field of nested structs."""
    import pyarrow

    found = schema.field(wanted).type if wanted in schema.names else None
    if found is None:
        head, *rest = wanted.split(".")
        found = schema.field(head).type if head in schema.names else None
        for name in rest:
            if found is not None:
                inside = pyarrow.types.is_struct(found) and found.get_field_index(name) >= 0
                found = found.field(name).type if inside else None
    if found is None or not _is_readable(found, with_numbers=spec.template is not None):
        no_column(path, wanted, ", ".join(f"{field.name} ({field.type})" for field in schema)[:1000])
    return wanted


def _is_readable(kind: Any, with_numbers: bool) -> bool:
    """Text, lists of structs (messages), and numbers that a template may take."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    listed = (types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type)
    number = with_numbers and (types.is_integer(kind) or types.is_floating(kind))
    return bool(text or listed or number or types.is_null(kind))
