"""Any layout writes, any box is read, bit for bit; what cannot be written or believed is said, and costs no more."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from orchestrator.checkpoint import checkpoint as verify_module
from orchestrator.checkpoint import storage, writer
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST, Manifest
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.writer import Contents, save, write_safetensors
from orchestrator.errors import CheckpointError
from orchestrator.sharding.axes import MESH_AXES
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.shard import Shard
from tests.lab.checkpoints import ThreadPeers, files_of, shards_of, tamper, write, write_whole
from tests.lab.tensors import read_all

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.float64, torch.float16, torch.uint8, torch.bool)
TENSORS = {
    "model.a": torch.arange(20.0).reshape(5, 4),
    "model.b": torch.arange(7, dtype=torch.bfloat16),
    "optimizer.step.b": torch.tensor(3.0),
    "model.c": torch.arange(24).reshape(2, 3, 4),
}
# Every rank has its part of every tensor here, so there is no pipeline.
_LARGEST = {"replicate": 2, "pipeline": 1, "expert": 2}
_DEGREES = {axis: st.integers(1, _LARGEST.get(axis, 3)) for axis in MESH_AXES}
layouts = st.builds(Layout, **_DEGREES).filter(lambda la: la.devices <= 6)


@st.composite
def tensors(draw) -> dict[str, torch.Tensor]:
    """0 to 3 dims, uneven sizes, also empty; every finite bit pattern of every dtype: others are not saved."""
    result = {}
    for number in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        dtype = draw(st.sampled_from(DTYPES))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        if dtype is torch.bool:
            result[f"t{number}"] = torch.randint(0, 2, shape, generator=generator).bool()
        else:
            count = math.prod(shape) * dtype.itemsize
            raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
            finite = raw.view(dtype).float().isfinite()
            raw.view(-1, dtype.itemsize)[~finite] = 0
            result[f"t{number}"] = raw.view(dtype).reshape(shape)
    return result


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _blank(shards: list[Shard]) -> list[Shard]:
    for shard in shards:
        shard.data.fill_(1)
    return shards


def _same(shards: list[Shard], whole: dict[str, torch.Tensor]) -> None:
    for shard in shards:
        assert _bits(shard.data) == _bits(whole[shard.name][shard.slices]), shard


def _write(parent: Path, layout: Layout, whole=TENSORS, step: int = 1, dims=None) -> Path:
    results = write(parent, lambda rank: shards_of(whole, layout, rank, dims), layout.devices, step)
    assert len(set(results)) == 1, results
    assert isinstance(results[0], Path)
    return results[0]


@settings(max_examples=60, deadline=None)
@given(tensors(), layouts, layouts, st.data())
def test_any_layout_reads_what_any_layout_wrote(whole, ours, theirs, data):
    dims = [{name: data.draw(st.sampled_from([None, *range(t.dim())])) for name, t in whole.items()} for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        path = _write(Path(folder), ours, whole, dims=dims[0])
        checkpoint = Checkpoint(path)
        checkpoint.verify()
        for rank in range(theirs.devices):
            shards = _blank(shards_of(whole, theirs, rank, dims[1]))
            read_into(checkpoint, shards)
            _same(shards, whole)


@settings(max_examples=60, deadline=None)
@given(tensors(), layouts, st.data())
def test_any_box_is_read(whole, layout, data):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(_write(Path(folder), layout, whole))
        shards = []
        for name, tensor in whole.items():
            ends = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in tensor.shape]
            box = tuple(slice(a, b) for a, b in ends)
            shards.append(Shard(name, tuple(tensor.shape), box, torch.ones_like(tensor[box])))
        read_into(checkpoint, shards)
        _same(shards, whole)


def test_a_view_is_filled_in_place(tmp_path):
    path = _write(tmp_path, Layout(fsdp=3))
    memory = torch.zeros(8, 9)
    part = memory[1:4, 2:8:2]
    read_into(
        Checkpoint(path),
        [Shard("model.a", (5, 4), (slice(1, 4), slice(0, 3)), part)],
        ignore=["model.b", "model.c", "optimizer."],
    )
    assert torch.equal(part, TENSORS["model.a"][1:4, :3])
    assert memory.count_nonzero() == 9


def test_other_readers_understand_the_files(tmp_path):
    """The reference reader of safetensors, and one that knows only the manifest."""
    path = _write(tmp_path, Layout(fsdp=2, context=2, tensor=2), dims={"model.a": 1})
    floats = {name: tensor for name, tensor in TENSORS.items() if tensor.is_floating_point()}
    files = [load_file(path / name) for name in files_of(path) if name.endswith(".safetensors")]
    assert sum(tensor.numel() for file in files for tensor in file.values()) == sum(
        tensor.numel() for tensor in TENSORS.values()
    )
    for name, tensor in read_all(_write(tmp_path, Layout(fsdp=3), floats, step=2)).items():
        assert _bits(tensor) == _bits(floats[name])


def test_each_rank_writes_only_what_it_owns(tmp_path):
    path = _write(tmp_path, Layout(replicate=2, fsdp=2), {"model.a": TENSORS["model.a"]})
    assert sorted(files_of(path)) == sorted(
        ["config.yaml", "rank-00000.safetensors", "rank-00001.safetensors", "state.json", "sums.json"]
    )
    assert load_file(path / "rank-00001.safetensors")["model.a#0"].tolist() == TENSORS["model.a"][3:].tolist()


def test_nothing_but_the_manifests_files_is_left(tmp_path):
    path = _write(tmp_path, Layout(fsdp=4))
    assert {file.name for file in path.iterdir()} == {*files_of(path), MANIFEST}


def test_what_travels_along(tmp_path):
    extra = {"tokenizer.json": b"{}", "tokenizer_config.json": b"\0\xff"}
    path = write_whole(tmp_path, TENSORS, step=12, extra=extra, state={"step": 12, "data": {"next_sequence": 96}})
    found = Checkpoint(path)
    assert path.name == "step-00000012"
    assert (found.step, found.state()["data"]["next_sequence"]) == (12, 96)
    assert found.config() == {"name": "test", "seed": 1}
    assert {name: (path / name).read_bytes() for name in extra} == extra
    assert extra.keys() <= found.manifest.files.keys()


def test_the_written_file_is_the_formats(tmp_path):
    stored = write_safetensors(tmp_path / "f", list(TENSORS), list(TENSORS.values()))
    assert stored.bytes == (tmp_path / "f").stat().st_size
    assert int.from_bytes((tmp_path / "f").read_bytes()[:8], "little") % 8 == 0
    for name, tensor in load_file(tmp_path / "f").items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_tensors_that_are_no_plain_memory(tmp_path):
    whole = {
        "a": torch.arange(12.0).reshape(3, 4).T,
        "b": torch.arange(10.0)[::3],
        "c": torch.ones(2, 2).expand(3, 2, 2),
    }
    path = write_whole(tmp_path, whole)
    for name, tensor in read_all(path).items():
        assert torch.equal(tensor, whole[name])


# The order of things


def test_the_manifest_comes_last_by_a_rename(tmp_path, monkeypatch):
    seen: list[tuple[str, bool]] = []
    real_sync, real_rename = os.fsync, Path.rename

    def rename(self, target):
        files = {path.name for path in self.parent.iterdir()}
        seen.append((Path(target).name, {"rank-00000.safetensors", "state.json", "config.yaml"} <= files))
        assert not Path(target).exists()
        synced.append("rename")
        return real_rename(self, target)

    synced: list[str] = []

    def fsync(handle):
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        return real_sync(handle)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(os, "fsync", fsync)
    path = write_whole(tmp_path, TENSORS, extra={"tokenizer.json": b"{}"})
    assert seen == [(MANIFEST, True)]
    before = synced[: synced.index("rename")]
    assert {"rank-00000.safetensors", "state.json", "config.yaml", "tokenizer.json", f"{MANIFEST}.partial"} <= set(
        before
    )
    assert synced[synced.index("rename") + 1 :] == [path.name, tmp_path.name], "the names too are on disk"


def test_a_save_that_stops_before_its_end_is_no_checkpoint(tmp_path, monkeypatch):
    def die(*unused):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "commit_ranks", die)
    coordinator = ThreadPeers(1)
    coordinator.enter(0)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, shards_of(TENSORS, Layout(), 0), coordinator, Contents({}, {}))
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        Checkpoint(tmp_path / "step-00000001")
    monkeypatch.undo()
    (tmp_path / "step-00000001" / "rank-00007.json").write_text("left over")
    path = write_whole(tmp_path, TENSORS)
    assert path.name == "step-00000001"
    assert {file.name for file in path.iterdir()} == {*files_of(path), MANIFEST}


@pytest.mark.parametrize("damaged", [False, True])
def test_a_committed_directory_is_never_written_over(tmp_path, damaged):
    first = write_whole(tmp_path, TENSORS)
    if damaged:
        (first / MANIFEST).write_text("{")
    before = {file.name: file.read_bytes() for file in first.iterdir()}
    assert write_whole(tmp_path, TENSORS).name == "step-00000001.2"
    assert write_whole(tmp_path, TENSORS).name == "step-00000001.3"
    assert {file.name: file.read_bytes() for file in first.iterdir()} == before


# Failing to write


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("what", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("out of memory")])
def test_a_rank_that_cannot_write(tmp_path, monkeypatch, failing, what):
    layout = Layout(fsdp=3)
    earlier = _write(tmp_path, layout, step=1)
    real = writer.write_safetensors

    def full(path, keys, tensors, *hash):
        if f"{failing:05d}" in path.name:
            real(path, keys[:1], tensors[:1])  # the disk is full in the middle of it
            raise what
        return real(path, keys, tensors, *hash)

    monkeypatch.setattr(writer, "write_safetensors", full)
    results = write(tmp_path, lambda rank: shards_of(TENSORS, layout, rank), 3, step=2)
    for error in results:
        assert isinstance(error, CheckpointError), error
        assert "the checkpoint of step 2 could not be written" in str(error)
        assert f"{what.strerror if isinstance(what, OSError) else what} (rank {failing})" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == [earlier.name]
    Checkpoint(earlier).verify()
    monkeypatch.undo()
    assert _write(tmp_path, layout, step=2).name == "step-00000002"


@pytest.mark.parametrize("name", ["state.json", "config.yaml", "tokenizer.json", f"{MANIFEST}.partial"])
def test_rank_0_cannot_commit(tmp_path, monkeypatch, name):
    real = storage.write_file

    def full(path, parts, *hash):
        if path.name == name:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(path, parts, *hash)

    for module in (writer, storage):
        monkeypatch.setattr(module, "write_file", full)
    shards = lambda rank: shards_of(TENSORS, Layout(fsdp=2), rank)  # noqa: E731
    results = write(tmp_path, shards, 2, extra={"tokenizer.json": b"{}"})
    assert os.strerror(errno.EDQUOT) in str(results[0])
    assert all(isinstance(error, CheckpointError) for error in results)
    assert not list(tmp_path.iterdir())


def test_ranks_that_do_not_cover_the_model_hang_nobody(tmp_path):
    """A disk that the hosts do not share, or a wrong strategy: rank 0 finds out, all are told."""

    def lost(rank):
        return [] if rank == 1 else shards_of(TENSORS, Layout(fsdp=2), rank)

    results = write(tmp_path, lost, 2)
    assert "do not cover it exactly once" in str(results[0])
    assert all(isinstance(error, CheckpointError) for error in results), results
    assert not list(tmp_path.iterdir())


def test_ranks_that_disagree_on_a_tensor_hang_nobody(tmp_path):
    def other(rank):
        whole = TENSORS if rank == 0 else {**TENSORS, "model.b": TENSORS["model.b"].float()}
        return shards_of(whole, Layout(fsdp=2), rank)

    results = write(tmp_path, other, 2)
    assert "ranks disagree on tensor 'model.b'" in str(results[0])
    assert all(isinstance(error, CheckpointError) for error in results), results


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "file", tmp_path / "file" / "below"):
        results = write(parent, lambda rank: shards_of(TENSORS, Layout(fsdp=2), rank), 2)
        assert all(isinstance(error, CheckpointError) for error in results), results


def test_a_state_that_is_no_json_hangs_nobody(tmp_path):
    results = write(tmp_path, lambda rank: shards_of(TENSORS, Layout(fsdp=2), rank), 2, state={"x": {1, 2}})
    assert all(isinstance(error, CheckpointError) for error in results), results
    assert not list(tmp_path.iterdir())


def test_a_left_over_that_cannot_be_removed_hangs_nobody(tmp_path, monkeypatch):
    (tmp_path / "step-00000001").mkdir()

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(writer, "remove_tree", refuse)
    results = write(tmp_path, lambda rank: shards_of(TENSORS, Layout(fsdp=2), rank), 2)
    assert "Permission denied" in str(results[0])
    assert all(isinstance(error, CheckpointError) for error in results), results


# Damage


@pytest.fixture
def saved(tmp_path):
    return _write(tmp_path, Layout(fsdp=2))


FILES = ["rank-00000.safetensors", "rank-00001.safetensors", "state.json", "config.yaml", "sums.json"]


def test_the_list_of_files_is_complete(saved):
    assert sorted(FILES) == sorted(files_of(saved))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_cut(saved, name):
    whole = (saved / name).read_bytes()
    for content in (whole[:-1], b"", whole + b"x", None):
        (saved / name).unlink(missing_ok=True)
        if content is not None:
            (saved / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"file '{name}' of the checkpoint is damaged"):
            Checkpoint(saved)
    (saved / name).mkdir()
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_bit_that_flipped(saved, name):
    whole = (saved / name).read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        (saved / name).write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="does not match its hash") as caught:
            Checkpoint(saved).verify()
        assert f" {name} " in str(caught.value).splitlines()[0]
        holds = {"rank-00000.safetensors": ("", "model.c[0:1, 0:3, 0:4]")}.get(name)
        assert holds is None or place == len(whole) // 2 or holds[place > 0] in str(caught.value.got)
    (saved / name).write_bytes(whole)
    Checkpoint(saved).verify()


def test_all_damaged_files_are_named(saved):
    for name in FILES[:3]:
        data = (saved / name).read_bytes()
        (saved / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(saved).verify()
    assert {one.file for one in Checkpoint(saved).damage()} == set(FILES[:3])
    assert all(name in str(caught.value).splitlines()[0] for name in FILES[:3])


def test_a_file_that_goes_away_while_it_is_used(saved):
    checkpoint = Checkpoint(saved)
    for name in FILES:
        (saved / name).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.verify()
    with pytest.raises(CheckpointError, match="damaged"):
        read_into(checkpoint, shards_of(TENSORS, Layout(), 0))
    with pytest.raises(CheckpointError, match=r"'state\.json' of the checkpoint is damaged"):
        checkpoint.state()
    with pytest.raises(CheckpointError, match=r"'config\.yaml' of the checkpoint is damaged"):
        checkpoint.config()


@pytest.mark.parametrize("text", [b"[1]  ", b"\xff\xfe", b"{", b"[" * 5_000, b"!!python/name:os.system", b"a: b: c"])
def test_a_state_or_configuration_that_is_none(saved, text):
    checkpoint = Checkpoint(saved)
    for name, read in (("state.json", checkpoint.state), ("config.yaml", checkpoint.config)):
        (saved / name).write_bytes(text)
        with pytest.raises(CheckpointError, match=f"file '{name}' of the checkpoint is damaged"):
            read()


def test_verifying_reports_every_byte(saved, monkeypatch):
    monkeypatch.setattr(verify_module, "READ_BYTES", 64)
    done: list[int] = []
    Checkpoint(saved).verify(done.append)
    assert sum(done) == sum((saved / name).stat().st_size for name in FILES)
    assert max(done) == 64


def test_a_header_of_ill_will_is_a_checkpoint_error(saved):
    """Right size, and nobody verified."""
    path = saved / FILES[0]
    data = path.read_bytes()
    for start in (b"\xff" * 8, (10**9).to_bytes(8, "little"), data[:8] + b"["):
        path.write_bytes(start + data[len(start) :])
        with pytest.raises(CheckpointError, match="damaged"):
            read_into(Checkpoint(saved), shards_of(TENSORS, Layout(), 0))


def test_a_shard_that_is_not_what_the_manifest_says(saved):
    keys = json.loads((saved / MANIFEST).read_text())["tensors"]

    def swap(data):
        data["tensors"]["model.a"]["shards"][0]["key"] = keys["model.c"]["shards"][0]["key"]

    tamper(saved, swap)
    with pytest.raises(CheckpointError, match="a shard is not what the manifest says"):
        read_into(Checkpoint(saved), shards_of(TENSORS, Layout(), 0))
    tamper(saved, lambda data: data["tensors"]["model.a"]["shards"][0].update(key="nothing"))
    with pytest.raises(CheckpointError, match="nothing: missing"):
        read_into(Checkpoint(saved), shards_of(TENSORS, Layout(), 0))


# Another model


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        ({**TENSORS, "model.new": torch.ones(1)}, ["another model", "it lacks model.new", "in addition: nothing"]),
        (
            {name: t for name, t in TENSORS.items() if name != "model.b"},
            ["another model", "it lacks nothing", "model.b"],
        ),
        ({**TENSORS, "model.a": torch.ones(4, 5)}, ["'model.a' differs", "F32 (5, 4)", "F32 (4, 5)"]),
        ({**TENSORS, "model.a": TENSORS["model.a"].double()}, ["'model.a' differs", "F64"]),
        ({**TENSORS, "model.b": TENSORS["model.b"].half()}, ["'model.b' differs", "BF16", "F16"]),
        ({**TENSORS, "optimizer.step.b": torch.ones(1)}, ["'optimizer.step.b' differs", "()", "(1,)"]),
    ],
)
def test_a_checkpoint_of_another_model(saved, whole, words):
    with pytest.raises(CheckpointError) as caught:
        read_into(Checkpoint(saved), shards_of(whole, Layout(), 0))
    for word in words:
        assert word in str(caught.value)


def test_a_long_list_of_differences_is_short(saved):
    whole = {f"model.x{number}": torch.ones(1) for number in range(50)}
    with pytest.raises(CheckpointError, match=r"model\.x0, model\.x1, model\.x10 and 47 more"):
        read_into(Checkpoint(saved), shards_of(whole, Layout(), 0))


def test_what_is_ignored_need_not_be_wanted(saved):
    model = {name: tensor for name, tensor in TENSORS.items() if name.startswith("model.")}
    shards = _blank(shards_of(model, Layout(), 0))
    read_into(Checkpoint(saved), shards, ignore=["optimizer."])
    _same(shards, model)


# Strangers


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickle_among_the_files_is_never_loaded(saved, tmp_path):
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    for name in ("data.pkl", "model.pt", "optimizer.bin", "rank-00002.safetensors", "tokenizer.pkl"):
        (saved / name).write_bytes(bomb)
    checkpoint = Checkpoint(saved)
    checkpoint.verify()
    shards = _blank(shards_of(TENSORS, Layout(), 0))
    read_into(checkpoint, shards)
    _same(shards, TENSORS)
    for name in FILES:
        size = (saved / name).stat().st_size
        (saved / name).write_bytes(bomb[:size].ljust(size, b"\0"))
    with pytest.raises(CheckpointError):
        checkpoint.verify()
    for read in (checkpoint.state, checkpoint.config, lambda: read_into(checkpoint, shards)):
        with pytest.raises(CheckpointError):
            read()
    assert not trace.exists()
    pickle.loads(bomb)
    assert trace.exists(), "the bomb works"


def test_the_manifest_is_read_back_by_any_json_and_yaml(saved):
    assert yaml.safe_load((saved / "config.yaml").read_text())["name"] == "test"
    assert Manifest.read(saved).step == json.loads((saved / MANIFEST).read_text())["step"] == 1
