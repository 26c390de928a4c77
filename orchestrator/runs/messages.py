"""Messages about a run before and beside its own output."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from orchestrator.config.schema import RunConfig
from orchestrator.errors import printable
from orchestrator.output import tell

_QUIET = ("logger=quiet", "logger.progress=false")


def say(text: str) -> None:
    """Tell a line about the run.

    Args:
        text: the line.
    """
    tell(text, stream="stdout")


def warn(text: str) -> None:
    """Warn on standard error of what went otherwise than asked.

    Args:
        text: the line.
    """
    tell(printable(text), level=logging.WARNING)


def doing(text: str, config: RunConfig | Sequence[str]) -> None:
    """Say on standard error what the start-up is at, unless `logger.progress` is off.

    Args:
        text: what is done, as in `reading the configuration`.
        config: the configuration, or, before it is composed, the words of the command line.
    """
    shown = config.logger.progress if isinstance(config, RunConfig) else not set(_QUIET) & {w.lower() for w in config}
    if shown:
        tell(f"start      {text}")
