"""Snapshots in the memory of hosts: torn at every operation, damaged, of strangers, and too many of them."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from orchestrator.checkpoint.host_memory import HostMemory, Hosts
from orchestrator.checkpoint.memory_folder import STALE_SECONDS, MemoryFolder
from orchestrator.checkpoint.memory_restore import files_for, find_snapshots
from orchestrator.checkpoint.memory_saver import write_snapshot
from orchestrator.checkpoint.reader import Reader, read_into
from orchestrator.checkpoint.signing import Trust
from orchestrator.checkpoint.writer import Contents
from orchestrator.distributed.coordinator import coordinator_of
from orchestrator.distributed.lane import Lane, pack, unpack
from orchestrator.errors import CheckpointError, NonFiniteError, SaveError
from orchestrator.sharding.layout import Layout
from tests.lab import faults
from tests.lab.checkpoints import shards_of
from tests.lab.ranks import run_ranks

RUN, OTHER = "a" * 32, "b" * 32


def _tensors(step):
    return {"model.a": torch.full((300, 40), float(step)), "optimizer.step.a": torch.tensor(float(step))}


def _write(memory, step, **options):
    contents = Contents({"step": step}, {"name": "test"}, {"tokenizer.json": b"{}"}, **options)
    return write_snapshot(memory, step, shards_of(_tensors(step), Layout(), 0), contents)


def _open(root, run=RUN):
    return HostMemory.open(root, run, Lane(0, 1))


def _steps(memory, newer_than=-1, report=lambda text: None):
    return [snapshot.manifest.step for snapshot in find_snapshots(memory, newer_than, report)]


def test_the_last_one_stays_and_is_whole(tmp_path):
    memory = _open(tmp_path)
    for step in (1, 2, 3):
        assert _write(memory, step) == memory.folder.path / f"step-{step:08d}"
    assert _steps(memory) == [3]
    (snapshot,) = find_snapshots(memory, 2, pytest.fail)
    checkpoint = snapshot.open(Trust())
    checkpoint.verify()
    assert torch.equal(Reader(checkpoint).tensor("model.a"), _tensors(3)["model.a"])
    assert _steps(memory, newer_than=3) == [], "storage on a tie"
    memory.keep_only(None)
    assert _steps(memory) == []


def test_killed_at_any_operation_the_newest_whole_one_is_taken(tmp_path):
    """A process writes one snapshot and then is killed at its n-th operation on files of the next one."""
    ended = set()
    for operation in range(1, 60):
        root = tmp_path / str(operation)
        root.mkdir()
        child = os.fork()
        if not child:
            memory = _open(root)
            _write(memory, 1)
            faults._die_at(operation)
            _write(memory, 2)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        memory = _open(root)
        snapshot = next(find_snapshots(memory, -1, lambda text: None))
        checkpoint = snapshot.open(Trust())
        checkpoint.verify()
        assert checkpoint.step in (1, 2)
        assert torch.equal(Reader(checkpoint).tensor("model.a"), _tensors(checkpoint.step)["model.a"])
        ended.add((os.WIFSIGNALED(status), checkpoint.step))
        if not os.WIFSIGNALED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert ended == {(True, 1), (True, 2), (False, 2)}, "killed before the commit, after it, and not at all"


def test_what_is_damaged_torn_or_unsigned_is_not_taken(tmp_path):
    memory, said = _open(tmp_path), []
    path = _write(memory, 1)
    (snapshot,) = find_snapshots(memory, -1, pytest.fail)
    with pytest.raises(CheckpointError, match="not signed"):
        snapshot.open(Trust(required=True))
    state = path / "state.json"
    state.write_bytes(state.read_bytes().replace(b"1", b"2"))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        snapshot.open(Trust())
    state.unlink()
    assert _steps(memory, report=said.append) == []
    assert "files of it are in the memory of no host that is here" in said.pop()
    (path / "manifest.json").unlink()
    assert _steps(memory, report=said.append) == []
    assert "the process ended while it was written" in said.pop()
    outside = tmp_path / "outside"
    outside.mkdir()
    (memory.folder.path / "step-00000007").symlink_to(outside)
    assert 7 not in _steps(memory), "a link is nothing"


def test_a_full_memory_keeps_the_last_one(tmp_path, monkeypatch):
    memory = _open(tmp_path)
    _write(memory, 1)
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.checkpoint.writer.write_safetensors", _full)
        with pytest.raises(SaveError, match="No space left on device"):
            _write(memory, 2)
    assert [path.name for path in memory.folder.path.glob("step-*")] == ["step-00000001"]
    with pytest.raises(NonFiniteError):
        write_snapshot(memory, 2, shards_of({"model.a": torch.tensor([torch.nan])}, Layout(), 0), Contents({}, {}))
    assert _steps(memory) == [1]


def _full(*args):
    raise OSError(28, os.strerror(28))


def test_only_a_folder_of_ones_own_is_used(tmp_path):
    mine = tmp_path / f"orchestrator-{os.geteuid()}"
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    mine.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not this user's alone"):
        MemoryFolder(tmp_path, RUN)
    mine.unlink()
    mine.mkdir(mode=0o755)
    with pytest.raises(CheckpointError, match=r"drwxr-xr-x of user \d+") as caught:
        MemoryFolder(tmp_path, RUN)
    assert "remove it" in caught.value.fix
    with pytest.raises(CheckpointError, match="there is no memory file system"):
        MemoryFolder(tmp_path / "missing", RUN)


def test_what_dead_runs_have_left_is_removed_when_it_is_old_and_nobody_holds_it(tmp_path):
    memory, other = _open(tmp_path), _open(tmp_path, OTHER)
    _write(other, 1)
    folder = other.folder.path
    _age(folder)
    assert memory.folder.clear_others() == [], "it is held"
    other.folder.release()
    _age(folder, 60)
    assert memory.folder.clear_others() == [], "its run may be about to start again"
    (tmp_path / memory.folder.path.parent / "something-else").mkdir()
    _age(folder)
    assert memory.folder.clear_others() == [folder]
    assert not folder.exists()
    assert (memory.folder.path.parent / "something-else").exists()
    again = _open(tmp_path, OTHER)
    _write(again, 1)
    again.folder.release()
    assert memory.folder.clear_others(older_than=0) == [folder], "its room is needed"


def _age(folder, seconds=STALE_SECONDS + 1):
    then = time.time() - seconds
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))


def test_the_folder_goes_with_the_last_process_that_holds_it(tmp_path):
    first, second = _open(tmp_path), _open(tmp_path)
    _write(first, 1)
    first.folder.remove()
    assert _steps(second) == [1]
    second.folder.remove()
    assert not second.folder.path.exists()
    assert _open(tmp_path).folder.path.is_dir()


@pytest.mark.parametrize(
    ("memories", "peers"),
    [
        ("aa", [None, None]),
        ("ab", [1, 0]),
        ("aabb", [2, 3, 0, 1]),
        ("abab", [1, 0, 3, 2]),
        ("aabc", [2, 2, 3, 0]),
        ("abb", [1, 0, 0]),
    ],
)
def test_every_rank_has_a_peer_on_another_host(memories, peers):
    hosts = Hosts.of(list(memories))
    assert [hosts.peer_of(rank) for rank in range(len(memories))] == peers
    for rank in range(len(memories)):
        assert all(hosts.peer_of(other) == rank for other in hosts.kept_by(rank))
    kept = [other for rank in range(len(memories)) for other in hosts.kept_by(rank)]
    assert sorted(kept) == ([] if peers[0] is None else list(range(len(memories))))


def test_messages_are_taken_apart_as_they_were_put_together():
    files = {"manifest.json": b"{}", "empty": b"", "ü": bytes(range(256))}
    assert unpack(pack(b"header", files)) == (b"header", files)
    assert unpack(pack(b"", {})) == (b"", {})


def _write_on_hosts(world, roots, victim, operation):
    """Write a snapshot on two hosts, and another during which one rank is killed."""
    parallel = coordinator_of(world, 30)
    parallel.meet("gloo")
    memory = HostMemory.open(roots[world.rank], RUN, parallel.open_lane())
    layout = Layout(fsdp=2)
    for step in (1, 2):
        if step == 2 and world.rank == victim:
            faults._die_at(operation)
        shards = shards_of(_tensors(step), layout, world.rank)
        write_snapshot(memory, step, shards, Contents({"step": step}, {"name": "test"}))


def _read_on_hosts(world, roots):
    """What two hosts bring together: the step, and whether every element is that of the step."""
    parallel = coordinator_of(world, 30)
    parallel.meet("gloo")
    memory = HostMemory.open(roots[world.rank], RUN, parallel.open_lane())
    snapshot = next(find_snapshots(memory, -1, lambda text: None))
    checkpoint = snapshot.open(Trust())
    wanted = shards_of({name: torch.full_like(data, 7) for name, data in _tensors(1).items()}, Layout(), 0)
    snapshot.fetch(files_for(snapshot.manifest, wanted))
    parallel.rank, parallel.size = world.rank, world.size  # as a strategy has them
    read_into(checkpoint, wanted, check=parallel)
    step = checkpoint.step
    return step, all(torch.equal(shard.data, _tensors(step)[shard.name]) for shard in wanted)


@pytest.mark.parametrize(
    ("victim", "operation"),
    [
        (0, 3),
        (0, 8),
        (1, 2),
        *(pytest.param(rank, at, marks=pytest.mark.slow) for rank in (0, 1) for at in (1, 4, 5, 6, 12, 16, 20)),
    ],
)
def test_a_host_that_dies_while_it_writes_leaves_a_whole_one(tmp_path, victim, operation):
    roots = [tmp_path / "host0", tmp_path / "host1"]
    for root in roots:
        root.mkdir()
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, _write_on_hosts, roots, victim, operation)
    assert f"rank {victim}:\ndied without an answer" in str(caught.value)
    read = run_ranks(2, _read_on_hosts, roots)
    assert read in ([(1, True)] * 2, [(2, True)] * 2)
