"""Several hosts and slices, as far as they go without them: processes that meet and save together, made-up devices."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lab.cli import only_run, run
from tests.lab.hosts import finish, start_hosts
from tests.lab.runs import checkpoint, losses, read_rows, small_overrides
from tests.lab.slow import slow
from tests.lab.tensors import read_all

LAYOUT = ["hardware=tpu", "hardware.simulate=8", "layout.replicate=2", "layout.fsdp=2", "layout.tensor=2"]


def overrides(tmp: Path, *words: str) -> list[str]:
    return small_overrides(tmp, *LAYOUT, "train.max_steps=6", "checkpoint.every_steps=3", *words)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run directory of the job in one process."""
    tmp = tmp_path_factory.mktemp("alone")
    ((code, _, errors),) = finish(start_hosts(1, overrides(tmp)))
    assert code == 0, errors
    return only_run(tmp / "runs")


def same(first: Path, second: Path) -> None:
    before, after = read_all(first), read_all(second)
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key


def test_hosts_train_and_save_as_one(alone, tmp_path):
    """The same losses; each host writes what its devices own, and together that is everything once."""
    for code, _, errors in finish(start_hosts(2, overrides(tmp_path))):
        assert code == 0, errors
    run_dir = only_run(tmp_path / "runs")
    assert losses(read_rows(run_dir)) == losses(read_rows(alone))
    same(checkpoint(run_dir, 6), checkpoint(alone, 6))


@pytest.mark.parametrize(
    ("layout", "writers"),
    [
        (["layout.replicate=1", "layout.fsdp=8", "layout.tensor=1"], 2),
        pytest.param(["layout.replicate=1", "layout.fsdp=2", "layout.tensor=4"], 2, marks=slow),
        (["layout.replicate=8", "layout.fsdp=1", "layout.tensor=1"], 1),
    ],
)
def test_every_element_has_one_owner(tmp_path, layout, writers):
    """The commit's own check refuses an element that nobody or two hosts have written. Copies are the first host's."""
    words = overrides(tmp_path, *layout, "train.max_steps=1", "checkpoint.every_steps=1")
    for code, _, errors in finish(start_hosts(2, words)):
        assert code == 0, errors
    saved = checkpoint(only_run(tmp_path / "runs"), 1)
    assert len(list(saved.glob("rank-*.safetensors"))) == writers
    assert {name.partition(".")[0] for name in read_all(saved)} == {"model", "optimizer"}


def test_hosts_resume_what_hosts_have_saved(alone, tmp_path):
    words = overrides(tmp_path)
    for code, _, errors in finish(start_hosts(2, words, resume=str(checkpoint(alone, 3)))):
        assert code == 0, errors
    run_dir = only_run(tmp_path / "runs")
    # The rows of the first steps came along with the checkpoint: one curve.
    assert losses(read_rows(run_dir)) == losses(read_rows(alone))
    same(checkpoint(run_dir, 6), checkpoint(alone, 6))


def test_a_signal_to_one_host_stops_all_at_one_step(tmp_path):
    words = overrides(tmp_path, "train.max_steps=2000", "checkpoint.every_steps=null")
    processes = start_hosts(2, words)
    deadline = time.monotonic() + 240
    rows = (tmp_path / "runs").glob
    while not any(path.stat().st_size for path in rows("*/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.5)
    processes[1].send_signal(signal.SIGTERM)
    for code, _, errors in finish(processes, 240):
        assert code == 143, errors
    run_dir = only_run(tmp_path / "runs")
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert read_all(saved)
    assert int(saved.name.rpartition("-")[2]) == max(row["step"] for row in read_rows(run_dir))


def test_hosts_with_different_layouts_are_all_told(tmp_path):
    other = [word for word in overrides(tmp_path) if not word.startswith("layout")] + ["layout.fsdp=8"]
    for code, _, errors in finish(start_hosts(2, [overrides(tmp_path), other]), 60):
        assert code == 2
        assert "the processes of this job do not have the same layout" in errors
        assert "replicate=2 x fsdp=2 x tensor=2, fp32, 8 devices in process 0" in errors


def test_a_host_that_was_not_started_is_missed(tmp_path):
    ((code, _, errors),) = finish(start_hosts(1, overrides(tmp_path), processes=4), 60)
    assert code == 2
    assert "4 by the runtime, 1 by the launcher" in errors
    assert "start one process on every host" in errors


def test_the_mesh_lies_over_made_up_slices(alone, tmp_path):
    """Devices that are numbered against the mesh: the same run, and shards that are where they belong."""
    ((code, _, errors),) = finish(start_hosts(1, overrides(tmp_path), slices=2))
    assert code == 0, errors
    run_dir = only_run(tmp_path / "runs")
    np.testing.assert_allclose(losses(read_rows(run_dir)), losses(read_rows(alone)), rtol=1e-5)
    after, before = read_all(checkpoint(run_dir, 6)), read_all(checkpoint(alone, 6))
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=1e-3, atol=1e-5)


def test_copies_of_the_model_are_whole_on_each_slice(tmp_path):
    words = [word for word in overrides(tmp_path) if not word.startswith("layout")] + ["layout.fsdp=8"]
    ((code, _, errors),) = finish(start_hosts(1, words, slices=2), 60)
    assert code == 2
    assert "layout.replicate=1 on 2 slices" in errors


def test_virtual_devices_are_not_spread_over_hosts():
    """What torchrun and srun set, before anything is started or written."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    done = run("train", "hardware=tpu", "hardware.simulate=4", env=torchrun)
    assert done.returncode == 2
    assert "several hosts cannot be rehearsed" in done.stderr
    assert "hardware.simulate=8" in done.stderr
