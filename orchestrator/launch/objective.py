"""The objective of a run for a sweep (`train.objective`). No torch."""

from __future__ import annotations

import math
from pathlib import Path

from orchestrator.config.compose import Composed
from orchestrator.config.sweep import Scored
from orchestrator.errors import DIVERGED, DONE, STOPPED
from orchestrator.launch.start import launch
from orchestrator.report.run_data import headline, read_run_data
from orchestrator.runs.identity import name_of
from orchestrator.runs.resume import AUTO
from orchestrator.runs.run_directory import PRUNED, named, read_run
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
    before = _ended_before(composed)
    if before is None:
        # A later job of a sweep begins now.
        outcome = launch(composed, began=None if composed.job else process_began())
        code, run_dir = outcome.code, outcome.run_dir
    else:
        code, run_dir = before
    reached = None if run_dir is None or code in STOPPED else objective_of(run_dir, name)
    pruned = run_dir is not None and code == DONE and read_run(run_dir).get("status") == PRUNED
    return Scored(code, reached, name, name not in _LARGER_IS_BETTER, run_dir, pruned)


def _ended_before(composed: Composed) -> tuple[int, Path] | None:
    """Return exit code and directory of a sweep's run that is not to be gone on with, though steps are left."""
    config = composed.config
    if composed.job is None or config.resume != AUTO or config.run_id is None:
        return None
    run_dir = named(config, name_of(config, composed.job))
    code = {PRUNED: DONE, "diverged": DIVERGED}.get(str(read_run(run_dir).get("status")))
    return None if code is None else (code, run_dir)


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
    if facts["status"] not in ("finished", PRUNED):
        return None
    if name == "best_val_loss":
        return min((value for _, value in data.series("val_loss", data.evals)), default=None)
    value: float | None = facts[name]
    return value
