"""A sweep of real runs by the command line: killed in the middle of a run, and gone on with by the same command."""

from __future__ import annotations

import json

import pytest

from tests.lab.cli import kill_all, run, start, wait_until
from tests.lab.runs import TINY, small_overrides
from tests.lab.slow import slow

pytest.importorskip("optuna")


@slow
def test_a_killed_sweep_goes_on_with_the_run_that_was_under_way(tmp_path):
    words = small_overrides(
        tmp_path,
        *TINY,
        "train.max_steps=300",
        "train.eval_every=100",
        "checkpoint.every_steps=20",
        "optim.lr=tag(log, interval(1e-3, 1e-2))",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2",
    )
    process = start("train", "-m", *words)
    wait_until(lambda: any((tmp_path / "runs").glob("*/*-0/checkpoints/step-*/manifest.json")), process)
    kill_all(process)
    again = run("train", "-m", *words)
    assert again.returncode == 0, again.stderr
    assert "goes on from step-" in again.stderr + again.stdout
    (record,) = (tmp_path / "runs" / "sweeps").glob("*/sweep.json")
    jobs = json.loads(record.read_text())["jobs"]
    assert [(job["number"], job["status"]) for job in jobs] == [(0, "finished"), (1, "finished")]
    legs = [json.loads(path.read_text())["legs"] for path in sorted((tmp_path / "runs").glob("*/*/run.json"))]
    assert [(run[-1]["start_step"] > 0, run[-1]["end_step"]) for run in legs] == [(True, 300), (False, 300)]
