"""Checkpoints without processes: several ranks as threads, tensors of any shape, and a manifest to tamper with."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST, _digest
from orchestrator.checkpoint.tensorfile import TensorFile
from orchestrator.checkpoint.writer import Attest, Contents, save
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import ModelConfig, RunConfig
from orchestrator.models.shapes import parameter_shapes
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.rules import Placement
from orchestrator.sharding.shard import Shard

TIMEOUT_SECONDS = 10


class ThreadPeers:
    """What a strategy offers to `save`, among threads. A rank that leaves the others waiting breaks the barrier."""

    def __init__(self, size: int):
        self.size = size
        self._barrier = threading.Barrier(size, timeout=TIMEOUT_SECONDS)
        self._board: dict[str, str] = {}
        self._local = threading.local()

    def enter(self, rank: int) -> None:
        self._local.rank = rank

    def as_rank(self, rank: int) -> ThreadPeers:
        """The same coordinator, seen by `rank` from any thread."""
        seen = copy.copy(self)
        seen._local = threading.local()
        seen.__class__ = type("RankPeers", (ThreadPeers,), {"rank": rank})
        return seen

    @property
    def rank(self) -> int:
        return self._local.rank

    def broadcast(self, text: str) -> str:
        if self.rank == 0:
            self._board["agreed"] = text
        self._barrier.wait()
        agreed = self._board["agreed"]
        self._barrier.wait()
        return agreed

    def put(self, key: str, text: str) -> None:
        self._board[key] = text

    def get_now(self, key: str) -> str | None:
        return self._board.get(key)


def shards_of(
    tensors: Mapping[str, torch.Tensor], layout: Layout, rank: int, tensor_dims: Mapping[str, int | None] | None = None
) -> list[Shard]:
    """The parts that `rank` holds of whole tensors; copies, so that they can be written to."""
    result = []
    for name, whole in tensors.items():
        placement = Placement(tuple(whole.shape), (tensor_dims or {}).get(name))
        part = placement.slices(layout, rank)
        result.append(Shard(name, tuple(whole.shape), part, whole[part].clone(), placement.is_owner(layout, rank)))
    return result


def write(
    parent: Path,
    shards: Callable[[int], list[Shard]],
    size: int = 1,
    step: int = 1,
    extra: Mapping[str, bytes] | None = None,
    state: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    sign: Callable[[bytes], bytes] | None = None,
    hash: str = "sha256",
    attest: Attest | None = None,
) -> list[Path | Exception]:
    """Save on `size` ranks; what each returned or raised."""
    coordinator = ThreadPeers(size)

    def rank(number: int) -> Path | Exception:
        coordinator.enter(number)
        try:
            facts = {"step": step} if state is None else state
            about = {"name": "test", "seed": 1} if config is None else config
            signed = (sign, hash, attest is not None, attest if number == 0 else None)
            return save(parent, step, shards(number), coordinator, Contents(facts, about, extra or {}, *signed))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def write_whole(parent: Path, tensors: Mapping[str, torch.Tensor], step: int = 1, **options: Any) -> Path:
    """Save on one rank."""
    (path,) = write(parent, lambda rank: shards_of(tensors, Layout(), rank), step=step, **options)
    assert not isinstance(path, Exception), path
    return path


def small_model() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of a small model, and the configuration of a run that it is of."""
    model = ModelConfig(vocab_size=8, dim=4, layers=1, heads=1, kv_heads=1, mlp_dim=4)
    weights = {f"model.{name}": torch.ones(shape) for name, shape in parameter_shapes(model)}
    return weights, {**to_dict(RunConfig()), "model": to_dict(model)}


def tamper(directory: Path, change: Callable[[dict[str, Any]], object], sign: bool = True) -> None:
    """Edit the manifest, with a digest that fits unless `sign` is false."""
    path = directory / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    if sign:
        data["digest"] = _digest({key: value for key, value in data.items() if key != "digest"})
    path.write_text(json.dumps(data))


def forge(directory: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change a stored fp32 tensor, each of its shards in place, and make all hashes fit again."""
    manifest = json.loads((directory / MANIFEST).read_text())
    assert manifest["tensors"][name]["dtype"] == "F32"
    for shard in manifest["tensors"][name]["shards"]:
        path = directory / shard["file"]
        content = bytearray(path.read_bytes())
        entry = TensorFile(path).entries[shard["key"]]
        part = torch.frombuffer(content, dtype=torch.float32, count=(entry.stop - entry.start) // 4, offset=entry.start)
        change(part.view(entry.shape))
        path.write_bytes(content)
        offset, pieces = 0, []
        for size, _ in manifest["files"][shard["file"]]["pieces"]:
            pieces.append([size, hashlib.sha256(content[offset : offset + size]).hexdigest()])
            offset += size
        manifest["files"][shard["file"]]["pieces"] = pieces
    tamper(directory, lambda data: data.update(files=manifest["files"]))
    Checkpoint(directory).verify()


def files_of(directory: Path) -> Iterable[str]:
    return json.loads((directory / MANIFEST).read_text())["files"]
