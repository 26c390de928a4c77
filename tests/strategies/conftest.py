"""Runs of the suites here, each trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.runs import small_config, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains a configuration once per module, however many tests look at it."""
    tmp: Path = tmp_path_factory.mktemp("runs")
    done: dict[tuple, Path] = {}

    def run(*overrides: str, size: int = 1) -> Path:
        key = (overrides, size)
        if key not in done:
            run_dir = tmp / f"run{len(done)}"
            train(small_config(tmp, *overrides), size, run_dir)
            done[key] = run_dir
        return done[key]

    run.tmp = tmp
    return run
