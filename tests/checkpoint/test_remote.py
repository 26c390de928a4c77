"""Checkpoints in object stores: servers of S3 and of Google's over HTTP, and fsspec's memory. The manifest last."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
import uuid
from types import SimpleNamespace

import fsspec.config
import pytest
import torch

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytest.importorskip("gcp_storage_emulator")

from orchestrator.checkpoint import storage, store_timeouts, tensorfile
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.run_checkpoints import committed, newest_valid, prune, remove_uncommitted
from orchestrator.checkpoint.storage import (
    children,
    claim,
    is_remote,
    locate,
    read_range,
    remove_file,
    remove_tree,
    size_of,
    there,
    write_file,
)
from orchestrator.errors import CheckpointError, MissingExtraError
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.shard import Shard
from tests.lab.checkpoints import shards_of, write
from tests.lab.store import reachable, serve

TENSORS = {
    "model.a": torch.arange(20.0).reshape(5, 4),
    "model.b": torch.arange(7, dtype=torch.bfloat16),
    "optimizer.step.b": torch.tensor(3.0),
}
# Of 6 MiB each: parts of 5 MiB, the least that S3 allows, are parts of any store.
BIG = {f"model.{number}": torch.arange(1536.0 * 1024).reshape(1536, 1024) + number for number in range(3)}


# What waits before it tries again, of a store's library.
_WAITS = {"s3": "aiobotocore.endpoint", "gs": "gcsfs.retry"}


def pytest_generate_tests(metafunc):
    """What asks for `remote` runs on each server, what asks for `parent` also in memory."""
    if "server" in metafunc.fixturenames:
        kinds = ["s3", "gs", "memory"] if "parent" in metafunc.fixturenames else ["s3", "gs"]
        metafunc.parametrize("server", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def server(request):
    if request.param == "memory":
        yield None
        return
    with serve(request.param) as store, reachable(store):
        yield store


@pytest.fixture
def remote(server, monkeypatch):
    """An empty prefix of the server; faults of an earlier test are gone, and nobody waits long before trying again."""
    server.faults.clear()
    server.requests.clear()
    monkeypatch.setattr(store_timeouts, "_PAUSE_SECONDS", 0.01)
    where = locate(f"{server.place}/{uuid.uuid4().hex}")
    hurried = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 100))
    monkeypatch.setattr(importlib.import_module(_WAITS[server.scheme]), "asyncio", hurried)
    yield where
    server.faults.clear()


@pytest.fixture
def parent(server, request):
    if server is None:
        return locate(f"memory://{uuid.uuid4().hex}")
    return request.getfixturevalue("remote")


def _write(parent, whole=TENSORS, layout=Layout(fsdp=2), step=1, **options):
    results = write(parent, lambda rank: shards_of(whole, layout, rank), layout.devices, step, **options)
    assert len({str(result) for result in results}) == 1, results
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _check(path, whole=TENSORS, layout=Layout()):
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    for rank in range(layout.devices):
        shards = shards_of(whole, layout, rank)
        for shard in shards:
            shard.data.fill_(1)
        read_into(checkpoint, shards)
        for shard in shards:
            assert torch.equal(shard.data, whole[shard.name][shard.slices]), shard.name


@pytest.mark.parametrize("layout", [Layout(), Layout(fsdp=3), Layout(replicate=2, tensor=2)])
def test_what_is_written_there_is_read_on_any_layout(parent, layout):
    path = _write(parent)
    assert is_remote(path)
    assert str(path) == f"{str(parent).rstrip('/')}/step-00000001"
    _check(path, layout=layout)
    assert Checkpoint(path).state() == {"step": 1}
    assert Checkpoint(path).config() == {"name": "test", "seed": 1}


def test_the_manifest_object_is_the_last(remote, server):
    path = _write(remote, extra={"tokenizer.json": b"{}"})
    puts = [text.rpartition("/")[2] for text in server.matching("^COMMIT")]
    assert puts[-1] == MANIFEST
    assert {"rank-00000.safetensors", "rank-00001.safetensors", "state.json", "config.yaml", "tokenizer.json"} < set(
        puts
    )
    assert {child.name for child in children(path)} == {*Checkpoint(path).manifest.files, MANIFEST}


def test_the_newest_is_found_and_old_ones_go(parent):
    paths = [_write(parent, step=step) for step in (1, 2, 3)]
    write_file(parent / "step-00000004" / "rank-00000.safetensors", [b"half"])
    assert [path.name for path in committed(parent)] == ["step-00000003", "step-00000002", "step-00000001"]
    assert [str(path) for path in remove_uncommitted(parent)] == [f"{str(parent).rstrip('/')}/step-00000004"]
    assert not there(parent / "step-00000004")
    content = read_range(paths[2] / "state.json", 0, 1 << 20)
    write_file(paths[2] / "state.json", [content[:-1] + bytes([content[-1] ^ 1])])
    said = []
    assert str(newest_valid(parent, True, said.append)) == str(paths[1])
    assert "step-00000003" in said[0]
    assert [path.name for path in prune(parent, 1, None)] == ["step-00000002", "step-00000001"]
    assert [child.name for child in children(parent)] == ["step-00000003"]


def test_a_committed_checkpoint_is_not_written_over(parent):
    first = _write(parent)
    before = read_range(first / MANIFEST, 0, 1 << 20)
    assert _write(parent).name == "step-00000001.2"
    assert read_range(first / MANIFEST, 0, 1 << 20) == before


def test_nothing_there(parent):
    assert committed(parent) == []
    assert remove_uncommitted(parent) == []
    with pytest.raises(CheckpointError, match="it has no manifest"):
        Checkpoint(parent / "step-00000001")


def test_a_large_file_goes_in_parts_that_are_tried_again(remote, server, monkeypatch):
    monkeypatch.setattr(storage, "_MULTIPART_BYTES", 5 << 20)
    once = [
        server.fail(r"^START .*safetensors", times=1),
        server.fail(r"^PART 2 .*safetensors", times=1),
        server.fail(r"^PART 2 .*safetensors", status=0, times=1),
        server.fail(r"^COMMIT .*safetensors", times=1),
        server.fail(r"^COMMIT .*/manifest\.json", times=1),
        server.fail(r"^COMMIT .*/state\.json", times=1, status=500),
        server.fail(r"^LIST ", times=1),
    ]
    path = _write(remote, BIG, Layout())
    assert [fault.seen for fault in once] == [1] * 7
    assert len(server.matching(r"^PART \d")) >= 2
    server.fail(r"^GET .*/rank-00000\.safetensors", times=1)
    _check(path, BIG)


def test_an_answer_that_was_lost_changes_nothing(remote, server, monkeypatch):
    """The store did what it was asked, and is asked again."""
    monkeypatch.setattr(storage, "_MULTIPART_BYTES", 5 << 20)
    once = [
        server.fail(pattern, status=0, times=1, answer_lost=True)
        for pattern in (r"^START ", r"^PART 1 ", r"^COMMIT .*/manifest\.json", r"^COMMIT .*/owner\.json", r"^DELETE ")
    ]
    assert claim(remote / "owner.json", b"mine") == b"mine"
    path = _write(remote, BIG, Layout())
    _check(path, BIG)
    remove_file(path / MANIFEST)
    assert [fault.seen for fault in once] == [1] * 5
    server.fail(r"^DELETE ", times=1, answer_lost=True)
    remove_tree(path)
    assert [child.name for child in children(remote)] == ["owner.json"]


@pytest.mark.parametrize("what", [r"^PART 2 .*rank-00001\.safetensors", r"^COMMIT .*/manifest\.json"])
def test_a_writer_that_fails_midway_leaves_the_earlier_checkpoint_and_nothing_else(remote, server, monkeypatch, what):
    monkeypatch.setattr(storage, "_MULTIPART_BYTES", 5 << 20)
    whole = {name: tensor.repeat(2, 1) for name, tensor in BIG.items()}
    earlier, unfinished = _write(remote), server.unfinished()
    fault = server.fail(what, status=403)
    with pytest.raises(CheckpointError, match="step 2 could not be written") as caught:
        _write(remote, whole, step=2)
    assert fault.seen
    assert "told to fail" in str(caught.value)
    assert [child.name for child in children(remote)] == ["step-00000001"]
    assert server.unfinished() == unfinished
    assert bool(server.matching("^ABORT ")) == ("PART" in what)
    assert str(newest_valid(remote, True, pytest.fail)) == str(earlier)
    server.faults.clear()
    _check(_write(remote, whole, step=2), whole)


def test_a_store_that_does_not_answer_is_a_clear_error(remote, server):
    nowhere = locate(f"{server.scheme}://no-such-bucket/x")
    with pytest.raises(CheckpointError, match=r"could not be written: .*[Bb]ucket") as caught:
        _write(nowhere)
    assert "http" not in str(caught.value)
    assert server.matching("^BUCKET") == [], "a bucket is not made by mistake"
    with pytest.raises(CheckpointError, match="no manifest"):
        Checkpoint(nowhere / "step-00000001")
    refused = server.fail(".", status=403)
    with pytest.raises(OSError, match="told to fail") as denied:
        claim(remote / "owner.json", b"mine")
    assert isinstance(denied.value, PermissionError)
    assert refused.seen == 1, "who may not is not asked again"
    with pytest.raises(CheckpointError, match="cannot be listed"):
        committed(remote)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(remote)


WAITS = {
    "no answer to the manifest": {"pattern": r"^COMMIT .*/manifest\.json", "hold_seconds": 6},
    "no manifest for ever": {"pattern": r"^COMMIT .*/manifest\.json", "status": 503},
    "no answer to a tensor file": {"pattern": r"^COMMIT .*safetensors", "hold_seconds": 6},
}


@pytest.mark.parametrize("fault", WAITS.values(), ids=WAITS)
def test_a_store_that_keeps_silent_is_waited_for_a_while(remote, server, monkeypatch, fault):
    """The save fails in a bounded time, with one error; what was there stays, and a later save goes well."""
    earlier = _write(remote)
    monkeypatch.setattr(store_timeouts, "_limit", 1.5)
    server.fail(**fault)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match="step 2 could not be written: ") as caught:
        _write(remote, step=2)
    assert time.monotonic() - begin < 20
    assert str(remote) in str(caught.value)
    if "hold_seconds" in fault:
        operation = "commit" if "manifest" in fault["pattern"] else "write"
        assert f"not answered within 1.5 s ({operation} {remote}/step-00000002/" in str(caught.value)
        assert "checkpoint.store_timeout_seconds" in str(caught.value)
    server.faults.clear()
    server.requests.clear()
    monkeypatch.setattr(store_timeouts, "_limit", 60)
    time.sleep(1)
    assert server.matching("^(COMMIT|PART|START)") == [], "what nobody waits for is not sent again"
    assert str(newest_valid(remote, True, pytest.fail)) == str(earlier)
    _check(_write(remote, step=2))
    remove_uncommitted(remote)
    assert len(children(remote)) == 2


def test_a_manifest_whose_answer_is_lost_in_time_counts(remote, server, monkeypatch):
    """The store has committed and keeps silent: what it says when it is asked again is what is true."""
    monkeypatch.setattr(store_timeouts, "_limit", 3)
    server.fail(r"^COMMIT .*/manifest\.json", hold_seconds=6, answer_lost=True)
    path = _write(remote)
    server.faults.clear()
    monkeypatch.setattr(store_timeouts, "_limit", 60)
    _check(path)


def test_a_manifest_that_appears_late_finds_its_files(remote, server, monkeypatch):
    """The save has failed, as the store said nothing; it had carried it out."""
    monkeypatch.setattr(store_timeouts, "_limit", 3)
    server.fail(r"^COMMIT .*/manifest\.json", hold_seconds=6, answer_lost=True)
    server.fail(r"^GET .*/manifest\.json", status=403)
    with pytest.raises(CheckpointError, match="the store may still do it, so its files stay"):
        _write(remote)
    server.faults.clear()
    monkeypatch.setattr(store_timeouts, "_limit", 60)
    _check(newest_valid(remote, True, pytest.fail))


def test_an_upload_in_parts_ends_with_its_time(remote, server, monkeypatch):
    monkeypatch.setattr(storage, "_MULTIPART_BYTES", 5 << 20)
    path = remote / "big"
    first = server.fail(r"^PART 1 ", hold_seconds=4)
    monkeypatch.setattr(store_timeouts, "_limit", 1)
    with pytest.raises(TimeoutError, match=rf"not answered within 1 s \(write {path}"):
        write_file(path, [bytes(11 << 20)])
    assert first.seen
    server.faults.clear()
    server.requests.clear()
    monkeypatch.setattr(store_timeouts, "_limit", 60)
    time.sleep(1)
    assert server.matching("^(COMMIT|PART|START)") == []
    assert size_of(path) is None


@pytest.mark.parametrize("look", [lambda path: Checkpoint(path), lambda path: committed(path.parent)])
def test_a_store_that_never_gives_an_answer_is_waited_for_a_while(remote, server, monkeypatch, look):
    path = _write(remote)
    monkeypatch.setattr(store_timeouts, "_limit", 1.5)
    server.fail("^(GET|HEAD|LIST)", hold_seconds=6)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"not answered within 1\.5 s \((read|list) {remote}"):
        look(path)
    assert time.monotonic() - begin < 20


def test_the_client_of_a_store_has_limits_of_its_own(server, monkeypatch):
    """They follow from `checkpoint.store_timeout_seconds`; what the user has set for the library counts more."""
    monkeypatch.setattr(store_timeouts, "_limit", 36)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 99}})
    files = locate(server.place).fs
    if server.scheme == "s3":
        limits = files._prepare_config_kwargs()
        assert (limits["connect_timeout"], limits["read_timeout"]) == (2, 99)
    else:
        for limits in (files.requests_timeout, files.session_kwargs["timeout"]):
            assert (limits.sock_connect, limits.sock_read) == (2, 6)


def test_names_that_are_patterns_to_a_library_are_names(parent):
    """A library that took `r[un]` for a pattern would remove the checkpoints of `ru`."""
    path, other = parent / "r[un]" / "step-00000001", parent / "ru" / "step-00000001"
    for directory in (path, other):
        write_file(directory / "f", [b"content"])
    remove_tree(path)
    assert not there(path)
    assert [child.name for child in children(other)] == ["f"]


def test_a_directory_may_hold_one_of_its_own_name(parent):
    write_file(parent / "run" / "run" / "f", [b"content"])
    assert [str(child) for child in children(parent / "run")] == [str(parent / "run" / "run")]
    assert children(parent / "run" / "run" / "f") == []


def test_an_address_of_no_known_kind():
    with pytest.raises(CheckpointError, match="address of a checkpoint is not understood"):
        locate("nope://bucket/x")


@pytest.mark.parametrize(("address", "library"), [("gs://bucket/x", "gcsfs"), ("abfs://bucket/x", "adlfs")])
def test_a_store_whose_library_is_missing(monkeypatch, address, library):
    for module in (library, f"{library}.core"):
        monkeypatch.setitem(sys.modules, module, None)
    advice = r"\[remote\]|scripts/setup remote"
    with pytest.raises(MissingExtraError, match=rf"'{library}', which is not installed(.|\n)*({advice})"):
        locate(address)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.json", MANIFEST])
def test_damage_is_found(parent, name):
    path = _write(parent)
    content = read_range(path / name, 0, 1 << 20)
    for changed in (content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], content[:-1], b""):
        write_file(path / name, [changed])
        with pytest.raises(CheckpointError):
            Checkpoint(path).verify()


def test_of_two_who_claim_a_place_one_gets_it(parent):
    assert claim(parent / "owner.json", b"first") == b"first"
    assert claim(parent / "owner.json", b"second") == b"first"
    assert claim(parent / "owner.json", b"first") == b"first"


def test_a_rank_fetches_only_what_it_needs(remote, server, monkeypatch):
    """Rows of a quarter: a quarter of the bytes, the header and nothing else."""
    whole = torch.arange(2**20, dtype=torch.float32).reshape(64, 16384)
    path = _write(remote, {"model.big": whole}, Layout(fsdp=2))
    checkpoint = Checkpoint(path)
    header = int(size_of(path / "rank-00000.safetensors") or 0) - whole.numel() * 2

    def read(rows: slice, columns: slice) -> int:
        box = (rows, columns)
        data = torch.zeros(whole[box].shape)
        server.requests.clear()
        read_into(checkpoint, [Shard("model.big", (64, 16384), box, data)])
        assert torch.equal(data, whole[box])
        return sum(count for text, count in server.requests if text.startswith("GET ") and "safetensors" in text)

    assert read(slice(8, 24), slice(0, 16384)) == 16 * 65536 + header
    # Many short stretches are many requests: then rather with what lies between them.
    assert read(slice(0, 64), slice(4096, 8192)) == whole.numel() * 4 + 2 * header
    monkeypatch.setattr(tensorfile, "_SHORTEST_REMOTE_BYTES", 16384)
    assert read(slice(0, 64), slice(4096, 8192)) == whole.numel() + 2 * header


def test_the_manifest_is_readable_by_anybody(remote):
    path = _write(remote)
    assert json.loads(read_range(path / MANIFEST, 0, 1 << 20))["step"] == 1
