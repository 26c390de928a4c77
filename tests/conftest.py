"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.output import printing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also the cases that are marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked slow, unless it is asked for."""
    if config.getoption("--slow"):
        return
    left_out = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True, scope="session")
def lines_are_printed() -> Iterator[None]:
    """The product's lines are printed, as on the command line. Programs that import it have tests of their own."""
    with printing():
        yield
