"""Single bits, and the ways in which other libraries lose data without a word: none of them here."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST, SIGNATURE
from orchestrator.checkpoint.reader import read_into
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.errors import CheckpointError
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.shard import Shard
from tests.lab.checkpoints import files_of, shards_of, tamper, write
from tests.lab.tensors import read_all

FLIPS = 1000


@pytest.mark.parametrize(("how", "hash"), [("verify", "sha256"), ("read", "blake3")])
def test_every_bit_that_flips_is_detected(tmp_path, how, hash):
    """Random positions, spread over all files alike: manifest, signature, state, configuration, tokenizer, tensors."""
    pytest.importorskip("blake3")
    signing = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives import serialization

    from orchestrator.checkpoint.signing import signer

    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(signing.Ed25519PrivateKey.generate().private_bytes(*plain))
    whole = {"model.a": torch.rand(40, 8), "model.b": torch.rand(7).bfloat16(), "optimizer.step.a": torch.tensor(3.0)}
    layout = Layout(fsdp=2)
    results = write(
        tmp_path,
        lambda rank: shards_of(whole, layout, rank),
        2,
        extra={"tokenizer.json": b'{"version": "1.0"}'},
        config={"name": "test", "nested": {"lr": 1e-3, "list": [1, 2]}},
        sign=signer(str(tmp_path / "key.pem")),
        hash=hash,
    )
    path = results[0]
    files = {name: (path / name).read_bytes() for name in [*files_of(path), MANIFEST, SIGNATURE]}
    assert {file.name for file in path.iterdir()} == files.keys()

    def read() -> None:
        shards = shards_of({name: torch.zeros_like(tensor) for name, tensor in whole.items()}, Layout(), 0)
        read_into(Checkpoint(path), shards, check=SingleProcess())

    check = read if how == "read" else lambda: Checkpoint(path).verify()
    check()
    chance, missed = random.Random(0), []
    for number in range(FLIPS):
        name = sorted(files)[number % len(files)]
        place, bit = chance.randrange(len(files[name])), chance.randrange(8)
        changed = bytearray(files[name])
        changed[place] ^= 1 << bit
        (path / name).write_bytes(changed)
        try:
            check()
            missed.append((name, place, bit))
        except CheckpointError:
            pass
        (path / name).write_bytes(files[name])
    assert not missed
    check()


def _save(tmp_path, shards, size):
    results = write(tmp_path, shards, size)
    assert len(set(results)) == 1, results
    return results[0]


def test_partly_replicated_tensors_are_kept_once_and_whole(tmp_path):
    """Lost by torch_xla's SPMDSavePlanner, which drops every tensor with local replicas."""
    layout = Layout(replicate=2, fsdp=2, tensor=2)
    whole = {"model.a": torch.rand(6, 8), "model.norm": torch.rand(5), "optimizer.step": torch.tensor(7.0)}
    path = _save(tmp_path, lambda rank: shards_of(whole, layout, rank, {"model.a": 1}), layout.devices)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in read_all(path).items())
    held = sum(t.numel() for name in files_of(path) if "rank" in name for t in load_file(path / name).values())
    assert held == sum(tensor.numel() for tensor in whole.values()), "one copy of each element"


@pytest.mark.parametrize("owners", [0, 2])
def test_replicas_without_one_owner_are_refused(tmp_path, owners):
    def shards(rank):
        return [Shard("model.a", (4,), (slice(0, 4),), torch.ones(4), owned=rank < owners)]

    for error in write(tmp_path, shards, 2):
        if owners:
            assert "do not cover it exactly once" in str(error)
    if not owners:
        # Nobody said that there is such a tensor; the reader misses it.
        path = next(tmp_path.glob("step-*"))
        with pytest.raises(CheckpointError, match=r"it lacks model\.a"):
            read_into(Checkpoint(path), shards(0))


def test_several_shards_of_a_tensor_in_one_process(tmp_path):
    """Lost by HuggingFaceStorageWriter, which names what it saves by tensor: the last shard wins."""
    whole = torch.arange(35.0).reshape(7, 5)
    cuts = [(0, 2), (2, 3), (3, 7)]

    def shards(rank):
        rows = [cut for number, cut in enumerate(cuts * 2) if number % 2 == rank]
        halves = [slice(0, 2), slice(2, 5)]
        return [
            Shard("model.a", (7, 5), (slice(*cut), halves[number]), whole[slice(*cut), halves[number]].clone())
            for cut in dict.fromkeys(rows)
            for number in ((0, 1) if rows.count(cut) == 2 else (rank,))
        ]

    parts = [shard for rank in range(2) for shard in shards(rank)]
    assert max(sum(shard.name == "model.a" for shard in shards(rank)) for rank in range(2)) > 1
    assert sum(shard.data.numel() for shard in parts) == whole.numel()
    assert torch.equal(read_all(_save(tmp_path, shards, 2))["model.a"], whole)


def test_tensors_without_dims(tmp_path):
    """Zeroed by HuggingFaceStorageWriter's consolidation: AdamW's step."""
    whole = {"optimizer.step.a": torch.tensor(1234.0), "optimizer.step.b": torch.tensor(-5), "flag": torch.tensor(True)}
    path = _save(tmp_path, lambda rank: shards_of(whole, Layout(fsdp=2), rank), 2)
    shards = shards_of({name: torch.zeros_like(tensor) for name, tensor in whole.items()}, Layout(), 0)
    read_into(Checkpoint(path), shards)
    for shard in shards:
        assert torch.equal(shard.data, whole[shard.name])
        assert shard.data.shape == ()


@pytest.mark.parametrize("victim", range(3))
def test_a_shard_that_is_missing(tmp_path, victim):
    """Not noticed by HuggingFaceStorageReader. Here neither by the writer nor by the reader is it passed over."""
    whole = {"model.a": torch.rand(9, 2)}
    layout = Layout(fsdp=3)
    results = write(tmp_path, lambda rank: [] if rank == victim else shards_of(whole, layout, rank), 3)
    assert all("do not cover it exactly once" in str(error) for error in results if "rank" not in str(error))
    assert all(isinstance(error, CheckpointError) for error in results)
    path = _save(tmp_path, lambda rank: shards_of(whole, layout, rank), 3)
    tamper(path, lambda data: data["tensors"]["model.a"]["shards"].pop(victim))
    with pytest.raises(CheckpointError, match="do not cover it exactly once"):
        Checkpoint(path)


def test_a_file_of_an_earlier_save_is_not_mixed_in(tmp_path):
    """Stale shards in the directory win in HuggingFaceStorageReader."""
    path = tmp_path / "step-00000001"
    _save(tmp_path, lambda rank: shards_of({"model.a": torch.zeros(8)}, Layout(fsdp=4), rank), 4)
    (path / MANIFEST).unlink()
    whole = {"model.a": torch.rand(8)}
    assert _save(tmp_path, lambda rank: shards_of(whole, Layout(fsdp=2), rank), 2) == path
    assert "rank-00003.safetensors" not in {file.name for file in path.iterdir()}
    assert torch.equal(read_all(path)["model.a"], whole["model.a"])


@pytest.mark.parametrize("rows", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("ranks", [2, 4])
def test_uneven_and_empty_parts(tmp_path, rows, ranks):
    """Fewer rows than ranks, rows that do not divide, none at all; no padding is stored."""
    whole = {"model.a": torch.rand(rows, 3), "model.b": torch.rand(1)}
    path = _save(tmp_path, lambda rank: shards_of(whole, Layout(fsdp=ranks), rank), ranks)
    checkpoint = Checkpoint(path)
    assert checkpoint.manifest.tensors["model.a"].shape == (rows, 3)
    stored = sum(shard.stop[0] - shard.start[0] for shard in checkpoint.manifest.tensors["model.a"].shards)
    assert stored == rows
    shards = shards_of({name: torch.zeros_like(tensor) for name, tensor in whole.items()}, Layout(fsdp=3), 0)
    read_into(checkpoint, shards)
    assert all(torch.equal(shard.data, whole[shard.name][shard.slices]) for shard in shards)


def test_a_shard_that_was_padded_is_refused(tmp_path):
    """Memory of 4 rows for a part of 3: what is stored must be the part, without the padding."""

    def padded(rank):
        rows = slice(0, 4) if rank == 0 else slice(4, 7)
        return [Shard("model.a", (7, 2), (rows, slice(0, 2)), torch.zeros(4, 2))]

    for error in write(tmp_path, padded, 2):
        assert isinstance(error, CheckpointError)
        assert "its memory is not its box" in str(error)
    assert not list(tmp_path.iterdir())


def test_the_bytes_that_a_rank_reads(tmp_path, monkeypatch):
    """Of each file the header once, and of the tensors what the rank holds: by rows, and by columns."""
    from orchestrator.checkpoint import storage, tensorfile

    whole = {"model.a": torch.rand(64, 1024), "model.step": torch.tensor(1.0)}
    path = _save(tmp_path, lambda rank: shards_of(whole, Layout(fsdp=4), rank), 4)
    checkpoint = Checkpoint(path)
    read = []
    for name in ("read_range", "read_range_into", "read_runs"):
        real = getattr(storage, name)

        def counted(path, *args, real=real, name=name):
            sizes = {
                "read_range": lambda: args[1] - args[0],
                "read_range_into": lambda: len(args[1]),
                "read_runs": lambda: len(args[2]),
            }
            read.append(sizes[name]())
            return real(path, *args)

        monkeypatch.setattr(tensorfile, name, counted)
    headers = sum((path / name).stat().st_size for name in files_of(path) if name.endswith(".safetensors"))
    headers -= sum(tensor.numel() * 4 for tensor in whole.values())
    cases = {"rows": (Layout(fsdp=2), None), "columns": (Layout(tensor=2), {"model.a": 1})}
    for name, (layout, dims) in cases.items():
        for rank in range(2):
            read.clear()
            shards = shards_of(whole, layout, rank, dims)
            read_into(checkpoint, shards)
            wanted = sum(shard.data.numel() * 4 for shard in shards)
            assert wanted <= sum(read) <= wanted + headers, (name, rank)


def test_one_tensor_is_never_whole_in_memory_beside_its_place(tmp_path, monkeypatch):
    """A part by columns is fetched in portions of a bounded size."""
    from orchestrator.checkpoint import tensorfile

    monkeypatch.setattr(tensorfile, "_PART_BYTES", 1 << 16)
    whole = {"model.a": torch.rand(256, 1024)}
    path = _save(tmp_path, lambda rank: shards_of(whole, Layout(), rank), 1)
    shards = shards_of({"model.a": torch.zeros(256, 1024)}, Layout(tensor=2), 1, {"model.a": 1})
    checkpoint = Checkpoint(path)
    largest = []
    real = np.empty
    monkeypatch.setattr(tensorfile.np, "empty", lambda shape, *args: largest.append(shape) or real(shape, *args))
    read_into(checkpoint, shards)
    monkeypatch.undo()
    assert torch.equal(shards[0].data, whole["model.a"][:, 512:])
    assert 0 < max(largest) <= 1 << 16
