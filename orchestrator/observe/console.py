"""Standard output and error that never fail: what cannot be printed is lost, and the work continues.

A reader that has gone (`| head`), a full disk under a redirection, a stream that was closed from the start, a letter
that the locale's encoding lacks: none of them may end a training. While `guarded` holds, `sys.stdout` and `sys.stderr`
write through a `Channel`, so every print, of a library too, is safe.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO, cast

from orchestrator.errors import printable
from orchestrator.observe.sink import Channel, write_all

_LINES_KEPT = 1000


class Console:
    r"""A text stream that never raises. Other attributes are those of the stream below.

    Args:
        stream: where the text goes.
        name: of it, for messages.
        escape: control characters but tabs and newlines are written as `\x1b`: what is printed on standard output may
            come from an untrusted file. Off for standard error, where bars move the cursor.
        quits: a reader that goes has had enough: that is not said.
    """

    def __init__(self, stream: TextIO, name: str, escape: bool, quits: bool = False):
        self.stream, self.other = stream, stream
        self._escape, self._quits, self._text = escape, quits, ""
        self._channel = Channel[str](name, self._print, self._say, "lines", _LINES_KEPT)

    def write(self, text: str) -> int:
        """Buffer `text`, and pass it on when a line is complete. Returns its length."""
        self._text += text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        text, self._text = self._text, ""
        if text:
            self._channel.put([printable(text) if self._escape else text])

    def writelines(self, lines: Any) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def close(self) -> bool:
        """Print what is queued. Returns whether all was printed, or there is no reader."""
        self.flush()
        self._channel.retry(now=True)
        problem = self._channel.problem
        gone = isinstance(problem, BrokenPipeError)
        if not gone:
            self._channel.close()
        return problem is None or gone

    def _say(self, text: str) -> None:
        if not (self._quits and isinstance(self._channel.problem, BrokenPipeError)):
            print(f"warning: {text}", file=self.other, flush=True)

    def _print(self, texts: Sequence[str]) -> None:
        text = "".join(texts)
        try:
            file = self.stream.fileno()
        except (OSError, ValueError, AttributeError):  # no file: a buffer of a test or a notebook
            self.stream.write(text)
            self.stream.flush()
            return
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()
        write_all(file, text.encode(self.stream.encoding or "utf-8", "backslashreplace"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def guarded(quits: bool = False) -> Iterator[Console]:
    """Let nothing that is printed within the block raise.

    Args:
        quits: of `Console`, for standard output.

    Yields:
        Standard output.
    """
    _open_standard_files()
    before = sys.stdout, sys.stderr
    if isinstance(before[0], Console):
        yield before[0]
        return
    output = Console(before[0], "standard output", escape=True, quits=quits)
    errors = Console(before[1], "standard error", escape=False)
    sys.stdout, sys.stderr = output.other, errors.other = cast(TextIO, output), cast(TextIO, errors)
    output.other, errors.other = sys.stderr, sys.stdout
    try:
        yield output
    finally:
        sys.stdout, sys.stderr = before


def _open_standard_files() -> None:
    """Open standard streams that were closed when the process began, so that no file takes their place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
