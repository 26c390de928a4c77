"""The sweeper `optuna` by the command line's way, with jobs that compute a formula instead of training."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest

from orchestrator import cli, stopping
from orchestrator.config.compose import run_composed
from orchestrator.config.sweep import Scored
from orchestrator.errors import DIVERGED, DONE, FAILED, TERMINATED, ConfigError, ConfigErrors
from orchestrator.report.sweep_page import keep_sweep
from orchestrator.sweeps.running_trial import VARIABLE, RunningTrial

pytest.importorskip("optuna")
SPACE = ("optim.lr=tag(log, interval(1e-4, 1e-1))", "train.global_batch_tokens=4096,8192")


class Jobs:
    """Stands in for the training: what was asked for, and what it came to."""

    def __init__(self):
        self.asked, self.reached = [], []

    def __call__(self, composed):
        config = composed.config
        self.asked.append((composed.job, config.optim.lr, config.train.global_batch_tokens))
        assert config.resume == "auto"
        loss = 3 + (math.log10(config.optim.lr) + 3) ** 2
        self.reached.append(loss)
        return Scored(DONE, loss, "val_loss")


def words(folder: Path, *more: str) -> list[str]:
    return ["-m", "hydra/sweeper=optuna", f"runs_dir={folder}", *SPACE, *more]


def record(folder: Path) -> dict:
    (path,) = (folder / "sweeps").glob("*/sweep.json")
    return json.loads(path.read_text())


def sweep(folder: Path, task, *more: str) -> int:
    return run_composed(words(folder, *more), "test", task, keep_sweep)


def test_a_sweep_learns_and_the_same_command_goes_on_with_it(tmp_path, capsys):
    tpe = ("hydra.sweeper.startup_trials=2",)  # learns from the third on
    first = Jobs()
    assert sweep(tmp_path, first, *tpe, "hydra.sweeper.n_trials=5") == DONE
    assert [job for job, *_ in first.asked] == list(range(5))
    assert {batch for *_, batch in first.asked} == {4096, 8192}
    more = Jobs()
    assert sweep(tmp_path, more, *tpe, "hydra.sweeper.n_trials=7") == DONE
    assert [job for job, *_ in more.asked] == [5, 6]
    again = Jobs()
    assert sweep(tmp_path, again, *tpe, "hydra.sweeper.n_trials=7") == DONE
    assert again.asked == []
    assert capsys.readouterr().out.count("<- best") == 3, "each start shows the whole sweep"
    kept = record(tmp_path)
    assert [job["objective"] for job in kept["jobs"]] == first.reached + more.reached
    assert {job["status"] for job in kept["jobs"]} == {"finished"}
    whole = Jobs()
    assert sweep(tmp_path / "whole", whole, *tpe, "hydra.sweeper.n_trials=7") == DONE
    assert whole.asked == first.asked + more.asked, "values do not depend on how often the sweep was started"


def test_a_killed_trial_is_gone_on_with_before_another_is_begun(tmp_path):
    pid = os.fork()
    if pid == 0:
        jobs = Jobs()

        def killed(composed):
            if composed.job == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return jobs(composed)

        os._exit(sweep(tmp_path, killed, "hydra.sweeper.n_trials=4"))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (journal,) = (tmp_path / "sweeps").glob("*/study.journal")
    with journal.open("ab") as file:
        file.write(b'{"op_code": 8, "tri')  # of a write that the kill has cut
    jobs = Jobs()
    assert sweep(tmp_path, jobs, "hydra.sweeper.n_trials=4") == DONE
    assert [job for job, *_ in jobs.asked] == [2, 3]
    whole = Jobs()
    assert sweep(tmp_path / "whole", whole, "hydra.sweeper.n_trials=4") == DONE
    assert whole.asked[2:] == jobs.asked


def test_a_stopped_trial_is_kept_for_the_next_start(tmp_path, capsys):
    with stopping.listening(announce=False):
        code = sweep(tmp_path, lambda composed: Scored(TERMINATED), "hydra.sweeper.n_trials=3")
    assert code == TERMINATED
    assert "jobs after this one are not started" in capsys.readouterr().err
    jobs = Jobs()
    assert sweep(tmp_path, jobs, "hydra.sweeper.n_trials=3") == DONE
    assert [job for job, *_ in jobs.asked] == [0, 1, 2]


def test_two_processes_share_a_sweep(tmp_path):
    def slow(composed):
        time.sleep(0.02)
        return Jobs()(composed)

    pids = []
    for _ in range(2):
        if not (pid := os.fork()):
            os._exit(sweep(tmp_path, slow, "hydra.sweeper.n_trials=8"))
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [DONE, DONE]
    assert sweep(tmp_path, Jobs(), "hydra.sweeper.n_trials=8") == DONE
    jobs = record(tmp_path)["jobs"]
    assert [job["number"] for job in jobs] == list(range(8))
    assert all(job["status"] == "finished" for job in jobs)


def test_runs_that_fall_behind_are_pruned_and_those_that_diverge_are_the_worst(tmp_path):
    def task(composed):
        trial, job = RunningTrial.of(), composed.job
        values = {0: (5.0, 4.0), 1: (5.5, 4.5), 2: (6.0, 1.0), 3: (4.0, 3.0)}[job]
        for step, value in zip((10, 20), values, strict=True):
            if trial.report(step, value):
                return Scored(DONE, value, "val_loss", pruned=True)
        return Scored(DIVERGED, math.inf, "val_loss") if job == 1 else Scored(DONE, values[-1], "val_loss")

    more = ("hydra.sweeper.n_trials=4", "hydra.sweeper.startup_trials=2")
    assert sweep(tmp_path, task, *more) == DIVERGED
    found = [(job["status"], job["objective"]) for job in record(tmp_path)["jobs"]]
    assert found == [("finished", 4.0), ("diverged", None), ("pruned", 6.0), ("finished", 3.0)]
    assert VARIABLE not in os.environ
    (page,) = (tmp_path / "sweeps").glob("*/sweep.html")
    assert "1 pruned" in page.read_text()


def test_a_grid_takes_every_combination_once(tmp_path):
    jobs = Jobs()
    values = ("seed=1,2", "optim.lr=1e-3,3e-4")
    more = ("hydra.sweeper.sampler=grid", "hydra.sweeper.pruner=none")
    argv = ["-m", "hydra/sweeper=optuna", f"runs_dir={tmp_path}", *values, *more]
    assert run_composed(argv, "test", jobs, keep_sweep) == DONE
    assert sorted({lr for _, lr, _ in jobs.asked}) == [3e-4, 1e-3]
    assert len(jobs.asked) == 4


def test_runs_that_fail_one_after_the_other_end_the_sweep(tmp_path):
    def fail(composed):
        assert VARIABLE in os.environ
        raise ConfigError("no such device")

    with pytest.raises(ConfigErrors, match="3 runs of the sweep have failed one after the other"):
        sweep(tmp_path, fail)
    assert [job["status"] for job in record(tmp_path)["jobs"]] == ["failed"] * 3
    some = iter([FAILED, DONE, FAILED])
    assert sweep(tmp_path, lambda composed: Scored(next(some), 1.0), "hydra.sweeper.n_trials=6") == FAILED


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials is out of range"),
        ("hydra.sweeper.pruner=best", "no hydra.sweeper.pruner of this name"),
        ("hydra.sweeper.trials=3", "the sweeper has no such key"),
        ("hydra.sweeper.name=a/b", "does not fit a folder"),
        ("hydra.sweeper.sampler=grid", "a grid needs values to choose from"),
        ("train.objective=loss", "which is not the objective"),
        ("train.eval_every=null", "of which there is none before the end"),
        ("run_id=mine", "gives each run its own run_id"),
        ("seed=interval(3,1)", "the interval is none"),
        ("optim.moment=interval(0,1)", "there is no key"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_run(word, said, tmp_path):
    jobs = Jobs()
    with pytest.raises(ConfigErrors, match=said):
        sweep(tmp_path, jobs, word)
    assert jobs.asked == []
    assert not (tmp_path / "sweeps").exists()


def test_another_sweep_is_not_mixed_with_the_one_of_its_name(tmp_path):
    assert sweep(tmp_path, Jobs(), "hydra.sweeper.name=mine", "hydra.sweeper.n_trials=1") == DONE
    with pytest.raises(ConfigErrors, match=r"another sweep(.|\n)*fixed: .*seed=1"):
        sweep(tmp_path, Jobs(), "hydra.sweeper.name=mine", "hydra.sweeper.n_trials=2", "seed=1")


def test_processes_that_an_engine_has_started_do_not_sweep(monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert cli.main(["train", "-m", "hydra/sweeper=optuna", "optim.lr=interval(1,2)"]) == 2
    assert "starts the processes of its runs itself" in capsys.readouterr().err
