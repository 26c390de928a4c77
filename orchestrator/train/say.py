"""What a user is told before and beside the run's own lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from orchestrator.config.schema import RunConfig

_QUIET = ("logger=quiet", "logger.progress=false")


def warn(text: str) -> None:
    """Say on standard error what went otherwise than asked."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def doing(text: str, config: RunConfig | Sequence[str]) -> None:
    """Say on standard error what the start-up is at, unless `logger.progress` is off.

    Args:
        config: the configuration, or, before it is composed, the words of the command line.
    """
    shown = config.logger.progress if isinstance(config, RunConfig) else not set(_QUIET) & {w.lower() for w in config}
    if shown:
        print(f"start      {text}", file=sys.stderr, flush=True)
