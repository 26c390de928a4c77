"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.output import printing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also the cases that are marked slow")


# Files of a minute and more. Where files run side by side, one of these must not be the last.
LONG = (
    *(
        "launch/test_end_to_end.py",
        "launch/test_remote.py",
        "strategies/test_conformance.py",
        "training/test_divergence.py",
    ),
    *("launch/test_faults.py", "training/test_handover_check.py", "test_mutants.py", "api/test_pages.py"),
    *("test_package.py", "strategies/test_lightning.py", "xla/test_conformance.py", "xla/test_rehearsal.py"),
    *("strategies/test_experts.py", "strategies/test_pipeline.py", "strategies/test_fake_chips.py"),
    "xla/test_experts.py",
    "engines/test_slurm_cluster.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the long files, and leave out what is marked slow, unless it is asked for."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))
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
