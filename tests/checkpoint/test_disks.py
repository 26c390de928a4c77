"""File systems that are full, read-only or fail: what was there stays, nothing half done is left."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from orchestrator.checkpoint import storage
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.run_checkpoints import committed, newest_valid
from orchestrator.config.schema import CheckpointConfig, RunConfig
from orchestrator.errors import CheckpointError
from orchestrator.runs import run_directory
from orchestrator.sharding.layout import Layout
from tests.lab.checkpoints import shards_of, write

TENSORS = {"model.a": torch.rand(256, 1024), "model.b": torch.rand(300, 7)}  # a mebibyte


@pytest.fixture
def disk(tmp_path):
    """A file system of its own of 2.5 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2560k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def _write(parent, step, size=2):
    return write(parent, lambda rank: shards_of(TENSORS, Layout(fsdp=size), rank), size, step)


def _only(parent, *names):
    assert sorted(path.name for path in parent.iterdir()) == sorted(names)
    assert newest_valid(parent, True, pytest.fail).name == names[-1]


def test_a_full_disk(disk):
    for step in (1, 2):
        assert _write(disk, step)[0] == disk / f"step-0000000{step}"
    for step in (3, 4):
        for error in _write(disk, step):
            assert isinstance(error, CheckpointError)
            assert os.strerror(errno.ENOSPC) in str(error)
        _only(disk, "step-00000001", "step-00000002")
    subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
    assert _write(disk, 4)[0] == disk / "step-00000004"
    _only(disk, "step-00000001", "step-00000002", "step-00000004")


def test_a_read_only_disk(disk):
    _write(disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for error in _write(disk, 2):
        assert isinstance(error, CheckpointError)
        assert os.strerror(errno.EROFS) in str(error)
    _only(disk, "step-00000001")
    config = RunConfig(checkpoint=CheckpointConfig(dir=str(disk)))
    with pytest.raises(CheckpointError, match="directory of the checkpoints cannot be written"):
        run_directory.hold(run_directory.checkpoints_dir(disk / "run" / "1", config), disk)


def test_a_directory_that_may_not_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    _write(tmp_path, 1)
    tmp_path.chmod(0o500)
    try:
        for error in _write(tmp_path, 2):
            assert isinstance(error, CheckpointError)
    finally:
        tmp_path.chmod(0o700)
    _only(tmp_path, "step-00000001")


def test_a_file_that_may_not_grow(tmp_path):
    """As a quota: a write of half its bytes, then an error."""
    _write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        results = _write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    for error in results:
        assert os.strerror(errno.EFBIG) in str(error)
    _only(tmp_path, "step-00000001")


@pytest.mark.parametrize("operation", range(1, 30))
def test_any_write_or_flush_that_fails(tmp_path, monkeypatch, operation):
    """The n-th operation on the disk fails: the save is whole, or it is not there."""
    _write(tmp_path, 1, size=1)
    left = [operation]

    def failing(action):
        def run(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return action(*args, **options)

        return run

    for owner, name in (
        (storage._Flushed, "write"),
        (os, "fsync"),
        (type(tmp_path), "rename"),
        (type(tmp_path), "mkdir"),
    ):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    (result,) = _write(tmp_path, 2, size=1)
    monkeypatch.undo()
    found = [path.name for path in committed(tmp_path)]
    if isinstance(result, Exception):
        assert isinstance(result, CheckpointError)
        assert os.strerror(errno.EIO) in str(result)
        _only(tmp_path, "step-00000001")
    else:
        assert found == ["step-00000002", "step-00000001"]
    for path in committed(tmp_path):
        Checkpoint(path).verify()


HOLD = """
import sys, pathlib
from orchestrator.runs import run_directory
held = run_directory.hold(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_on_one_directory_of_checkpoints(tmp_path):
    place = tmp_path / "checkpoints" / "tiny" / "1"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process is training in this directory of checkpoints"):
            run_directory.hold(place, tmp_path)
    finally:
        process.kill()
        process.communicate()
    with run_directory.hold(place, tmp_path):
        pass
