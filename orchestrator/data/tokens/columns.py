"""Columns of lists of ids in Parquet and Arrow files and in folders of `save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.tokens.token_reader import TokenRow, TokenSpec, integers
from orchestrator.errors import DataError

COLUMNS = ("input_ids", "tokens", "token_ids")


def choose_column(names: list[str], asked: str | None, where: str) -> str:
    """Choose the column that holds the ids.

    Args:
        names: of the columns of lists of integers.
        asked: the column that the user names.
        where: the place, for messages.

    Raises:
        DataError: there is none, or several and none is asked for.
    """
    if asked is not None and asked in names:
        return asked
    known = [name for name in COLUMNS if name in names] or (names if len(names) == 1 else [])
    if asked is None and known:
        return known[0]
    raise DataError(
        f"which column holds the token ids is not clear: {where}",
        got=f"columns of whole numbers: {', '.join(names) or 'none'}" + (f"; asked for {asked}" if asked else ""),
        allowed=f"{', '.join(COLUMNS)}, or the only one",
        fix="name it: data.tokens.column=...",
    )


def list_columns(schema: Any) -> list[str]:
    """List the names of the columns that are lists of integers.

    Args:
        schema: of pyarrow.
    """
    import pyarrow

    kinds = pyarrow.types
    return [
        field.name
        for field in schema
        if (kinds.is_list(field.type) or kinds.is_large_list(field.type) or kinds.is_fixed_size_list(field.type))
        and kinds.is_integer(field.type.value_type)
    ]


def read_parquet(files: tuple[Path, ...], spec: TokenSpec) -> Iterator[TokenRow]:
    """Yield the rows of Parquet files.

    Args:
        files: paths, in order.
        spec: how ids are to be read.

    Raises:
        DataError: a file is damaged, or has no such column.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    for file in files:
        try:
            with parquet.ParquetFile(file) as table:
                column = choose_column(list_columns(table.schema_arrow), spec.column, str(file))
                share = file.stat().st_size // max(1, table.metadata.num_rows)
                batches = table.iter_batches(batch_size=256, columns=[column])
                yield from _rows(batches, column, str(file), share)
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(file, error) from error


def read_arrow(files: tuple[Path, ...], spec: TokenSpec) -> Iterator[TokenRow]:
    """Yield the rows of Arrow files or streams, such as those of `datasets.save_to_disk`.

    Args:
        files: paths, in order.
        spec: how ids are to be read.

    Raises:
        DataError: a file is damaged, or has no such column.
    """
    import pyarrow

    for file in files:
        try:
            with pyarrow.memory_map(str(file)) as source:
                try:
                    opened = pyarrow.ipc.open_stream(source)
                    batches: Any = opened
                except pyarrow.ArrowInvalid:
                    opened = pyarrow.ipc.open_file(source)
                    batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
                column = choose_column(list_columns(opened.schema), spec.column, str(file))
                yield from _rows(batches, column, str(file), None)
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(file, error) from error


def _rows(batches: Any, column: str, where: str, share: int | None) -> Iterator[TokenRow]:
    number = 0
    for batch in batches:
        values = batch.column(batch.schema.get_field_index(column))
        for row in range(len(values)):
            number += 1
            place = f"{where}, row {number:,}"
            entry = values[row]
            if not entry.is_valid:
                yield TokenRow(np.zeros(0, np.int64), place, share or 0)
                continue
            if entry.values.null_count:
                raise DataError(f"the row has a null among its token ids: {place}", got="null", allowed="token ids")
            ids = integers(entry.values.to_numpy(zero_copy_only=False), place)
            yield TokenRow(ids, place, ids.nbytes if share is None else share)


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"the file is damaged, or cannot be read: {file}", got=str(error)[:200], fix="fetch it again")
