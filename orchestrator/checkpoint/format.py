"""The checkpoint directory: names, the manifest, and the checks that it must pass before it is believed.

    step-00000100/
        rank-00000.safetensors   the shards that rank 0 owned; one file per rank that owned any
        state.json               step, data position, RNG scheme, schedule, provenance
        config.yaml              the resolved configuration
        tokenizer*.json          what turns text into the model's tokens
        manifest.json            every tensor, shard, file, size and hash; renamed into place last

A directory without `manifest.json` is not a checkpoint. A checkpoint comes from strangers: nothing in it is
unpickled or executed, and no name in it leaves the directory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.errors import CheckpointError

FORMAT, VERSION = "orchestrator-checkpoint", 1
MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"
DIRECTORY = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_MAX_MANIFEST_BYTES = 1 << 30
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class StoredShard:
    """A part of a tensor: the box [start, stop) and where its bytes are."""

    file: str
    key: str
    start: tuple[int, ...]
    stop: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    dtype: str
    shape: tuple[int, ...]
    shards: tuple[StoredShard, ...]


@dataclass(frozen=True)
class StoredFile:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. Making one proves that its shards cover every tensor exactly once."""

    step: int
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, StoredFile]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            check_cover(name, tensor)
            for shard in tensor.shards:
                if shard.file not in self.files:
                    raise CheckpointError(
                        f"tensor '{name}' lies in a file that the manifest does not list", got=shard.file
                    )

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "tensors": {name: _tensor_to_dict(tensor) for name, tensor in self.tensors.items()},
            "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in self.files.items()},
        }
        return json.dumps({**body, "digest": _digest(body)}, separators=(",", ":"))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check `manifest.json`.

        Raises:
            CheckpointError: it is missing, damaged, of a newer version, or contradicts itself.
        """
        path = directory / MANIFEST
        try:
            if path.stat().st_size > _MAX_MANIFEST_BYTES:
                raise CheckpointError("the manifest is too large to be one", got=path)
            return _parse(json.loads(path.read_bytes()), directory)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError("not a checkpoint: it has no manifest.json", got=directory) from None
        except OSError as error:
            raise CheckpointError(f"the manifest cannot be read: {error.strerror}", got=path) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the manifest is damaged: {error!r}", got=path) from None


def check_cover(name: str, tensor: StoredTensor) -> None:
    """The shards of a tensor hold each of its elements exactly once.

    Raises:
        CheckpointError: an element is missing or held twice, or a box does not lie in the tensor.
    """
    dims = len(tensor.shape)
    for shard in tensor.shards:
        inside = len(shard.start) == len(shard.stop) == dims and all(
            0 <= start < stop <= size for start, stop, size in zip(shard.start, shard.stop, tensor.shape, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"a shard of '{name}' does not lie in the tensor", got=f"{shard.start}:{shard.stop} of {tensor.shape}"
            )
    held = sum(math.prod(b - a for a, b in zip(shard.start, shard.stop, strict=True)) for shard in tensor.shards)
    size = math.prod(tensor.shape)
    if held != size or _overlap(tensor, dims):
        raise CheckpointError(
            f"the shards of '{name}' do not cover it exactly once",
            got=f"{held} elements in {len(tensor.shards)} shards for shape {tensor.shape} = {size} elements",
        )


def _overlap(tensor: StoredTensor, dims: int) -> bool:
    count = len(tensor.shards)
    if dims == 0:
        return count > 1
    starts = np.array([shard.start for shard in tensor.shards], dtype=np.int64).reshape(count, dims)
    stops = np.array([shard.stop for shard in tensor.shards], dtype=np.int64).reshape(count, dims)
    for index in range(count - 1):
        low, high = np.maximum(starts[index], starts[index + 1 :]), np.minimum(stops[index], stops[index + 1 :])
        if (low < high).all(axis=1).any():
            return True
    return False


def _tensor_to_dict(tensor: StoredTensor) -> dict[str, Any]:
    shards = [
        {"file": shard.file, "key": shard.key, "start": list(shard.start), "stop": list(shard.stop)}
        for shard in tensor.shards
    ]
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "shards": shards}


def _parse(data: Any, directory: Path) -> Manifest:
    if data["format"] != FORMAT:
        raise CheckpointError("not a checkpoint of this product", got=str(data["format"])[:100], allowed=FORMAT)
    if data["version"] != VERSION:
        raise CheckpointError(
            "the checkpoint has another format version",
            got=data["version"],
            allowed=str(VERSION),
            fix="install the version that wrote it",
        )
    body = {key: value for key, value in data.items() if key != "digest"}
    if data["digest"] != _digest(body):
        raise CheckpointError("the manifest is damaged: its digest does not match", got=directory / MANIFEST)
    files = {
        _safe(name): StoredFile(_count(file["bytes"]), str(file["sha256"])) for name, file in data["files"].items()
    }
    tensors = {}
    for name, entry in data["tensors"].items():
        if entry["dtype"] not in ITEM_BYTES:
            raise CheckpointError(
                f"tensor '{name}' has an unknown dtype", got=entry["dtype"], allowed=", ".join(ITEM_BYTES)
            )
        shards = tuple(
            StoredShard(_safe(shard["file"]), str(shard["key"]), _counts(shard["start"]), _counts(shard["stop"]))
            for shard in entry["shards"]
        )
        tensors[name] = StoredTensor(entry["dtype"], _counts(entry["shape"]), shards)
    return Manifest(_count(data["step"]), tensors, files)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _safe(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError("a file name in the manifest is not allowed", got=name, allowed="letters, digits, . _ -")
    return name


def _counts(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(_count(value) for value in values)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise CheckpointError("a number in the manifest is not a count", got=value)
    return value
