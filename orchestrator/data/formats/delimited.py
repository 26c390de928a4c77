"""CSV and TSV with a header: RFC 4180, comma or tab, cells in double quotes, a quote within them doubled, UTF-8."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from orchestrator.data.formats.reading import MAX_ROW_BYTES, Input, Rows, SourcePosition, decoded, no_column, too_long
from orchestrator.data.formats.rows import TextSpec
from orchestrator.data.formats.streams import read_lines
from orchestrator.errors import DataError


def read_csv(item: Input, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield comma-separated rows; the first line names the columns.

    Args:
        item: the input.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    return _rows(item, spec, place, ",")


def read_tsv(item: Input, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield tab-separated rows; the first line names the columns.

    Args:
        item: the input.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    return _rows(item, spec, place, "\t")


class _Lines:
    """The lines of one row after the other, as text; counts the bytes that they took."""

    def __init__(self, item: Input):
        self._place = SourcePosition(item.path)
        self._source = read_lines(item, self._place)
        self.first_line, self.consumed, self._row_bytes = 1, 0, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line, consumed = next(self._source)
        self.consumed += consumed
        self._row_bytes += len(line)
        if self._row_bytes > MAX_ROW_BYTES:
            self._place.row = self.first_line
            too_long(self._place, "row (is a quote not closed?)")
        return decoded(line, self._place)

    def begin_row(self) -> None:
        self.first_line, self.consumed, self._row_bytes = self._place.row + 1, 0, 0


def _rows(item: Input, spec: TextSpec, place: SourcePosition, delimiter: str) -> Rows:
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _Lines(item)
    place.lines, place.row = True, 1
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(table, [])
        for column in spec.columns(header):
            if header.count(column) != 1:
                no_column(item.path, column, ", ".join(header)[:300] or "none: the first line names them")
        lines.begin_row()
        for cells in table:
            place.row = lines.first_line
            if cells:
                yield _row(header, cells, place), lines.consumed
            lines.begin_row()
    except csv.Error as error:
        place.row = lines.first_line
        raise DataError(
            f"the row is not {'CSV' if delimiter == ',' else 'TSV'}: {place}",
            got=str(error),
            allowed="cells in double quotes where they hold the separator, a quote or a line end; quotes doubled",
            fix="write the file again with quotes doubled (not escaped by a backslash), or as JSON Lines",
        ) from error


def _row(header: list[str], cells: list[str], place: SourcePosition) -> dict[str, str]:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    raise DataError(
        f"the row has another number of cells than the header: {place}",
        got=f"{len(cells)} cells",
        allowed=f"{len(header)}: {', '.join(header)[:200]}",
        fix="quote cells that hold the separator, a quote or a line end, and double quotes within them",
    )
