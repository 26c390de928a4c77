"""The directory of a run: never another run's, held by one process, and nothing of an earlier leg lost."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from orchestrator.config.compose import read_config
from orchestrator.config.schema import CheckpointConfig, RunConfig
from orchestrator.errors import CheckpointError, ConfigError, RunDirectoryError
from orchestrator.observe.sink import SideChannels
from orchestrator.runs import record, run_directory
from orchestrator.runs.record import Record

HOLD = """
import sys
from pathlib import Path
from orchestrator.runs import run_directory
held = run_directory.lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path):
    return replace(RunConfig(), runs_dir=str(tmp_path / "runs"), name="mine")


def test_a_new_run_never_gets_a_directory_that_is_there(config, monkeypatch):
    monkeypatch.setattr(run_directory.time, "strftime", lambda form: "20260101-000000")
    first = run_directory.create(config)
    (first / "metrics.jsonl").write_text("precious")
    names = [run_directory.create(config).name for _ in range(3)]
    assert [first.name, *names] == ["20260101-000000"] + [f"20260101-000000-{number}" for number in (2, 3, 4)]
    assert (first / "metrics.jsonl").read_text() == "precious"
    assert first.parent.name == "mine"


@pytest.mark.timeout(5)
@pytest.mark.parametrize("place", ["runs", "runs/mine"])
def test_a_file_in_the_place_of_the_directory(config, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("a file")
    with pytest.raises(ConfigError, match="the run directory cannot be made"):
        run_directory.create(config)


def test_a_place_that_may_not_be_written(config, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_directory.Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match="cannot be made: Permission denied") as caught:
        run_directory.create(config)
    assert "set runs_dir" in caught.value.fix


def test_the_lock_refuses_a_second_process_and_goes_with_the_first(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process is training in this run directory"):
            run_directory.lock(tmp_path)
    finally:
        process.kill()
        process.communicate()
    with run_directory.lock(tmp_path):
        pass


def test_the_configuration_of_an_earlier_leg_is_kept(config, tmp_path):
    for steps in (10, 20, 20, 30):
        run_directory.write_config(tmp_path, replace(config, train=replace(config.train, max_steps=steps)))
    kept = [yaml.safe_load((tmp_path / f"config.leg{leg}.yaml").read_text())["train"]["max_steps"] for leg in (0, 1)]
    assert kept == [10, 20]
    assert read_config(tmp_path / "config.yaml").train.max_steps == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.leg0.yaml", "config.leg1.yaml", "config.yaml"]


def test_checkpoints_lie_in_the_run_or_apart_from_other_runs(config, tmp_path):
    runs = [tmp_path / "runs" / "mine" / stamp for stamp in ("1", "2")]
    assert run_directory.checkpoints_dir(runs[0], config) == runs[0] / "checkpoints"
    elsewhere = replace(config, checkpoint=CheckpointConfig(dir="/fast"))
    assert [str(run_directory.checkpoints_dir(run, elsewhere)) for run in runs] == ["/fast/mine/1", "/fast/mine/2"]


def test_facts_of_a_run_survive_and_a_cut_file_is_a_new_start(tmp_path):
    assert run_directory.read_run(tmp_path) == {"legs": []}
    run_directory.write_run(tmp_path, {"legs": [{"start_step": 0}], "parameters": 7})
    assert run_directory.read_run(tmp_path) == {"legs": [{"start_step": 0}], "parameters": 7}
    path = tmp_path / run_directory.RUN
    path.write_text(path.read_text().rstrip()[:-5])
    assert run_directory.read_run(tmp_path) == {"legs": []}


@pytest.fixture
def full_disk(monkeypatch):
    """A disk on which no file can be made or grow."""
    full = [False]
    write_bytes = run_directory.Path.write_bytes

    def refuse(path, *args, **options):
        if full[0]:
            raise OSError(28, "No space left on device")
        return write_bytes(path, *args, **options)

    monkeypatch.setattr(run_directory.Path, "write_bytes", refuse)
    return full


def test_on_a_full_disk_the_status_is_written_over_the_old_one(tmp_path, full_disk):
    said = []
    kept = Record(
        tmp_path, {"legs": [], "name": "mine", "left_out": ["sample"]}, {"leg": 0}, SideChannels(said.append), True
    )
    kept.begin()
    assert run_directory.read_run(tmp_path)["status"] == "running"
    assert "left_out" not in run_directory.read_run(tmp_path)
    full_disk[0] = True
    kept.end("finished", 20, ["evaluation"])
    facts = run_directory.read_run(tmp_path)
    assert (facts["status"], facts["left_out"], facts["legs"][0]["end_step"]) == ("finished", ["evaluation"], 20)
    assert said == []
    assert [path.name for path in tmp_path.iterdir()] == [run_directory.RUN]


def test_a_status_that_cannot_be_written_is_tried_again_and_said(tmp_path, full_disk, monkeypatch, capsys):
    said, channels = [], None
    channels = SideChannels(said.append)
    kept = Record(tmp_path, {"legs": []}, {"leg": 0}, channels, True)
    full_disk[0] = True
    kept.begin()
    assert said == ["run.json cannot be written: No space left on device; the run goes on and it is tried again"]
    monkeypatch.setattr(record, "LAST_TRIES_SECONDS", 0.6)
    kept.end("failed", 3, [])
    assert "the status 'failed' cannot be written to run.json; trying for 0.6 s" in capsys.readouterr().err
    channels.close()
    assert said[1:] == ["run.json could not be written to the end: No space left on device"]
    full_disk[0] = False
    kept.end("failed", 3, [])
    assert run_directory.read_run(tmp_path)["status"] == "failed"


def test_no_room_at_the_start_is_one_clear_error(tmp_path, config, full_disk):
    full_disk[0] = True
    with (
        pytest.raises(RunDirectoryError, match="cannot be written: No space left on device") as caught,
        run_directory.writing(tmp_path),
    ):
        run_directory.write_config(tmp_path, config)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == [], "nothing half written"


def test_a_directory_in_which_no_lock_can_be_made(tmp_path, monkeypatch):
    def refuse(self, **options):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(run_directory.FileLock, "acquire", refuse)
    with pytest.raises(RunDirectoryError, match="the run directory cannot be held: Read-only file system"):
        run_directory.lock(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    run_directory.write_run(tmp_path, {"legs": [1]})

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        run_directory.write_run(tmp_path, {"legs": [1, 2]})
    assert run_directory.read_run(tmp_path) == {"legs": [1]}
