"""Types shared by the readers of all formats: an input, a position in it, and what was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from orchestrator.data.formats.rows import TextSpec
from orchestrator.errors import DataError

MAX_ROW_BYTES = 64 << 20  # of one line, JSON object or cell: what reads a row holds all of it in memory


@dataclass(frozen=True)
class Input:
    """One file to read, or several files that are one data set.

    Attributes:
        path: the file, or the folder of the data set.
        name: what identifies it independent of where it lies (relative to the input that named it).
        format: name of a row of `registry.FORMATS`.
        compression: gzip, bz2, xz, zstd or lz4 around a single file.
        parts: files of the data set, in order; empty for a single file.
        files: what is read, in order; of a single file the file itself.
    """

    path: Path
    name: str
    format: str
    compression: str | None = None
    parts: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files to read, in order: its parts, or itself."""
        return self.parts or (self.path,)

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class LeftOut:
    """A file that a search found and that is not read.

    Attributes:
        name: its path, relative to the input that named it.
        reason: what it is, as a noun phrase ("dataset card"); what was left out is counted by it.
        detail: of this one ("it holds NUL bytes").
    """

    name: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason}{': ' if self.detail else ''}{self.detail})"


@dataclass
class SourcePosition:
    """A position in an input; readers advance it, and errors name it.

    Attributes:
        file: that is being read.
        row: number of the line or row, from 1; 0 before the first one.
        lines: rows are lines of a text file.
        byte: offset in the file, where rows are not what is counted.
    """

    file: Path
    row: int = 0
    lines: bool = False
    byte: int | None = None

    def __str__(self) -> str:
        if self.row:
            return f"{self.file}:{self.row}" if self.lines else f"{self.file}, row {self.row}"
        return f"{self.file}, byte {self.byte}" if self.byte is not None else str(self.file)


# The rows of an input, or its texts where it has no rows, each with the bytes of the input that reading it took.
Rows = Iterator[tuple[Mapping[str, Any] | str, int]]
# reader(input, spec, place): `spec` names the fields that are wanted of every row.
Reader = Callable[[Input, TextSpec, SourcePosition], Rows]


@dataclass(frozen=True)
class Format:
    """A kind of file or folder.

    Attributes:
        name: in `FORMATS`.
        title: for people.
        known_by: by what it is recognised, for people.
        holds: documents; tokens (made by other software with a tokenizer); or nothing that can be trained on.
        read: how; None for what is not read as documents.
        advice: what to do with what is not read.
    """

    name: str
    title: str
    known_by: str
    holds: Literal["documents", "tokens", "nothing"] = "documents"
    read: Reader | None = None
    advice: str = ""


def too_long(place: SourcePosition, what: str = "line") -> NoReturn:
    """Raise the error of a row that is too long to be read.

    Args:
        place: where the row begins.
        what: the row is, such as `line`.

    Raises:
        DataError: always.
    """
    raise DataError(
        f"the {what} is longer than {MAX_ROW_BYTES >> 20} MiB: {place}",
        got=f"more than {MAX_ROW_BYTES:,} bytes",
        allowed="rows that fit into memory several times over",
        fix="divide the document into several rows",
    )


def decoded(data: bytes, place: SourcePosition) -> str:
    """Decode the bytes of a row as UTF-8.

    Args:
        data: UTF-8 bytes.
        place: where reading is, for messages.

    Raises:
        DataError: they are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        not_utf8(str(place), error.object[error.start], error.start, error.reason)


def not_utf8(where: str, byte: int, at: int, reason: str) -> NoReturn:
    """Raise the error of a file that is not UTF-8.

    Args:
        where: the file, and the place in it, for the message.
        byte: the first wrong one, 0 to 255.
        at: its offset in bytes.
        reason: of the decoder.

    Raises:
        DataError: always.
    """
    raise DataError(
        f"the file is not text in UTF-8: {where}",
        got=f"byte 0x{byte:02x} at {at:,} ({reason})",
        fix="convert it (iconv -f <its encoding> -t utf-8), or leave it out",
    )


def no_column(path: Path, wanted: str, found: str) -> NoReturn:
    """Raise the error of a table without the wanted text column.

    Args:
        path: of the table.
        wanted: name of the column.
        found: the columns that there are, for the message.

    Raises:
        DataError: always.
    """
    raise DataError(
        f"the table has no text column '{wanted}': {path}",
        got=f"columns {found}",
        allowed="a column of text (a dot leads into a struct: text.content)",
        fix="name the column: text_field=... (data.text_field, or text_field of the source, in a run)",
    )
