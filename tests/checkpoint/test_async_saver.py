"""Saving beside the training: what was there at the call is what is kept, one at a time, and errors come back."""

from __future__ import annotations

import errno
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orchestrator.checkpoint import writer
from orchestrator.checkpoint.async_saver import Saver
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import NOT_COVERED
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.checkpoint.writer import Contents
from orchestrator.distributed import exchange as peers_module
from orchestrator.errors import CheckpointError, SaveError
from orchestrator.sharding.layout import Layout
from tests.lab.checkpoints import ThreadPeers, shards_of
from tests.lab.tensors import read_all

TENSORS = {"model.a": torch.arange(20.0).reshape(5, 4), "optimizer.step.a": torch.tensor(3.0)}
CONTENTS = Contents({"step": 1}, {"name": "test"})


@pytest.fixture
def held(monkeypatch):
    """Writers stop before their first byte until the event is set."""
    event, real = threading.Event(), writer.write_safetensors

    def wait(*args):
        assert event.wait(10)
        return real(*args)

    monkeypatch.setattr(writer, "write_safetensors", wait)
    return event


def _saver(folder, asynchronous=True, size=1, **options):
    return Saver(folder, ThreadPeers(size).as_rank(0), asynchronous, **options)


def _shards():
    return shards_of(TENSORS, Layout(), 0)


def test_what_is_kept_is_what_was_there_at_the_call(tmp_path, held):
    saver, shards = _saver(tmp_path), _shards()
    saver.save(1, shards, CONTENTS)
    assert saver.busy
    for shard in shards:
        shard.data.zero_()
    held.set()
    path = saver.wait()
    Checkpoint(path).verify()
    for name, tensor in read_all(path).items():
        assert torch.equal(tensor, TENSORS[name])
    assert saver.wait() is None, "told once"


def test_without_a_thread_the_memory_itself_is_written(tmp_path):
    saver = _saver(tmp_path, asynchronous=False)
    saver.save(1, _shards(), CONTENTS)
    assert not saver.busy
    assert saver._copies == []
    Checkpoint(saver.wait()).verify()


def test_one_at_a_time(tmp_path, held):
    saver, shards = _saver(tmp_path), _shards()
    saver.save(1, shards, CONTENTS)
    threading.Timer(0.3, held.set).start()
    shards[0].data.add_(1)
    saver.save(2, shards, CONTENTS)
    assert [path.name for path in committed(tmp_path)][-1] == "step-00000001", "the first is kept before the second"
    second = read_all(saver.wait())
    assert torch.equal(second["model.a"], TENSORS["model.a"] + 1)
    assert torch.equal(read_all(tmp_path / "step-00000001")["model.a"], TENSORS["model.a"])


def test_the_copies_are_made_once(tmp_path):
    saver = _saver(tmp_path)
    saver.save(1, _shards(), CONTENTS)
    places = [copy.data_ptr() for copy in saver._copies]
    saver.save(2, _shards(), CONTENTS)
    assert [copy.data_ptr() for copy in saver._copies] == places
    saver.wait()


def test_memory_that_was_prepared_is_used(tmp_path):
    saver = _saver(tmp_path)
    saver.prepare(_shards())
    saver.join()
    places = [copy.data_ptr() for copy in saver._copies]
    assert places
    saver.save(1, _shards(), CONTENTS)
    assert [copy.data_ptr() for copy in saver._copies] == places
    Checkpoint(saver.wait()).verify()


def test_what_was_prepared_for_other_shards_is_not(tmp_path):
    saver = _saver(tmp_path)
    saver.prepare(shards_of({"model.b": torch.zeros(3)}, Layout(), 0))
    saver.save(1, _shards(), CONTENTS)
    assert torch.equal(read_all(saver.wait())["model.a"], TENSORS["model.a"])


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_reaches_who_waits_and_the_next_save_works(tmp_path, monkeypatch, asynchronous):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver = _saver(tmp_path, asynchronous)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_safetensors", full)
        saver.save(1, _shards(), CONTENTS)
        with pytest.raises(CheckpointError, match=r"step 1 could not be written: No space left on device \(rank 0\)"):
            saver.wait()
    assert committed(tmp_path) == []
    saver.save(2, _shards(), CONTENTS)
    assert saver.wait() == tmp_path / "step-00000002"


def test_ranks_of_a_thread_each_end_alike(tmp_path, monkeypatch):
    """Rank 1 cannot write: both are told its reason, and nothing is left."""
    real, coordinator, layout = writer.write_safetensors, ThreadPeers(2), Layout(fsdp=2)

    def full(path, *args):
        if "00001" in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args)

    monkeypatch.setattr(writer, "write_safetensors", full)
    seen = []

    def rank(number):
        saver = Saver(tmp_path, coordinator.as_rank(number), True, seen.append)
        saver.save(1, shards_of(TENSORS, layout, number), CONTENTS)
        with pytest.raises(CheckpointError, match=r"Input/output error \(rank 1\)"):
            saver.wait()
        monkeypatch.undo()
        saver.save(2, shards_of(TENSORS, layout, number), CONTENTS)
        return saver.wait()

    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(rank, range(2)))
    assert paths == [tmp_path / "step-00000002"] * 2
    assert seen == [tmp_path / "step-00000002"], "rank 0 alone, and only of what counts"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_rank_that_says_nothing_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(peers_module, "TIMEOUT_SECONDS", 0.2)
    coordinator = ThreadPeers(1)
    coordinator.size = 2
    saver = Saver(tmp_path, coordinator.as_rank(0), True)
    saver.save(1, _shards(), CONTENTS)
    with pytest.raises(CheckpointError, match=r"rank 1 has said nothing for 0\.2 s"):
        saver.wait()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "free space there"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "free space there"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "get permission to write there"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "get permission to write there"),
        (CheckpointError(f"the shards of 'x' {NOT_COVERED}"), "let all hosts see one directory"),
        (ValueError("a mistake of ours"), "this is a defect: please report it"),
    ],
)
def test_the_advice_fits_the_cause(tmp_path, monkeypatch, error, remedy):
    def refuse(*args):
        raise error

    monkeypatch.setattr(writer, "write_rank", refuse)
    saver = _saver(tmp_path)
    saver.save(1, _shards(), CONTENTS)
    with pytest.raises(SaveError, match=f"could not be written: {re.escape(str(error.args[-1]))}") as caught:
        saver.wait()
    assert caught.value.fix.startswith((remedy, "see that every host can write there"))
    assert remedy in caught.value.fix
    assert caught.value.fix.endswith("earlier checkpoints are untouched")
