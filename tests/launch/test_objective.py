"""The number that a sweep gets of a run."""

from __future__ import annotations

import json
import math

import pytest

from orchestrator.launch.objective import objective_of

ROWS = [
    {"step": 1, "loss": 6.0, "tokens_per_second": 900.0},
    {"step": 2, "loss": 5.0, "tokens_per_second": 1100.0},
    {"step": 1, "val_loss": 5.5},
    {"step": 2, "val_loss": 5.75},
]


def write(folder, status, rows=ROWS):
    (folder / "run.json").write_text(json.dumps({"status": status, "legs": []}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [("val_loss", 5.75), ("best_val_loss", 5.5), ("loss", 5.0), ("loss_mean", 5.5), ("tokens_per_second", 1000.0)],
)
def test_of_a_finished_run(name, value, tmp_path):
    assert objective_of(write(tmp_path, "finished"), name) == value


def test_a_diverged_run_is_the_worst(tmp_path):
    write(tmp_path, "diverged")
    assert objective_of(tmp_path, "val_loss") == math.inf
    assert objective_of(tmp_path, "tokens_per_second") == 0.0


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_a_run_that_has_not_ended_has_none(status, tmp_path):
    assert objective_of(write(tmp_path, status), "loss") is None


def test_nor_has_one_without_the_number(tmp_path):
    write(tmp_path, "finished", ROWS[:2])
    assert objective_of(tmp_path, "val_loss") is None
    assert objective_of(tmp_path, "best_val_loss") is None
