"""Hashes that are checked while ranks read: every piece by somebody, and one outcome for all."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orchestrator.checkpoint import checkpoint as checkpoint_module
from orchestrator.checkpoint import storage, tensorfile
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.read_check import Checks
from orchestrator.checkpoint.reader import read_into
from orchestrator.distributed import exchange as peers_module
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.errors import CheckpointError, DamagedError
from orchestrator.sharding.layout import Layout
from tests.lab.checkpoints import ThreadPeers, files_of, shards_of, write

TENSORS = {
    "model.a": torch.arange(96.0).reshape(12, 8),
    "model.b": torch.arange(9, dtype=torch.bfloat16),
    "optimizer.step.a": torch.tensor(3.0),
    "model.empty": torch.empty(0, 4),
}
DIMS = {"model.a": 1}
LAYOUTS = {
    "alone": (Layout(), {}),
    "as saved": (Layout(fsdp=3), {}),
    "other rows": (Layout(fsdp=4), {}),
    "columns": (Layout(tensor=2), DIMS),
    "copies": (Layout(replicate=2, fsdp=2), {}),
    "more ranks than rows": (Layout(fsdp=16), {}),
}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    # Small pieces: every tensor has several, and layouts cut across them.
    monkeypatch.setattr(storage, "PIECE_BYTES", 40)
    paths = write(tmp_path, lambda rank: shards_of(TENSORS, Layout(fsdp=3), rank), 3)
    assert isinstance(paths[0], type(tmp_path)), paths
    return paths[0]


def _read(path, layout=Layout(), dims=None, whole=TENSORS, of_rank_0=None, **options):
    """What each rank has read, or raised."""
    coordinator = ThreadPeers(layout.devices)

    def rank(number):
        coordinator.enter(number)
        wanted = of_rank_0 if of_rank_0 and not number else whole
        shards = shards_of({name: torch.full_like(t, 7) for name, t in wanted.items()}, layout, number, dims)
        try:
            read_into(Checkpoint(path, look=False), shards, check=coordinator, **options)
        except CheckpointError as error:
            return error
        return shards

    with ThreadPoolExecutor(layout.devices) as pool:
        return list(pool.map(rank, range(layout.devices)))


def _flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_whole_is_read(saved, name):
    layout, dims = LAYOUTS[name]
    for shards in _read(saved, layout, dims):
        assert not isinstance(shards, Exception), shards
        for shard in shards:
            assert torch.equal(shard.data, TENSORS[shard.name][shard.slices]), shard.name


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_bit_is_checked_by_somebody(saved, name):
    """A flipped bit anywhere, whoever reads it and if nobody does, is an error on every rank: the same one."""
    layout, dims = LAYOUTS[name]
    for file in files_of(saved):
        size = (saved / file).stat().st_size
        for place in {0, size // 3, size // 2, size - 1}:
            _flip(saved / file, place)
            errors = _read(saved, layout, dims)
            assert all(isinstance(error, DamagedError) for error in errors), (file, place, errors)
            assert len({str(error) for error in errors}) == 1
            assert file in str(errors[0])
            _flip(saved / file, place)
    assert not any(isinstance(found, Exception) for found in _read(saved, layout, dims))


def test_the_damaged_tensor_and_range_are_named(saved):
    _flip(saved / "rank-00001.safetensors")
    (error,) = _read(saved)
    assert "rank-00001.safetensors bytes" in str(error.got)
    assert "model.b[3:6]" in str(error.got)


def test_as_saved_each_byte_of_the_tensors_is_read_once(saved, monkeypatch):
    """What is hashed is what was read into place: no second reading, by nobody."""
    read = []
    for module in (tensorfile, checkpoint_module):

        def counted(path, start, out, *rest, real=module.read_range_into):
            read.append((path.name, len(out)))
            return real(path, start, out, *rest)

        monkeypatch.setattr(module, "read_range_into", counted)
    for layout, dims in (LAYOUTS["as saved"], LAYOUTS["alone"]):
        read.clear()
        assert not any(isinstance(found, Exception) for found in _read(saved, layout, dims))
        sizes = {name: (saved / name).stat().st_size for name in files_of(saved)}
        scalar_on_the_others = 4 * (layout.devices - 1)
        assert sum(size for _, size in read) == sum(sizes.values()) + scalar_on_the_others


def test_what_nobody_reads_whole_is_shared_out(saved, monkeypatch):
    """Two ranks that read columns have no piece whole: each then checks half of them."""
    checked = []
    real = checkpoint_module.Checkpoint.damage

    def counted(self, progress=None, places=None):
        places = list(places)
        checked.append([place for place in places if place.file.endswith("safetensors")])
        return real(self, lambda done: None, places)

    monkeypatch.setattr(checkpoint_module.Checkpoint, "damage", counted)
    monkeypatch.setattr(tensorfile, "_SHORTEST_BYTES", 1)
    _read(saved, Layout(tensor=2), DIMS)
    first, second = checked
    assert abs(len(first) - len(second)) <= 2
    assert not {(place.file, place.start) for place in first} & {(place.file, place.start) for place in second}


@pytest.mark.parametrize("rank", [0, 2])
def test_what_one_rank_cannot_read_is_told_by_all(saved, rank, monkeypatch):
    """A rank that fails alone must not leave the others waiting."""
    real = tensorfile.TensorFile.fill

    def failing(self, start, out, *rest):
        if self._path.name == f"rank-{rank:05d}.safetensors":
            raise OSError(5, "Input/output error")
        return real(self, start, out, *rest)

    monkeypatch.setattr(tensorfile.TensorFile, "fill", failing)
    errors = _read(saved, Layout(fsdp=3))
    assert all(isinstance(error, DamagedError) for error in errors)
    assert all("Input/output error" in str(error) for error in errors)


def test_another_model_is_no_damage(saved):
    errors = _read(saved, Layout(fsdp=2), whole={**TENSORS, "model.more": torch.zeros(2)})
    assert not any(isinstance(error, DamagedError) for error in errors)
    assert all("it lacks model.more" in str(error) for error in errors)
    for wrong in ({"model.a": torch.zeros(12, 9)}, {"model.b": torch.zeros(9)}):
        errors = _read(saved, Layout(fsdp=2), whole={**TENSORS, **wrong})
        assert all("differs" in str(error) and not isinstance(error, DamagedError) for error in errors)


def test_damage_comes_before_another_problem(saved):
    """A rank whose file is gone says so, though another has been told of a dtype: an older checkpoint may do."""
    (saved / "rank-00002.safetensors").unlink()
    errors = _read(saved, Layout(fsdp=3), of_rank_0={**TENSORS, "model.b": torch.zeros(9)})
    assert all(isinstance(error, DamagedError) for error in errors)
    assert all("it is missing" in str(error) for error in errors)


def test_a_rank_that_says_nothing_is_not_waited_for_for_ever(saved, monkeypatch):
    monkeypatch.setattr(peers_module, "TIMEOUT_SECONDS", 0.2)
    coordinator = SingleProcess()
    coordinator.size = 2
    with pytest.raises(CheckpointError, match=r"rank 1 has said nothing for 0\.2 s"):
        read_into(Checkpoint(saved), shards_of(TENSORS, Layout(), 0), check=coordinator)


def test_portions_follow_the_pieces(saved):
    checkpoint = Checkpoint(saved)
    checks, places = Checks(checkpoint), list(checkpoint.places())
    for name, file in checkpoint.manifest.files.items():
        for start in range(0, file.bytes, 7):
            for stop in {start + 1, min(file.bytes, start + 50), file.bytes}:
                portions = list(checks.portions(name, start, stop))
                assert [low for low, _, _ in portions] == [start, *(high for _, high, _ in portions[:-1])]
                assert portions[-1][1] == stop
                for low, high, number in portions:
                    whole = [at for at, place in enumerate(places) if (place.file, place.start) == (name, low)]
                    inside = bool(whole) and places[whole[0]].stop == high
                    assert number == (whole[0] if inside else None)


def test_progress_tells_every_byte_of_the_tensors(saved):
    done = []
    _read(saved, progress=done.append)
    assert sum(done) == sum((saved / name).stat().st_size for name in files_of(saved))
    assert sum(done) > sum(math.prod(tensor.shape) for tensor in TENSORS.values())
