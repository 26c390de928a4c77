"""The objective of a run for a sweep (`train.objective`). No torch."""

from __future__ import annotations

import math
from pathlib import Path

from orchestrator.config.compose import Composed
from orchestrator.config.sweep import Scored
from orchestrator.errors import STOPPED
from orchestrator.launch.start import launch
from orchestrator.report.run_data import headline, read_run_data
from orchestrator.runs.time_book import process_began

_LARGER_IS_BETTER = ("tokens_per_second",)


def start_and_score(composed: Composed) -> Scored:
    """Train as the command line says, and return the objective that the run has reached.

    Args:
        composed: the configuration of this command line.

    Raises:
        UserError: what is wrong, before anything was started or written.
    """
    name = composed.config.train.objective
    outcome = launch(composed, began=None if composed.job else process_began())  # a later job of a sweep begins now
    reached = None if outcome.run_dir is None or outcome.code in STOPPED else objective_of(outcome.run_dir, name)
    return Scored(outcome.code, reached, name, name not in _LARGER_IS_BETTER)


def objective_of(run_dir: Path, name: str) -> float | None:
    """Return the objective of a run.

    Args:
        run_dir: of the run.
        name: a value of `train.objective`.

    Returns:
        Nats per token, or tokens per second. Of a run that diverged the worst value that there is: infinity, or 0 where
        more is better. None where the run has not recorded it.
    """
    data = read_run_data(run_dir)
    facts = headline(data)
    if facts["status"] == "diverged":
        return 0.0 if name in _LARGER_IS_BETTER else math.inf
    if facts["status"] != "finished":
        return None
    if name == "best_val_loss":
        return min((value for _, value in data.series("val_loss", data.evals)), default=None)
    value: float | None = facts[name]
    return value
