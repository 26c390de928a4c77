"""Plain text, Markdown and code: a file is a document; a long one is divided at line ends."""

from __future__ import annotations

import codecs
import io
import tokenize

from orchestrator.data.formats.reading import Input, Rows, SourcePosition, not_utf8
from orchestrator.data.formats.rows import TextSpec
from orchestrator.data.formats.streams import Stream, open_input, open_stream
from orchestrator.errors import DataError

PIECE_CHARACTERS = 1 << 20  # longer texts are divided at a line end, so that memory stays bounded


def read(item: Input, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield a file of UTF-8 text, with or without a byte order mark, as one row.

    Args:
        item: the input.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    try:
        yield from _pieces(open_input(item), "utf-8-sig", place)
    except UnicodeDecodeError:
        _name_the_damage(open_input(item), place)
        raise


def read_python(item: Input, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield a Python source, in the encoding that it declares, as one row.

    Args:
        item: the input.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    with open(item.path, "rb") as raw:
        encoding, _lines = tokenize.detect_encoding(raw.readline)
    return _pieces(open_stream(item.path, None), encoding, place)


def _pieces(stream: Stream, encoding: str, place: SourcePosition) -> Rows:
    content, raw = stream
    before = characters = 0
    with raw, content:
        text = io.TextIOWrapper(content, encoding=encoding, newline="")
        while piece := text.read(PIECE_CHARACTERS):
            if len(piece) == PIECE_CHARACTERS:
                piece += text.readline(PIECE_CHARACTERS)
            if "\0" in piece:
                raise DataError(
                    f"the file is not text: {place.file}",
                    got=f"a NUL character at character {characters + piece.index(chr(0)):,}",
                    fix="leave it out; data of another kind has to be converted to text, JSON Lines or Parquet first",
                )
            characters += len(piece)
            now = raw.tell()
            place.byte = now
            yield piece, now - before
            before = now


def _name_the_damage(stream: Stream, place: SourcePosition) -> None:
    """Raise an error that names the first byte (of the text, not of its compressed form) that is not UTF-8."""
    content, raw = stream
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with raw, content:
        while block := content.read(1 << 20):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                # The decoder kept the beginning of a character from the block before.
                at = before + error.start - (len(error.object) - len(block))
                not_utf8(str(place.file), error.object[error.start], at, error.reason)
            before += len(block)
