"""Bring a run's directory up to its checkpoint, where the run has been on other hosts meanwhile. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.atomic_files import write_atomically
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.observe.history import METRICS
from orchestrator.runs import run_directory

_Leg = Mapping[str, Any]


def catch_up(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Add the legs that a checkpoint knows and the run directory does not, with their rows, in the order of time.

    What the directory has itself stays: the history that travels is thinned, and ends with the checkpoint.

    Args:
        run_dir: the run's directory, empty or left behind.
        checkpoint: the one that the run goes on from.

    Raises:
        CheckpointError: the history that it carries cannot be read.
    """
    facts = run_directory.read_run(run_dir)
    here: list[_Leg] = list(facts.get("legs", []))
    legs, rows = run_directory.read_history(checkpoint)
    known = {_begin(leg) for leg in here}
    missed = [leg for leg in legs if _begin(leg) not in known]
    if not missed:
        return
    ordered = sorted([*here, *missed], key=_begin)
    numbers = {_begin(leg): number for number, leg in enumerate(ordered)}
    elsewhere = {_begin(leg) for leg in missed}
    ours = _numbered(read_rows(run_dir), here, numbers, known)
    theirs = _numbered(rows, legs, numbers, elsewhere)
    merged = sorted([*ours, *theirs], key=lambda row: int(row.get("leg", 0)))
    write_atomically(run_dir / METRICS, "".join(json.dumps(row) + "\n" for row in merged))
    facts["legs"] = [{**leg, "leg": number} for number, leg in enumerate(ordered)]
    run_directory.write_run(run_dir, facts)


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a line that was cut is left out.

    Args:
        run_dir: the run's directory.
    """
    found = []
    try:
        lines = (run_dir / METRICS).read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _numbered(
    rows: Iterable[Mapping[str, Any]], legs: Sequence[_Leg], numbers: Mapping[float, int], wanted: set[float]
) -> list[dict[str, Any]]:
    """Rows of the `wanted` legs, by the numbers that these have now. A row of no leg that is known keeps its own."""
    begins = {leg.get("leg", place): _begin(leg) for place, leg in enumerate(legs)}
    found = []
    for row in rows:
        begin = begins.get(row.get("leg"))
        if begin is None or begin in wanted:
            found.append(dict(row) if begin is None else {**row, "leg": numbers[begin]})
    return found


def _begin(leg: _Leg) -> float:
    """When a leg began: no two of a run begin at once, as one process holds it."""
    begin = leg.get("started")
    return float(begin) if isinstance(begin, (int, float)) else 0.0
