"""The verb `launch`: what it makes of a command line, before any engine has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.engines.engine_job import job_name, new_run_id
from orchestrator.engines.submission import Submission, find_submission, read_submission
from orchestrator.errors import LaunchError

SLURM = ("launch", "engine=slurm", "hardware=cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_dry_run_shows_everything_and_writes_nothing(tmp_path, capsys):
    words = ["launch.nodes=2", "layout.fsdp=2", "train.max_steps=7", "dry_run=true"]
    assert main([*SLURM, *words]) == 0
    out = capsys.readouterr().out
    assert "--- job.sbatch\n#!/bin/bash\n" in out
    assert "#SBATCH --nodes=2\n" in out
    (run_id,) = set(re.findall(r"run_id=(\S+)", out))
    assert f" -m orchestrator train resume=auto run_id={run_id} launch=slurm hardware=cpu launch.nodes=2" in out
    assert f"submit     sbatch --parsable {tmp_path}/runs/tiny/{run_id}/launch/job.sbatch" in out
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_one_array(tmp_path, capsys):
    words = ["-m", "optim.lr=1e-3,3e-4", "seed=range(2)", "run_id=many", "launch.jobs_at_once=3", "dry_run=true"]
    assert main([*SLURM, *words]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --array=0-3%3\n" in out
    assert "/runs/tiny/many/launch/slurm-%A_%a.out" in out
    for number, values in enumerate(("optim.lr=0.001 seed=0", "optim.lr=0.001 seed=1", "optim.lr=0.0003 seed=0")):
        assert f"run_id=many-{number} launch=slurm hardware=cpu {values}" in out
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_users_own_travel_by_their_absolute_path(tmp_path, capsys):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "small.yaml").write_text("defaults: [tiny, _self_]\nlayers: 1\n")
    assert main([*SLURM, "--config-dir", "mine", "model=small", "dry_run=true"]) == 0
    assert f"--config-dir {tmp_path}/mine launch=slurm hardware=cpu model=small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["engine=slrum", "hardware=cpu"], "did you mean 'slurm'?"),
        (["hardware=cpu"], "say who is to start the job"),
        (["engine=slurm"], "the hardware of another machine cannot be looked up"),
        ([*SLURM[1:], "train.max_stepz=1", "optim.lr=x"], "2 problems in the configuration"),
        ([*SLURM[1:], "launch.nodes=2", "layout.fsdp=3"], "layout"),
        ([*SLURM[1:], "launch.hosts=[a]"], "'launch.hosts' is no key of the option of 'launch' that was chosen"),
        ([*SLURM[1:], "resume=latest"], "goes on with the run of its own run_id"),
        (["engine=slurm", "hardware=cuda", "launch.nodes=2"], "how many devices each of them has"),
        ([*SLURM[1:], "--cfg", "job"], "launch has no such flag"),
        ([*SLURM[1:], "-m", "hydra/sweeper=optuna"], "launch submits every combination at once"),
        ([*SLURM[1:], "-m", "seed=interval(0,1)"], "this sweep is no list of values"),
        ([*SLURM[1:], "-m", "launch.nodes=1,2"], "the jobs of a sweep have one engine"),
        (["stat"], "did you mean 'status'?"),
        (["status", "nowhere"], "no job was submitted for such a run"),
    ],
)
def test_mistakes(words, said, tmp_path, capsys):
    assert main(["launch", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert list(tmp_path.iterdir()) == []


def test_train_submits_nothing_and_says_so(capsys, tmp_path):
    assert main(["train", "launch=slurm", "hardware=cpu"]) == 2
    assert "train trains here: it submits nothing" in capsys.readouterr().err


def test_without_the_client_there_is_one_clear_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*SLURM]) == 2
    assert "error: the client 'sbatch' is not on this machine" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "7B of Läuse", "---", "x" * 200])
def test_a_run_id_is_a_dns_label_and_new(name):
    first, second = new_run_id(name), new_run_id(name)
    assert first != second
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", first)
    assert job_name(first) == first
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", job_name(f"{name}_.{name}"))
    assert job_name("a.b") != job_name("a_b")


def test_a_record_is_found_by_every_name_of_it(tmp_path):
    folder = tmp_path / "runs" / "tiny" / "one" / "launch"
    folder.mkdir(parents=True)
    one = Submission("slurm", "17", "one", 1.0, ("-m",), ("sbatch",), {"name": "slurm"}, folder)
    one.write()
    for where in ("latest", "one", "17", "tiny", "tiny/one", "runs/tiny/one"):
        assert find_submission(where, "runs") == one
    again = folder.with_name("launch-2")
    again.mkdir()
    Submission("slurm", "18", "one", 2.0, ("-m",), ("sbatch",), {}, again).write()
    assert find_submission("latest", "runs").id == "18"
    assert find_submission("17", "runs").id == "17"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"engine": 1}', "nope", "[" * 100000])
def test_a_damaged_record_is_one_clear_error(tmp_path, text):
    Path("job.json").write_text(text)
    with pytest.raises(LaunchError, match="the record of the job cannot be read"):
        read_submission(tmp_path)
