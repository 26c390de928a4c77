"""Whether a run that was killed again and again kept as much of its time as the planner expects."""

from __future__ import annotations

from pathlib import Path

from orchestrator.observe.time_figures import figures_of
from orchestrator.observe.time_spans import read_book
from orchestrator.planner.estimate.goodput import restart_goodput


def measured_and_expected(run_dir: Path) -> tuple[float, float]:
    """The goodput of a run by its book, and by Daly's formula for its own failures, saves and restarts."""
    figures = figures_of(read_book(run_dir))
    assert figures is not None, "it has trained nothing"
    interval, stall, restart = figures.interval_seconds, figures.stall_seconds, figures.restart_seconds
    assert interval is not None, "it has saved nothing"
    assert stall is not None
    assert restart is not None, "it has not been killed, or never came back"
    assert figures.mtbf_seconds is not None
    return figures.goodput, figures.expected(restart_goodput(interval, stall, figures.mtbf_seconds, restart))
