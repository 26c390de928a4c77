"""What a user is told before and beside the run's own lines."""

from __future__ import annotations

import sys


def warn(text: str) -> None:
    """Say on standard error what went otherwise than asked."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
