"""JSON: one object per line, an array of objects, or one object that is a document."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from orchestrator.data.formats.reading import MAX_ROW_BYTES, Input, Rows, SourcePosition, decoded, too_long
from orchestrator.data.formats.rows import TextSpec
from orchestrator.data.formats.streams import open_input, read_lines
from orchestrator.errors import DataError

_CHUNK_CHARACTERS = 1 << 20
_SPACE = " \t\r\n"


def read_json_lines(item: Input, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield one object per line; blank lines are no rows.

    Args:
        item: the input.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    for line, consumed in read_lines(item, place):
        if line.strip():
            yield _object(_parsed(line, place), place, "one JSON object per line"), consumed


def read_json_object(item: Input, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield the one object that the whole file is.

    Args:
        item: the input.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    content, raw = open_input(item)
    with raw, content:
        data = content.read(MAX_ROW_BYTES + 1)
        if len(data) > MAX_ROW_BYTES:
            too_long(place, "JSON object")
        place.row = 1
        yield _object(_parsed(data.removeprefix(b"\xef\xbb\xbf"), place), place, "one JSON object"), raw.tell()


def read_json_array(item: Input, spec: TextSpec, place: SourcePosition) -> Rows:
    """Yield the objects of an array, one at a time: memory is that of the largest object.

    Args:
        item: the input.
        spec: the fields of a document.
        place: where reading is, for messages.
    """
    content, raw = open_input(item)
    before = 0
    with raw, content:
        for value in _elements(io.TextIOWrapper(content, encoding="utf-8-sig", newline=""), place):
            now = raw.tell()
            yield _object(value, place, "an array of objects"), now - before
            before = now


def _elements(text: io.TextIOWrapper, place: SourcePosition) -> Iterator[Any]:
    """Yield the elements of the array that `text` holds; `place.row` is the number of the element."""
    window = _Window(text, place)
    if window.next_mark() != "[":
        raise DataError(f"the file is no JSON array: {place.file}", got=window.shown(), allowed="[ at its beginning")
    window.at += 1
    mark = window.next_mark()
    while mark != "]":
        place.row += 1
        yield window.value()
        mark = window.next_mark()
        if mark == ",":
            window.at += 1
            mark = window.next_mark()
            if mark == "]":
                window.broken("a value after the comma")
        elif mark != "]":
            window.broken("a comma or ] after the value")
    window.at += 1
    if window.next_mark():
        window.broken("nothing after the array's end")


class _Window:
    """The part of a text that is parsed now."""

    def __init__(self, text: io.TextIOWrapper, place: SourcePosition):
        self._text, self._place, self._done = text, place, False
        self._decoder = json.JSONDecoder()
        self._buffer, self.at = "", 0

    def next_mark(self) -> str:
        """Return the next character that is no white space, without taking it; empty at the end."""
        while True:
            while self.at < len(self._buffer) and self._buffer[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self._buffer):
                return self._buffer[self.at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Parse one value, reading on until it is complete."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._buffer) - 16 or error.msg.startswith("Unterminated string")
                if not cut or not self._more():
                    self.broken(error.msg)
                continue
            if end == len(self._buffer) and self._more():
                continue  # a number may go on
            self.at = end
            return value

    def broken(self, wanted: str) -> None:
        raise DataError(
            f"the file is not a JSON array that is whole: {self._place}",
            got=self.shown() or "the end of the file",
            allowed="an array of objects: [{...}, {...}]",
            fix=f"mend the element, or fetch or write the file again ({wanted})",
        )

    def shown(self) -> str:
        return self._buffer[self.at : self.at + 80].strip()

    def _more(self) -> bool:
        """Double what is unparsed; says whether there was more."""
        rest = len(self._buffer) - self.at
        if rest > MAX_ROW_BYTES:
            too_long(self._place, "JSON object")
        added = "" if self._done else self._text.read(max(_CHUNK_CHARACTERS, rest))
        self._done = not added
        self._buffer, self.at = self._buffer[self.at :] + added, 0
        return bool(added)


def _parsed(data: bytes, place: SourcePosition) -> Any:
    text = decoded(data, place)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(
            f"the row is not JSON: {place}",
            got=text[:80].strip(),
            allowed="one JSON object per line, in UTF-8",
            fix=f"mend the line ({reason})",
        ) from error


def _object(value: Any, place: SourcePosition, allowed: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise DataError(
        f"the row is no JSON object: {place}",
        got=f"a JSON {type(value).__name__}",
        allowed=allowed,
        fix='write every document as an object: {"text": "..."}',
    )
