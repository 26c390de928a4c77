"""The course of a run that travels in its checkpoints."""

from __future__ import annotations

import itertools
import json

import pytest

from orchestrator.observe.history import LIMIT, History, read_content


def _content(history: History, step: int = 0) -> dict:
    return json.loads(history.content(step))


def test_rows_and_legs_come_back():
    history = History()
    history.legs = [{"leg": 0, "end_step": 3}, {"leg": 1}]
    rows = [{"step": 1, "loss": 2.5}, {"step": 1, "val_loss": 2.0}, {"step": 2, "loss": 1.5}]
    history.write([*rows, {"step": 2, "other": 1}])
    legs, found = read_content(_content(history, 7))
    assert legs == [{"leg": 0, "end_step": 3}, {"leg": 1, "end_step": 7}]
    assert found == rows
    assert history.legs[1] == {"leg": 1}, "the leg goes on"
    assert _content(History(found))["rows"] == _content(history)["rows"]


def test_a_long_run_stays_small_and_is_covered_evenly():
    history = History()
    history.write({"step": step, "loss": 1.0} for step in range(1, 50_001))
    steps = [row["step"] for row in _content(history)["rows"]]
    assert LIMIT / 2 <= len(steps) <= LIMIT
    gaps = {b - a for a, b in itertools.pairwise(steps)}
    assert gaps == {32}
    assert steps[-1] > 50_000 - 32


@pytest.mark.parametrize("data", [None, [], {}, {"legs": 1, "rows": "x"}, {"legs": [1], "rows": [2, {"step": "a"}]}])
def test_what_is_no_history_is_left_out(data):
    assert read_content(data) == ([], [])
