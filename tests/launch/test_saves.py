"""A save works whatever was done at its step, and where it cannot work that is found out before the first step."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.errors import ConfigError, SaveError
from orchestrator.runs import shared_folder
from orchestrator.runs.shared_folder import check_shared
from tests.lab.checkpoints import ThreadPeers
from tests.lab.runs import TINY, checkpoint, small_config, work_ranks
from tests.lab.tensors import read_all

SHORT = (
    *TINY,
    "train.max_steps=4",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=2",
)
LAYOUTS = {
    "fsdp2": ("layout.fsdp=2",),
    "fsdp2_tensor2": ("layout.fsdp=2", "layout.tensor=2"),
    "replicate2_fsdp2": ("layout.replicate=2", "layout.fsdp=2"),
}


@pytest.mark.parametrize(
    ("layout", "handover"), [("fsdp2", False), ("fsdp2", True), ("fsdp2_tensor2", False), ("replicate2_fsdp2", False)]
)
def test_a_save_at_the_step_of_an_evaluation_and_a_sample(tmp_path, layout, handover):
    words, size = LAYOUTS[layout], 2 if layout == "fsdp2" else 4
    words = (*SHORT, *words, f"checkpoint.handover.enabled={str(handover).lower()}")
    looked = small_config(tmp_path, *words, "train.eval_every=2", "train.sample.every_steps=2")
    assert work_ranks(looked, size, tmp_path / "looked") == [0] * size
    saved = [checkpoint(tmp_path / "looked", step) for step in (2, 4)]
    for path in saved:
        Checkpoint(path).verify()
    if layout == "fsdp2" and not handover:
        only_trained = small_config(tmp_path, *words, "train.sample.tokens=1")
        work_ranks(only_trained, size, tmp_path / "trained")
        for path in saved:
            found, wanted = read_all(path), read_all(tmp_path / "trained" / "checkpoints" / path.name)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def _check(folders, monkeypatch, known=None):
    monkeypatch.setattr(shared_folder, "WAIT_SECONDS", 0.3)
    peers = ThreadPeers(len(folders))

    def run(rank):
        try:
            check_shared(folders[rank], peers.as_rank(rank), here=f"host{rank}", known=known and folders[rank] / known)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(run, range(len(folders))))


def test_hosts_that_share_no_folder_are_named_before_the_first_step(tmp_path, monkeypatch):
    ours, other = tmp_path / "ours", tmp_path / "other"
    assert _check([ours] * 3, monkeypatch) == [None] * 3
    assert list(ours.iterdir()) == [], "nothing is left"
    errors = _check([ours, ours, other, other], monkeypatch)
    assert {type(error) for error in errors} == {ConfigError}
    for error in errors:
        assert "not seen by rank 2 on host2, rank 3 on host3" in str(error)
        assert "checkpoint.dir=s3://BUCKET/PREFIX" in str(error)


def test_a_directory_of_checkpoints_that_cannot_be_written_is_said_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file")
    errors = _check([tmp_path / "file" / "checkpoints"] * 2, monkeypatch)
    assert {type(error) for error in errors} == {SaveError}
    assert "the directory of the checkpoints cannot be written: Not a directory" in str(errors[0])


def test_a_run_that_goes_on_needs_no_room_for_it(tmp_path, monkeypatch, caplog):
    def full(path, parts):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared_folder, "write_file", full)
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir()
    (ours / "manifest.json").touch()
    assert {type(error) for error in _check([ours] * 2, monkeypatch)} == {SaveError}, "a new run needs it"
    with caplog.at_level("WARNING", "orchestrator"):
        assert _check([ours] * 2, monkeypatch, known="manifest.json") == [None] * 2
    assert "has no room (No space left on device); the run goes on" in caplog.text
    assert {type(error) for error in _check([ours, other], monkeypatch, known="manifest.json")} == {ConfigError}
