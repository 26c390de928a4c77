"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.output import printing


@pytest.fixture(autouse=True, scope="session")
def lines_are_printed() -> Iterator[None]:
    """The product's lines are printed, as on the command line. Programs that import it have tests of their own."""
    with printing():
        yield
