"""Output for users: records of Python's logger `orchestrator`, which the command line prints.

A program that imports the package sees nothing of them until it configures `logging`, as with any library. The command
line and the processes of a run print them (`printing`): results on standard output, the rest on standard error.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Stream = Literal["stdout", "stderr"]

_PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: "}
_logger = logging.getLogger("orchestrator")
_logger.addHandler(logging.NullHandler())  # else a warning would reach standard error without being asked for


def tell(text: str, *, stream: Stream = "stderr", level: int = logging.INFO) -> None:
    """Log one line, or one paragraph, for the user.

    Args:
        text: without `warning: ` or `error: ` in front, which `level` says.
        stream: where the command line prints it.
        level: one of `logging`'s.
    """
    _logger.log(level, text, extra={"stream": stream})


def relay(line: str, stream: Stream) -> None:
    """Log a line that another process of the product has printed on `stream`, with the level that it shows.

    Args:
        line: of text.
        stream: `stdout` or `stderr`.
    """
    for level, prefix in _PREFIXES.items():
        if line.startswith(prefix):
            tell(line.removeprefix(prefix), stream=stream, level=level)
            return
    tell(line, stream=stream)


def is_printed() -> bool:
    """Whether lines go to the terminal: where they do not, no progress bar may be drawn either."""
    return _printer in _logger.handlers


@contextmanager
def printing(on: bool = True) -> Iterator[None]:
    """Print the lines within the block, and propagate them to no other handler.

    Args:
        on: off leaves everything as it is.
    """
    if not on or is_printed():
        yield
        return
    level, propagate = _logger.level, _logger.propagate
    _logger.addHandler(_printer)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False
    try:
        yield
    finally:
        _logger.removeHandler(_printer)
        _logger.setLevel(level)
        _logger.propagate = propagate


class _Printer(logging.Handler):
    """Prints on what `sys.stdout` and `sys.stderr` are at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if getattr(record, "stream", "stderr") == "stdout" else sys.stderr
        print(f"{_PREFIXES.get(record.levelno, '')}{record.getMessage()}", file=stream, flush=True)


_printer = _Printer()
