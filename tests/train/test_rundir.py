"""The directory of a run: never another run's, held by one process, and nothing of an earlier leg lost."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from orchestrator.config.compose import read_config
from orchestrator.config.schema import CheckpointConfig, RunConfig
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.train import rundir

HOLD = """
import sys
from pathlib import Path
from orchestrator.train import rundir
held = rundir.lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path):
    return replace(RunConfig(), runs_dir=str(tmp_path / "runs"), name="mine")


def test_a_new_run_never_gets_a_directory_that_is_there(config, monkeypatch):
    monkeypatch.setattr(rundir.time, "strftime", lambda form: "20260101-000000")
    first = rundir.create(config)
    (first / "metrics.jsonl").write_text("precious")
    names = [rundir.create(config).name for _ in range(3)]
    assert [first.name, *names] == ["20260101-000000"] + [f"20260101-000000-{number}" for number in (2, 3, 4)]
    assert (first / "metrics.jsonl").read_text() == "precious"
    assert first.parent.name == "mine"


@pytest.mark.timeout(5)
@pytest.mark.parametrize("place", ["runs", "runs/mine"])
def test_a_file_in_the_place_of_the_directory(config, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("a file")
    with pytest.raises(ConfigError, match="the run directory cannot be made"):
        rundir.create(config)


def test_a_place_that_may_not_be_written(config, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rundir.Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match="cannot be made: Permission denied") as caught:
        rundir.create(config)
    assert "set runs_dir" in caught.value.fix


def test_the_lock_refuses_a_second_process_and_goes_with_the_first(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process is training in this run directory"):
            rundir.lock(tmp_path)
    finally:
        process.kill()
        process.communicate()
    with rundir.lock(tmp_path):
        pass


def test_the_configuration_of_an_earlier_leg_is_kept(config, tmp_path):
    for steps in (10, 20, 20, 30):
        rundir.write_config(tmp_path, replace(config, train=replace(config.train, max_steps=steps)))
    kept = [yaml.safe_load((tmp_path / f"config.leg{leg}.yaml").read_text())["train"]["max_steps"] for leg in (0, 1)]
    assert kept == [10, 20]
    assert read_config(tmp_path / "config.yaml").train.max_steps == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.leg0.yaml", "config.leg1.yaml", "config.yaml"]


def test_checkpoints_lie_in_the_run_or_apart_from_other_runs(config, tmp_path):
    runs = [tmp_path / "runs" / "mine" / stamp for stamp in ("1", "2")]
    assert rundir.checkpoints_dir(runs[0], config) == runs[0] / "checkpoints"
    elsewhere = replace(config, checkpoint=CheckpointConfig(dir="/fast"))
    assert [str(rundir.checkpoints_dir(run, elsewhere)) for run in runs] == ["/fast/mine/1", "/fast/mine/2"]


def test_facts_of_a_run_survive_and_a_cut_file_is_a_new_start(tmp_path):
    assert rundir.read_run(tmp_path) == {"legs": []}
    rundir.write_run(tmp_path, {"legs": [{"start_step": 0}], "parameters": 7})
    assert rundir.read_run(tmp_path) == {"legs": [{"start_step": 0}], "parameters": 7}
    path = tmp_path / rundir.RUN
    path.write_text(path.read_text()[:-5])
    assert rundir.read_run(tmp_path) == {"legs": []}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    rundir.write_run(tmp_path, {"legs": [1]})

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rundir.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        rundir.write_run(tmp_path, {"legs": [1, 2]})
    assert rundir.read_run(tmp_path) == {"legs": [1]}
