"""Replica groups of torchft's: the same numbers as plain HSDP, and groups that are killed and come back."""

from __future__ import annotations

import json
import os
import signal
import time
from importlib.util import find_spec

import pytest

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.distributed.replica_group import replica_group
from orchestrator.errors import ConfigErrors, HardwareError
from orchestrator.training.check import check_run
from tests.lab.replica_groups import GroupRun, kill_in_turn
from tests.lab.runs import TINY, assert_trained_alike, small_config, train
from tests.lab.slow import cases

# Not imported here: the product says how much its native part prints, before the first import.
pytestmark = pytest.mark.skipif(find_spec("torchft") is None, reason="the extra torchft is not installed")

TORCHFT = "launch.fault_tolerance=torchft"
TOLERANCE = 0.05  # of the final validation loss, relative to a run in which nobody was killed
LAYOUTS = {
    "groups of 2": ["layout.fsdp=2"],
    "groups of 1": ["layout.fsdp=1"],
    "tensor": ["layout.fsdp=1", "layout.tensor=2"],
    "context": ["layout.fsdp=1", "layout.context=2"],
    "experts": ["layout.fsdp=1", "layout.expert=2", "model.moe.experts=4", "model.moe.mlp_dim=32"],
    "dropout": ["layout.fsdp=2", "model.dropout=0.1"],
}


@pytest.mark.parametrize("name", cases(LAYOUTS, quick=["groups of 2"]))
def test_all_groups_train_as_plain_hsdp(tmp_path, name):
    words = [*LAYOUTS[name], "layout.replicate=2", "train.eval_every=20"]
    size = 2 if name == "groups of 1" else 4
    config = small_config(tmp_path, *words, f"hardware.devices={size}", TORCHFT)
    run = GroupRun(config, tmp_path / "groups")
    ended = run.run()
    assert ended.code == 0, (tmp_path / "groups" / "log-0").read_text()
    plain = train(small_config(tmp_path, *words), size, tmp_path / "plain")
    assert_trained_alike(run.rows(), plain, 1e-5)
    assert all(row["skipped_tokens"] == 0 for row in run.rows() if "loss" in row)
    ours, theirs = (committed(tmp_path / which / "checkpoints") for which in ("groups", "plain"))
    assert [path.name for path in ours] == [path.name for path in theirs], "one group has saved, each step once"
    for path in ours:
        Checkpoint(path).verify()


@pytest.mark.parametrize(
    ("kills", "steps", "pace", "words"),
    [
        pytest.param(2, 240, 0.05, ["layout.fsdp=1"], id="2 kills"),
        pytest.param(20, 800, 0.05, ["layout.fsdp=2"], id="20 kills", marks=pytest.mark.slow),
    ],
)
def test_a_killed_group_comes_back_and_the_other_goes_on(tmp_path, kills, steps, pace, words):
    found = kill_in_turn(tmp_path, kills, steps, pace, words)
    print(found)
    assert found.loss == pytest.approx(found.whole_loss, rel=TOLERANCE)


def test_a_request_to_stop_reaches_all_groups_at_one_step(tmp_path):
    words = ["layout.replicate=2", "layout.fsdp=1", "train.max_steps=100000", "hardware.devices=2", TORCHFT]
    run = GroupRun(small_config(tmp_path, *TINY, *words), tmp_path / "run", pace=0.02)

    def stop():
        while len(run.rows()) < 5:
            time.sleep(0.05)
        os.kill(run.current(1).ranks[0], signal.SIGTERM)

    ended = run.run(stop)
    assert ended.code == 143
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "interrupted"
    newest = committed(tmp_path / "run" / "checkpoints")[0]
    assert Checkpoint(newest).step == record["legs"][0]["end_step"]


@pytest.mark.parametrize(
    ("words", "strategy", "said"),
    [
        (["layout.replicate=1", "layout.fsdp=2"], "dtensor", "there is one"),
        (["layout.replicate=2", "layout.fsdp=1"], "xla", "XLA compiles all copies into one program"),
        (["layout.replicate=2", "layout.pipeline=2", "layout.fsdp=1"], "dtensor", "have no pipelines"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, words, strategy, said):
    config = small_config(tmp_path, *words, "model.layers=2", TORCHFT)
    devices = 4 if "layout.pipeline=2" in words else 2
    with pytest.raises(ConfigErrors, match=said):
        check_run(config, devices, strategy=strategy)


def test_a_process_without_a_group_is_refused(tmp_path):
    with pytest.raises(HardwareError, match="replica group"):
        replica_group({})
