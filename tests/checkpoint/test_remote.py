"""Checkpoints in object stores: a real S3 server over HTTP, and fsspec's memory. The same rule: the manifest last."""

from __future__ import annotations

import json
import uuid

import pytest
import torch

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from orchestrator.checkpoint import storage, tensorfile
from orchestrator.checkpoint.catalogue import committed, newest_valid, prune, remove_uncommitted
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.storage import children, claim, is_remote, locate, read_range, size_of, there, write_file
from orchestrator.checkpoint.verify import Checkpoint
from orchestrator.errors import CheckpointError, MissingExtraError
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.shard import Shard
from tests.lab.checkpoints import shards_of, write
from tests.lab.store import BUCKET, reachable, serve

TENSORS = {
    "model.a": torch.arange(20.0).reshape(5, 4),
    "model.b": torch.arange(7, dtype=torch.bfloat16),
    "optimizer.step.b": torch.tensor(3.0),
}
BIG = {"model.big": torch.arange(3 * 2**20, dtype=torch.float32).reshape(3072, 1024), "model.step": torch.tensor(1)}


@pytest.fixture(scope="module")
def server():
    with serve() as store, reachable(store):
        yield store


@pytest.fixture
def s3(server, monkeypatch):
    """An empty prefix of the server; faults of an earlier test are gone."""
    server.faults.clear()
    server.requests.clear()
    monkeypatch.setattr(storage, "_PAUSE_SECONDS", 0.01)
    yield locate(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    server.faults.clear()


@pytest.fixture(params=["s3", "memory"])
def parent(request):
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return locate(f"memory://{uuid.uuid4().hex}")


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


def test_the_manifest_object_is_the_last(s3, server):
    path = _write(s3, extra={"tokenizer.json": b"{}"})
    puts = [text.split("?")[0].rpartition("/")[2] for text in server.matching("^(PUT|POST)")]
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


def test_a_large_file_goes_in_parts_that_are_tried_again(s3, server, monkeypatch):
    monkeypatch.setattr(storage, "_MULTIPART_BYTES", 5 << 20)  # the least that S3 allows
    once = [
        server.fail(r"PUT .*safetensors\?.*partNumber=2", times=1),
        server.fail(r"PUT .*/manifest\.json", times=1),
        server.fail(r"PUT .*/state\.json", times=1, status="500 Internal Server Error", code="InternalError"),
        server.fail(r"GET .*list-type=2", times=1),
    ]
    path = _write(s3, BIG, Layout())
    assert [fault.seen for fault in once] == [1, 1, 1, 1]
    assert len(server.matching(r"PUT .*partNumber=\d")) >= 2
    server.fail(r"GET .*/rank-00000\.safetensors", times=1)
    _check(path, BIG)


@pytest.mark.parametrize("what", [r"PUT .*rank-00001\.safetensors\?.*partNumber=2", r"PUT .*/manifest\.json"])
def test_a_writer_that_fails_midway_leaves_the_earlier_checkpoint_and_nothing_else(s3, server, monkeypatch, what):
    monkeypatch.setattr(storage, "_MULTIPART_BYTES", 5 << 20)
    part = torch.arange(3 * 2**20, dtype=torch.float32).reshape(3072, 1024)
    whole = {f"model.{number}": part + number for number in range(3)}
    earlier = _write(s3)
    fault = server.fail(what, status="403 Forbidden", code="AccessDenied")
    with pytest.raises(CheckpointError, match="step 2 could not be written") as caught:
        _write(s3, whole, step=2)
    assert fault.seen
    assert "told to fail" in str(caught.value)
    assert [child.name for child in children(s3)] == ["step-00000001"]
    assert storage._store(s3).call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", []) == []
    assert str(newest_valid(s3, True, pytest.fail)) == str(earlier)
    server.faults.clear()
    _check(_write(s3, whole, step=2), whole)


def test_a_store_that_does_not_answer_is_a_clear_error(server, monkeypatch):
    monkeypatch.setattr(storage, "_PAUSE_SECONDS", 0.01)
    server.faults.clear()
    nowhere = locate("s3://no-such-bucket/x")
    with pytest.raises(CheckpointError, match=r"could not be written: .*bucket"):
        _write(nowhere)
    assert server.matching("PUT /no-such-bucket/?$") == [], "a bucket is not made by mistake"
    with pytest.raises(CheckpointError, match="no manifest"):
        Checkpoint(nowhere / "step-00000001")
    server.fail(".", status="403 Forbidden", code="AccessDenied")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        committed(locate(f"s3://{BUCKET}/other"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(locate(f"s3://{BUCKET}/other"))
    server.faults.clear()


def test_an_address_of_no_known_kind():
    with pytest.raises(CheckpointError, match="address of a checkpoint is not understood"):
        locate("nope://bucket/x")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match="remote"):
            locate("gs://bucket/x")


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


def test_a_rank_fetches_only_what_it_needs(s3, server, monkeypatch):
    """Rows of a quarter: a quarter of the bytes, the header and nothing else."""
    whole = torch.arange(2**20, dtype=torch.float32).reshape(64, 16384)
    path = _write(s3, {"model.big": whole}, Layout(fsdp=2))
    checkpoint = Checkpoint(path)
    header = int(size_of(path / "rank-00000.safetensors") or 0) - whole.numel() * 2

    def read(rows: slice, columns: slice) -> int:
        box = (rows, columns)
        data = torch.zeros(whole[box].shape)
        server.requests.clear()
        read_into(checkpoint, [Shard("model.big", (64, 16384), box, data)])
        assert torch.equal(data, whole[box])
        return sum(count for text, count in server.requests if "safetensors" in text)

    assert read(slice(8, 24), slice(0, 16384)) == 16 * 65536 + header
    # Many short stretches are many requests: then rather with what lies between them.
    assert read(slice(0, 64), slice(4096, 8192)) == whole.numel() * 4 + 2 * header
    monkeypatch.setattr(tensorfile, "_SHORTEST_REMOTE_BYTES", 16384)
    assert read(slice(0, 64), slice(4096, 8192)) == whole.numel() + 2 * header


def test_the_manifest_is_readable_by_anybody(s3):
    path = _write(s3)
    assert json.loads(read_range(path / MANIFEST, 0, 1 << 20))["step"] == 1
