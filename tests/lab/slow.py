"""Cases that `scripts/test --slow` runs, and a landing does not: further ones of a kind that is tested anyway."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest

slow = pytest.mark.slow


def cases(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """Parameters of a test: those of `quick` always, the others with `--slow`."""
    found = []
    for value in values:
        given = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*given, marks=[] if value in quick else [slow]))
    return found
