"""Rows of metrics that are made of what islands report."""

from typing import Any

import pytest

from orchestrator.islands.run_rows import RunRows


def _report(island: str, lease: int, at: list[int], sequences: int, loss: float | None, **other: Any) -> dict[str, Any]:
    steps = len(at)
    about = {"island": island, "lease": lease, "at": at, "sequences": [sequences] * steps, "round": lease}
    return {
        **about,
        "losses": [loss] * steps,
        "targets": [10 * sequences] * steps,
        "norms": [1.0] * steps,
        "rates": [0.1] * steps,
        **other,
    }


def _rows(rounds: bool = True, **options: Any) -> RunRows:
    times = iter(range(0, 1000, 4))
    return RunRows(4, 16, rounds, clock=lambda: float(next(times)), **options)


def test_the_loss_of_a_step_is_the_mean_over_the_tokens_of_all_islands():
    rows = _rows()
    assert rows.add(_report("a", 0, [0, 1], 3, 2.0)) == []  # b has not reported its part yet
    first, second = rows.add(_report("b", 0, [0, 1], 1, 4.0))
    assert (first["step"], first["loss"], first["grad_norm"], first["lr"]) == (1, 2.5, 1.0, pytest.approx(0.1))
    assert (second["step"], second["tokens"], second["step_seconds"]) == (2, 128, 4.0)
    assert second["tokens_per_second"] == 16.0
    assert rows.add(_report("b", 0, [0, 1], 1, 4.0)) == []  # trained again after it was killed


def test_a_lost_island_holds_up_no_row_for_good():
    rows = _rows()
    rows.add(_report("a", 0, [0, 1], 3, 2.0))
    assert rows.add(_report("a", 1, [2], 4, 1.0)) == []
    # Of 3, 3, 4 and 4 sequences three rows, and two sequences that wait for the next one.
    found = rows.add(_report("a", 2, [3], 4, 1.0))
    assert [row["step"] for row in found] == [1, 2, 3]
    assert found[0]["loss"] == 2.0
    assert found[1]["loss"] == pytest.approx((2 * 2.0 + 4 * 1.0) / 6)


def test_where_nobody_waits_a_row_is_of_the_next_sequences_that_came():
    rows = _rows(rounds=False, step=7, seen=[("b", 3)])
    assert rows.add(_report("b", 3, [1], 4, 1.0)) == []
    (row,) = rows.add(_report("a", 0, [0, 1], 3, 2.0))
    assert (row["step"], row["loss"]) == (8, 2.0)
    (row,) = rows.add(_report("b", 4, [1], 2, 3.0))
    assert (row["step"], row["loss"]) == (9, pytest.approx(2.5))


def test_a_loss_that_is_not_finite_is_said():
    (row,) = _rows().add(_report("a", 0, [0], 4, None))
    assert (row["loss"], row["nonfinite"]["loss"]) == (None, "nan")
