"""Documents from text, JSON Lines and Parquet files, one at a time, and where they came from."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import DataError

BUILTIN = "builtin"
PIECE_CHARACTERS = 1 << 20  # longer texts are divided at a line end, so that memory stays bounded
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_ALLOWED = (
    "'builtin', a prepared store, or files by path, glob or directory: text, .jsonl, .ndjson (also .gz, .zst), .parquet"
)
_TEST_DIRS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class InputFile:
    """One file to read.

    Attributes:
        name: what identifies it independent of where it lies (relative to the input that named it).
        kind: text, python, jsonl or parquet.
        named: the user named the file itself, so failing to read it is an error; else it was found by a search.
    """

    path: Path
    name: str
    kind: str
    compression: str | None = None
    named: bool = False


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        consumed: bytes of the input file that reading it took, for a progress bar.
    """

    text: str
    consumed: int


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """The files that paths, globs (`**` crosses directories), directories and `builtin` stand for, in a fixed order.

    Raises:
        DataError: an input matches nothing.
    """
    files: list[InputFile] = []
    for text in inputs:
        found = _builtin_files() if text == BUILTIN else _matching_files(text)
        if not found:
            raise DataError(
                "no data is found",
                got=f"{text} (looked for in {Path.cwd()})",
                allowed=_ALLOWED,
                fix="check the path; quote a glob so that the shell leaves it alone",
            )
        files.extend(found)
    unique = {file.path.resolve(): file for file in reversed(files)}
    return [file for file in files if unique[file.path.resolve()] is file]


def read_documents(file: InputFile, text_field: str = "text") -> Iterator[Document]:
    """The documents of a file in order; empty ones are left out.

    Raises:
        DataError: the file cannot be read or decoded, or a row is not as it should be; names the file and the line.
        UnreadableFile: a file that a search found is not text.
    """
    readers = {"text": _read_text, "python": _read_python, "jsonl": _read_jsonl, "parquet": _read_parquet}
    try:
        for document in readers[file.kind](file, text_field):
            if document.text:
                yield document
    except OSError as error:
        raise DataError(
            f"the input cannot be read: {file.path}",
            got=error.strerror or str(error),
            fix="check that the file is complete and may be read",
        ) from error


class UnreadableFile(Exception):
    """A file that a search found is not text: it is left out, and counted."""


def _builtin_files() -> list[InputFile]:
    """The sources of the Python standard library, without its tests: text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[InputFile] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _TEST_DIRS and not name.startswith("config-"))
        # _sysconfigdata describes the build, not the language.
        paths = [Path(folder, n) for n in sorted(names) if n.endswith(".py") and not n.startswith("_sysconfigdata")]
        files.extend(InputFile(path, path.relative_to(root).as_posix(), "python") for path in paths)
    return files


def _matching_files(text: str) -> list[InputFile]:
    path = Path(text).expanduser()
    if path.is_file():
        return [_classify(path, path.name, named=True)]
    if path.is_dir():
        return _files_below(path)
    files: list[InputFile] = []
    for match in sorted(glob.glob(str(path), recursive=True)):
        found = Path(match)
        if found.is_file():
            files.append(_classify(found, match))
        elif not text.endswith("**") and found.is_dir():
            files.extend(_files_below(found))
    return files


def _files_below(root: Path) -> list[InputFile]:
    files: list[InputFile] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        paths = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        files.extend(_classify(path, path.relative_to(root).as_posix()) for path in paths if path.is_file())
    return files


def _classify(path: Path, name: str, named: bool = False) -> InputFile:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    kind = _KINDS.get(suffixes[-1], "text") if suffixes else "text"
    return InputFile(path, name, kind, compression, named)


def _open(file: InputFile) -> tuple[Any, IO[bytes]]:
    """The stream of content, and the file underneath, whose position tells how far the reading has come."""
    raw = open(file.path, "rb")  # noqa: SIM115
    if file.compression == "gzip":
        return gzip.GzipFile(fileobj=raw), raw
    if file.compression == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20), raw
    return raw, raw


def _read_text(file: InputFile, _: str) -> Iterator[Document]:
    stream, raw = _open(file)
    with raw, stream:
        yield from _pieces(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), raw, file)


def _read_python(file: InputFile, _: str) -> Iterator[Document]:
    """Python sources in the encoding that they declare."""
    with open(file.path, "rb") as raw:
        try:
            encoding, _lines = tokenize.detect_encoding(raw.readline)
        except SyntaxError as error:
            raise UnreadableFile(str(file.path)) from error
        raw.seek(0)
        yield from _pieces(io.TextIOWrapper(raw, encoding=encoding, newline=""), raw, file)


def _pieces(text: io.TextIOWrapper, raw: IO[bytes], file: InputFile) -> Iterator[Document]:
    before = 0
    try:
        while piece := text.read(PIECE_CHARACTERS):
            if len(piece) == PIECE_CHARACTERS:
                piece += text.readline(PIECE_CHARACTERS)
            if "\0" in piece and not file.named:
                raise UnreadableFile(str(file.path))
            now = raw.tell()
            yield Document(piece, now - before)
            before = now
    except UnicodeDecodeError as error:
        if not file.named:
            raise UnreadableFile(str(file.path)) from error
        raise DataError(
            f"the file is not text in UTF-8: {file.path}",
            got=f"byte 0x{error.object[error.start]:02x} ({error.reason})",
            fix="convert it (iconv -f <its encoding> -t utf-8), or leave it out",
        ) from error
    except EOFError as error:
        raise _truncated(file, str(error)) from error


def _read_jsonl(file: InputFile, text_field: str) -> Iterator[Document]:
    stream, raw = _open(file)
    before = 0
    with raw, stream:
        lines = iter(stream)
        number = 0
        while True:
            try:
                line = next(lines, None)
            except EOFError as error:
                raise _truncated(file, str(error)) from error
            if line is None:
                return
            number += 1
            # The position is that of the read-ahead buffer: it moves in steps, which a progress bar may.
            now = raw.tell() if file.compression else before + len(line)
            if line.strip():
                yield Document(_row_text(line, f"{file.path}:{number}", text_field), now - before)
                before = now


def _row_text(line: bytes, where: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        shown = line[:80].decode("utf-8", "replace").strip()
        raise DataError(
            f"the row is not JSON: {where}",
            got=shown,
            allowed="one JSON object per line",
            fix=f"mend the line ({error})",
        ) from error
    if isinstance(row, dict) and isinstance(row.get(text_field), str):
        return str(row[text_field])
    if isinstance(row, dict) and text_field in row:
        got, allowed = f"{text_field} of type {type(row[text_field]).__name__}", "text"
    elif isinstance(row, dict):
        got, allowed = f"fields {', '.join(row) or 'none'}", f"an object with the field '{text_field}'"
    else:
        got, allowed = f"a JSON {type(row).__name__}", f"an object with the field '{text_field}'"
    raise DataError(
        f"the row has no text in '{text_field}': {where}",
        got=got,
        allowed=allowed,
        fix="name the field: text_field=... (data.text_field in a run)",
    )


def _read_parquet(file: InputFile, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if text_field not in names or not _is_text(table.schema_arrow.field(text_field).type):
                types = ", ".join(f"{field.name} ({field.type})" for field in table.schema_arrow)
                raise DataError(
                    f"the table has no text column '{text_field}': {file.path}",
                    got=f"columns {types}",
                    allowed="a column of strings",
                    fix="name the column: text_field=... (data.text_field in a run)",
                )
            yield from _parquet_rows(table, file, text_field)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"this is not a Parquet file, or it is damaged: {file.path}", got=str(error)[:200]) from error


def _parquet_rows(table: Any, file: InputFile, text_field: str) -> Iterator[Document]:
    rows, number = max(1, table.metadata.num_rows), 0
    share = file.path.stat().st_size // rows
    for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
        for text in batch.column(0).to_pylist():
            number += 1
            if text is None:
                raise DataError(
                    f"the row has no text in '{text_field}': {file.path}, row {number}",
                    got="null",
                    allowed="text",
                    fix="drop rows without text before they are prepared",
                )
            yield Document(text, share)


def _is_text(kind: Any) -> bool:
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _truncated(file: InputFile, reason: str) -> DataError:
    return DataError(f"the compressed file ends early: {file.path}", got=reason, fix="fetch or write it again")
