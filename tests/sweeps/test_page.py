"""The page of a sweep."""

from __future__ import annotations

import json
import math

import pytest

from orchestrator.report.sweep_page import keep_sweep, render_sweep
from orchestrator.sweeps.importances import importances
from orchestrator.sweeps.sweep_record import SweepJob, SweepRecord, short_value

SPACE = {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True, "whole": False}, "data.order": {"choices": ["a", "b"]}}


def make(count: int, **more) -> SweepRecord:
    jobs = []
    for number in range(count):
        rate = 1e-4 * 10 ** (3 * ((number * 7) % count) / count)
        loss = 3 + (math.log10(rate) + 2.5) ** 2
        values = {"optim.lr": repr(rate), "data.order": "ab"[number % 2]}
        jobs.append(SweepJob(number, values, "finished", loss))
    return SweepRecord("a sweep", "val_loss", True, jobs, SPACE, **more)


def test_the_key_that_matters_is_found():
    pytest.importorskip("optuna")
    shares = importances(make(24))
    assert shares["optim.lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert importances(make(5)) == "They need 6 finished runs; there are 5."


def test_the_best_run_and_the_curves_are_shown(tmp_path):
    run_dir = tmp_path / "runs" / "tiny" / "a-0"
    run_dir.mkdir(parents=True)
    (run_dir / "report.html").touch()
    rows = [{"step": 10, "val_loss": 4.0}, {"step": 20, "val_loss": 3.5}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = [
        SweepJob(0, {"optim.lr": "0.001", "name": "<b>"}, "finished", 3.5, str(run_dir)),
        SweepJob(1, {"optim.lr": "0.1", "name": "<b>"}, "diverged", math.inf, None),
        SweepJob(2, {"optim.lr": "0.01234567890123", "name": "c"}, "pruned", 5.0, None),
    ]
    record = SweepRecord("mine", "val_loss", True, jobs, wanted=8, command=["-m", "name=<b>,c"])
    keep_sweep(tmp_path / "sweeps" / "mine", record)
    page = (tmp_path / "sweeps" / "mine" / "sweep.html").read_text()
    assert '<a href="../../runs/tiny/a-0/report.html">0</a>' in page
    assert "3 of 8 runs (1 finished, 1 diverged, 1 pruned)" in page
    assert "best so far 3.5 at run 0" in page
    assert "from 4 at step 10 to 3.5 at step 20" in page
    assert "0.01235" in page
    assert "<b>" not in page.replace("<b>x", "")
    assert json.loads((tmp_path / "sweeps" / "mine" / "sweep.json").read_text())["jobs"][1]["objective"] is None


def test_a_sweep_without_results_has_a_page(tmp_path):
    page = render_sweep(SweepRecord("new", "val_loss", True, [SweepJob(0, {}, "failed")]), tmp_path)
    assert "No run has finished" in page


def test_numbers_are_shortened_and_words_are_not():
    assert [short_value(text) for text in ("0.0123456789", "1e-3", "a-long-name", "nan")] == [
        "0.01235",
        "1e-3",
        "a-long-name",
        "nan",
    ]
