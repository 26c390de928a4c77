"""A real run that its sweep ends early: all ranks alike, with a status of its own, and nothing of it is lost."""

from __future__ import annotations

import json

import pytest

from orchestrator.launch.objective import objective_of
from orchestrator.sweeps.pruners import PrunerSettings
from orchestrator.sweeps.running_trial import VARIABLE
from orchestrator.sweeps.space import Between
from orchestrator.sweeps.study import StoredStudy, SweepPlan
from orchestrator.sweeps.sweep_record import SweepJob
from tests.lab.runs import TINY, checkpoint, read_rows, small_config, work_ranks
from tests.lab.slow import cases

pytest.importorskip("optuna")
RUN = (*TINY, "train.max_steps=6", "train.eval_every=2", "checkpoint.every_steps=null", "hardware.devices=2")


def study(folder) -> StoredStudy:
    """A study with a finished trial far better than any run, and one that is running."""
    pruner = PrunerSettings("median", 1, 0, 2, 6)
    plan = SweepPlan({"optim.lr": Between(1e-4, 1e-1, log=True)}, (), "val_loss", True, "random", pruner)
    made = StoredStudy(folder, plan)
    from orchestrator.sweeps.running_trial import RunningTrial

    with made.claimed(2) as first:
        trial = RunningTrial(folder, first.number)
        assert [trial.report(step, 0.5) for step in (2, 4)] == [False, False]
        made.tell(first, "finished", 0.5, None)
    with made.claimed(2) as second:
        assert second.number == 1
    return made


@pytest.mark.parametrize("at_end", cases([True, False], quick=[True]))
def test_it_ends_after_the_first_evaluation_on_all_ranks(at_end, tmp_path, monkeypatch):
    made = study(tmp_path / "sweep")
    monkeypatch.setenv(VARIABLE, f"{tmp_path / 'sweep'}:1")
    config = small_config(tmp_path, *RUN, "layout.fsdp=2", f"checkpoint.at_end={str(at_end).lower()}")
    run_dir = tmp_path / "run"
    assert work_ranks(config, 2, run_dir) == [0, 0]
    facts = json.loads((run_dir / "run.json").read_text())
    assert (facts["status"], facts["legs"][0]["end_step"]) == ("pruned", 2)
    (row,) = [row for row in read_rows(run_dir) if "val_loss" in row]
    assert objective_of(run_dir, "val_loss") == row["val_loss"]
    assert checkpoint(run_dir, 2).is_dir() == at_end
    with made.claimed(2) as trial:
        assert (trial.number, trial.goes_on) == (1, True)
        made.tell(trial, "pruned", row["val_loss"], str(run_dir))
    assert made.jobs()[1] == SweepJob(1, trial.values, "pruned", row["val_loss"], str(run_dir))


def test_a_study_that_cannot_be_read_ends_no_training(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(VARIABLE, f"{tmp_path / 'gone'}:1")
    config = small_config(tmp_path, *RUN, "hardware.devices=1")
    assert work_ranks(config, 1, tmp_path / "run") == [0]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert "cannot be asked whether the run falls behind" in capfd.readouterr().err
