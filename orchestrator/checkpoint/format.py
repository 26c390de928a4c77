"""The checkpoint directory: names, the manifest, and the checks that it must pass before it is believed.

    step-00000100/
        rank-00000.safetensors   the shards that rank 0 owned; one file per rank that owned any
        sums.json                a sum over the bits of every tensor, the same for any way of cutting it
        reference.safetensors    a small batch and a digest of its logits; handover.json: its loss and gradient norm
        history.json             legs and metrics of the run so far
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.errors import CheckpointError

FORMAT, VERSION = "orchestrator-checkpoint", 2
MANIFEST, STATE, CONFIG, SIGNATURE = "manifest.json", "state.json", "config.yaml", "manifest.sig"
SUMS = "sums.json"
DIRECTORY = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_MAX_MANIFEST_BYTES = 1 << 28
_MAX_DIMS = 16
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
class Piece:
    """A stretch of a file and the hash of its content."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredFile:
    """A file's size, and the hashes of the pieces that it consists of, in order."""

    bytes: int
    pieces: tuple[Piece, ...]

    def ranges(self) -> Iterator[tuple[int, Piece]]:
        """Each piece with the offset where it begins."""
        offset = 0
        for piece in self.pieces:
            yield offset, piece
            offset += piece.bytes


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
            "files": {name: stored_to_dict(file) for name, file in self.files.items()},
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
            return _parse(parse_json(read_bounded(path, _MAX_MANIFEST_BYTES)), directory)
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
    if _is_grid(starts, stops, tensor.shape):
        return False
    # Any other set of boxes, each against all that follow.
    for index in range(count - 1):
        low, high = np.maximum(starts[index], starts[index + 1 :]), np.minimum(stops[index], stops[index + 1 :])
        if (low < high).all(axis=1).any():
            return True
    return False


def _is_grid(starts: np.ndarray, stops: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether the boxes are different cells of one grid, as layouts cut tensors: sorting tells, for any number."""
    for dim, size in enumerate(shape):
        cuts = np.unique(starts[:, dim])
        ends = np.append(cuts[1:], size)
        if (stops[:, dim] != ends[np.searchsorted(cuts, starts[:, dim])]).any():
            return False
    return len(np.unique(starts, axis=0)) == len(starts)


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
            got=str(data["version"])[:100],
            allowed=str(VERSION),
            fix="read it with the version of the product that wrote it",
        )
    body = {key: value for key, value in data.items() if key != "digest"}
    if data["digest"] != _digest(body):
        raise CheckpointError("the manifest is damaged: its digest does not match", got=directory / MANIFEST)
    files = {_safe(name): stored_from_dict(name, entry) for name, entry in data["files"].items()}
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


def stored_to_dict(file: StoredFile) -> dict[str, Any]:
    return {"bytes": file.bytes, "pieces": [[piece.bytes, piece.sha256] for piece in file.pieces]}


def stored_from_dict(name: str, entry: Mapping[str, Any]) -> StoredFile:
    pieces = tuple(Piece(_count(size), str(sha256)) for size, sha256 in entry["pieces"])
    file = StoredFile(_count(entry["bytes"]), pieces)
    if sum(piece.bytes for piece in pieces) != file.bytes:
        raise CheckpointError(f"the pieces of file '{name}' do not add up to its size", got=file.bytes)
    return file


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        CheckpointError: it is larger.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content: bytes = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError("the file is too large to be what it claims", got=path, allowed=f"{limit} bytes")
    return content


def parse_json(content: bytes) -> Any:
    """JSON whose objects name no key twice: two readers could take two different ones of them.

    Raises:
        ValueError, RecursionError: it is none, or is nested without end.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    return json.loads(content, object_pairs_hook=unique)


def _safe(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError("a file name in the manifest is not allowed", got=name, allowed="letters, digits, . _ -")
    return name


def _counts(values: Sequence[Any]) -> tuple[int, ...]:
    if len(values) > _MAX_DIMS:
        raise CheckpointError("a tensor in the manifest has too many dims", got=len(values), allowed=str(_MAX_DIMS))
    return tuple(_count(value) for value in values)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise CheckpointError("a number in the manifest is not a count", got=value)
    return value
