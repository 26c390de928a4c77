"""DCP directories and .ckpt files: the weights come out of them, and nothing else does."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import Shard as ShardOf
from torch.distributed.tensor import distribute_tensor

from orchestrator.errors import CheckpointError
from orchestrator.interop import pickle_reader
from orchestrator.interop.dcp import write_dcp
from orchestrator.interop.pickle_reader import DcpTensors, read_state_dict
from tests.lab.ranks import run_ranks

STATE = {
    "model.a": torch.arange(12.0).reshape(3, 4),
    "model.b": torch.arange(7, dtype=torch.bfloat16),
    "model.scalar": torch.tensor(2.5),
    "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def saved(tmp_path: Path, **more: Any) -> Path:
    dcp.save({**STATE, **more}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp"


def edit(directory: Path, change: Any) -> None:
    """Change the metadata by the library's own classes."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    changed = change(metadata) or metadata
    (directory / ".metadata").write_bytes(pickle.dumps(changed))


def same(found: Any, expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_what_dcp_wrote_is_read(tmp_path):
    """Objects and integers beside the weights are passed over; those of an optimizer too are only named."""
    directory = saved(tmp_path, step=torch.tensor(3), lr=0.1, note={"deep": ["x"]}, **{"optim.m": torch.ones(2)})
    same(DcpTensors(directory), {**STATE, "optim.m": torch.ones(2)})


def _shard(world: Any, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", rank=world.rank, world_size=world.size, init_method=f"file://{folder}/rendezvous"
    )
    mesh = torch.distributed.init_device_mesh("cpu", (world.size,))
    tensors = {name: distribute_tensor(t.clone(), mesh, [ShardOf(0)]) for name, t in STATE.items() if t.dim()}
    dcp.save(tensors, checkpoint_id=f"{folder}/dcp")
    torch.distributed.destroy_process_group()


def test_shards_of_several_ranks_are_put_together(tmp_path):
    """7 rows and 3 on two ranks: uneven ones."""
    run_ranks(2, _shard, str(tmp_path))
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    same(DcpTensors(tmp_path / "dcp"), {name: tensor for name, tensor in STATE.items() if tensor.dim()})


def test_what_is_written_is_read_by_dcp(tmp_path):
    done: list[int] = []
    (tmp_path / "dcp").mkdir()
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in STATE.items()}
    write_dcp(tmp_path / "dcp", meta, STATE.__getitem__, done.append)
    assert sum(done) == sum(tensor.nbytes for tensor in STATE.values())
    found = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    same(found, STATE)
    same(DcpTensors(tmp_path / "dcp"), STATE)


# Strangers


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_planted_pickle_is_refused_and_not_executed(tmp_path, protocol):
    directory, trace = saved(tmp_path), tmp_path / "trace"
    for bomb in (Bomb(trace), [Bomb(trace)], Metadata({}, planner_data=Bomb(trace))):
        (directory / ".metadata").write_bytes(pickle.dumps(bomb, protocol))
        with pytest.raises(CheckpointError, match="nothing of it was executed"):
            DcpTensors(directory)
    assert not trace.exists()
    pickle.loads((directory / ".metadata").read_bytes())
    assert trace.exists(), "the bomb works"


@pytest.mark.parametrize(
    "name",
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.filesystem", "FileSystem"),
        ("torch", "hub.load"),
        ("pathlib", "os.system"),
        ("copyreg", "_reconstructor"),
    ],
)
def test_only_names_of_the_list_are_looked_up(tmp_path, name):
    directory = saved(tmp_path)
    module, attribute = name
    text = f"\x80\x04\x8c{chr(len(module))}{module}\x8c{chr(len(attribute))}{attribute}\x93."
    (directory / ".metadata").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="it names"):
        DcpTensors(directory)


def test_a_pickle_does_nothing_to_the_classes_that_it_names(tmp_path):
    """BUILD on a class would set its attributes; records are made anew for each."""
    directory = saved(tmp_path)
    word = lambda text: b"\x8c" + bytes([len(text)]) + text.encode()  # noqa: E731
    build = b"\x80\x04" + word("torch.distributed.checkpoint.metadata") + word("Metadata") + b"\x93"
    build += b"N}" + word("field") + b"K\x01s\x86b."
    (directory / ".metadata").write_bytes(build)
    with pytest.raises(CheckpointError, match="damaged"):
        DcpTensors(directory)
    assert callable(pickle_reader._Record.field)
    assert not hasattr(Metadata, "field")


def test_a_bomb_in_the_place_of_a_tensor(tmp_path):
    directory, trace = saved(tmp_path), tmp_path / "trace"
    buffer = io.BytesIO()
    torch.save(Bomb(trace), buffer)
    file = directory / "__0_0.distcp"
    for size in (len(buffer.getvalue()), 1 << 20):
        file.write_bytes(buffer.getvalue().ljust(size, b"\0") * 8)

        def move(metadata: Any, length: int = size) -> None:
            for info in metadata.storage_data.values():
                info.offset, info.length = 0, length

        edit(directory, move)
        with pytest.raises(CheckpointError, match="damaged"):
            dict(DcpTensors(directory))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: [setattr(i, "relative_path", "../secret") for i in m.storage_data.values()] and None, "in no file"),
        (lambda m: [setattr(i, "relative_path", "/etc/passwd") for i in m.storage_data.values()] and None, "no file"),
        (lambda m: [setattr(i, "length", 1 << 40) for i in m.storage_data.values()] and None, "in no file"),
        (lambda m: [setattr(i, "offset", -1) for i in m.storage_data.values()] and None, "not a count"),
        (lambda m: m.storage_data.clear(), "in no file"),
        (lambda m: m.state_dict_metadata["model.a"].chunks.clear(), "do not cover it exactly once"),
        (lambda m: m.state_dict_metadata["model.a"].chunks.append(m.state_dict_metadata["model.a"].chunks[0]), "once"),
        (lambda m: setattr(m.state_dict_metadata["model.a"], "size", torch.Size([1 << 40, 1 << 20])), "exactly once"),
        (
            lambda m: setattr(m.state_dict_metadata["model.a"].chunks[0], "sizes", torch.Size([1 << 40, 4])),
            "larger than its place",
        ),
        (
            lambda m: [setattr(i, "transform_descriptors", ["zstd"]) for i in m.storage_data.values()] and None,
            "compressed",
        ),
        (lambda m: setattr(m, "storage_data", None), "damaged"),
        (lambda m: {"not": "metadata"}, "no Metadata"),
    ],
)
def test_metadata_that_lies(tmp_path, change, words):
    directory = saved(tmp_path)
    (tmp_path / "secret").write_bytes((directory / "__0_0.distcp").read_bytes())
    edit(directory, change)
    with pytest.raises(CheckpointError, match=words):
        DcpTensors(directory)


def test_damaged_files_are_said_to_be(tmp_path):
    directory = saved(tmp_path)
    whole = (directory / ".metadata").read_bytes()
    for content in (b"", whole[:100], b"\xff" * 50, b"]" * 10_000):
        (directory / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            DcpTensors(directory)
    (directory / ".metadata").write_bytes(whole)
    (directory / "__0_0.distcp").write_bytes(b"\0" * (directory / "__0_0.distcp").stat().st_size)
    with pytest.raises(CheckpointError, match="damaged"):
        dict(DcpTensors(directory))
    (directory / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="in no file"):
        DcpTensors(directory)


# .ckpt


def test_a_lightning_file_and_a_bare_state_dict(tmp_path):
    torch.save({"state_dict": STATE, "epoch": 3, "optimizer_states": [{"m": torch.ones(3)}]}, tmp_path / "a.ckpt")
    same(read_state_dict(tmp_path / "a.ckpt"), STATE)
    torch.save({**STATE, "count": torch.ones(2, dtype=torch.int64), "n": 3}, tmp_path / "b.pt")
    same(read_state_dict(tmp_path / "b.pt"), STATE)


def test_a_bomb_in_a_ckpt_is_refused_and_not_executed(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"state_dict": STATE, "hyper_parameters": Bomb(trace)}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Bomb(trace)))
    for file in ("a.ckpt", "b.ckpt"):
        with pytest.raises(CheckpointError, match="nothing of it was executed"):
            read_state_dict(tmp_path / file)
    assert not trace.exists()
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert trace.exists(), "the bomb works"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"\0" * 60, b"text"])
def test_a_file_that_is_no_ckpt(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as weights alone"):
        read_state_dict(tmp_path / "a.ckpt")


@pytest.mark.parametrize("data", [{}, [1, 2], {"state_dict": 3}, {"state_dict": {"n": 1}}, torch.ones(2)])
def test_a_ckpt_without_weights(tmp_path, data):
    torch.save(data, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_state_dict(tmp_path / "a.ckpt")


def test_a_tensor_that_is_larger_than_its_storage_is_none(tmp_path):
    torch.save({"a": torch.ones(1).expand(1 << 40), "b": torch.ones(2)}, tmp_path / "a.ckpt")
    assert set(read_state_dict(tmp_path / "a.ckpt")) == {"b"}
