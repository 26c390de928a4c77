"""The checkpoint format: names, the manifest, and the checks that a directory must pass.

    step-00000100/
        rank-00000.safetensors   the shards that rank 0 owned; one file per rank that owned any
        sums.json                a sum over the bits of every tensor, the same for any way of cutting it
        reference.safetensors    a small batch and a digest of its logits; handover.json: its loss and gradient norm
        history.json             legs and metrics of the run so far
        state.json               step, data position, RNG scheme, schedule, provenance
        config.yaml              the resolved configuration
        tokenizer*.json          what turns text into the model's tokens
        manifest.json            every tensor, shard, file, size and hash; renamed into place last
        manifest.sig, provenance.intoto.jsonl, model.sig   optional: signatures

A directory without `manifest.json` is not a checkpoint. A checkpoint is untrusted: nothing in it is
unpickled or executed, and no name in it leaves the directory. docs/checkpoint-format.md is the specification.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jsonschema_rs
import numpy as np

from orchestrator.checkpoint.hashing import Piece, StoredFile
from orchestrator.checkpoint.storage import AnyPath, read_bounded
from orchestrator.errors import CheckpointError, shown

FORMAT, VERSION = "orchestrator-checkpoint", 2
MANIFEST, STATE, CONFIG, SIGNATURE = "manifest.json", "state.json", "config.yaml", "manifest.sig"
STATEMENT, MODEL_SIGNATURE = "provenance.intoto.jsonl", "model.sig"
SIGNATURES = (SIGNATURE, STATEMENT, MODEL_SIGNATURE)
"""What lies in a checkpoint beside the manifest and the files that it lists."""
NOT_COVERED = "do not cover it exactly once"
SUMS = "sums.json"
DIRECTORY = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
BLAKE3 = "blake3"
FEATURES: frozenset[str] = frozenset({BLAKE3})
"""What a manifest may require of its reader. `blake3`: the hashes of pieces are BLAKE3 instead of SHA-256."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
# Printable, and without what JSON escapes: nothing that a terminal obeys, and one spelling of each.
_NAME = re.compile(r"[!#-\[\]-~]{1,512}")
_HASH = re.compile(r"[0-9a-f]{64}")
MAX_MANIFEST_BYTES = 1 << 28
_MAX_LOOSE_SHARDS = 1024
_MAX_BESIDE_BYTES = 1 << 27  # of a file beside tensors: a header, or a tokenizer
MAX_DIMS = 16
MAX_TENSORS, MAX_SHARDS, MAX_FILES = 1 << 20, 1 << 22, 1 << 17
# Of a file: so many pieces, one more for each shard in it, and one more for so many bytes.
MIN_PIECES, LEAST_PIECE_BYTES = 1024, 1 << 16
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class StoredShard:
    """A part of a tensor: the box [start, stop) and where its bytes are.

    Attributes:
        file: its name.
        key: of the tensor in the file.
        start: first index in each dim.
        stop: the index behind the last one in each dim.
    """

    file: str
    key: str
    start: tuple[int, ...]
    stop: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        dtype: its name in safetensors, such as `F32`.
        shape: global.
        shards: its parts, which cover every element exactly once.
    """

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[StoredShard, ...]


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint. Constructing one checks that its shards cover every tensor exactly once.

    Attributes:
        step: optimizer steps completed.
        tensors: by name.
        files: by name.
        hash: of the pieces of its files, `sha256` or `blake3`.
    """

    step: int
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, StoredFile]
    hash: str = "sha256"

    def __post_init__(self) -> None:
        self._check_counts()
        room = {name: file.bytes for name, file in self.files.items()}
        for name, tensor in self.tensors.items():
            _check_name(name, "the name of a tensor")
            check_cover(name, tensor)
            for shard in tensor.shards:
                if shard.file not in room:
                    raise CheckpointError(
                        f"tensor '{name}' lies in a file that the manifest does not list", got=shard.file
                    )
                room[shard.file] -= _elements(shard) * ITEM_BYTES[tensor.dtype]
        if wrong := [name for name, left in room.items() if not 0 <= left <= _MAX_BESIDE_BYTES]:
            # No file is read, which may be a hole of any size, for more than the tensors need and a header.
            raise CheckpointError("the size of a file does not fit the tensors in it", got=", ".join(wrong[:3]))

    def _check_counts(self) -> None:
        """No more than can be looked at one by one: a few megabytes could keep a reader busy for hours."""
        shards: dict[str, int] = {}
        for tensor in self.tensors.values():
            for shard in tensor.shards:
                shards[shard.file] = shards.get(shard.file, 0) + 1
        counts = [("tensors", len(self.tensors), MAX_TENSORS), ("shards", sum(shards.values()), MAX_SHARDS)]
        counts.append(("files", len(self.files), MAX_FILES))
        counts += [
            (f"pieces of file '{name}'", len(file.pieces), _most_pieces(file, shards.get(name, 0)))
            for name, file in self.files.items()
        ]
        for what, count, most in counts:
            if count > most:
                raise CheckpointError(f"the manifest lists too many {what}", got=count, allowed=f"{most} at most")

    def tensor_files(self) -> set[str]:
        """Return the names of the files that hold tensors."""
        return {shard.file for tensor in self.tensors.values() for shard in tensor.shards}

    def to_json(self) -> str:
        """Serialize the manifest, with the digest of its content."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            **({"requires": [BLAKE3]} if self.hash == BLAKE3 else {}),
            "step": self.step,
            "tensors": {name: _tensor_to_dict(tensor) for name, tensor in self.tensors.items()},
            "files": {name: stored_to_dict(file) for name, file in self.files.items()},
        }
        return json.dumps({**body, "digest": _digest(body)}, separators=(",", ":"))

    @classmethod
    def read(cls, directory: AnyPath) -> Manifest:
        """Read and check `manifest.json`.

        Args:
            directory: of the checkpoint.

        Raises:
            CheckpointError: it is missing, damaged, of a newer version, or contradicts itself.
        """
        return cls.parse(read_manifest(directory), directory)

    @classmethod
    def parse(cls, content: bytes, directory: AnyPath) -> Manifest:
        """Check the content of the `manifest.json` of `directory`.

        Args:
            content: bytes of the file.
            directory: of the checkpoint.

        Raises:
            CheckpointError: as `read`.
        """
        try:
            return _parse(parse_json(content), directory)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the manifest is damaged: {error!r}"[:300], got=directory / MANIFEST) from None


def _most_pieces(file: StoredFile, shards: int) -> int:
    return MIN_PIECES + shards + file.bytes // LEAST_PIECE_BYTES


def read_manifest(directory: AnyPath) -> bytes:
    """Return the bytes of `manifest.json`.

    Args:
        directory: of the checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = directory / MANIFEST
    try:
        return read_bounded(path, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError("not a checkpoint: it has no manifest.json", got=directory) from None
    except OSError as error:
        raise CheckpointError(f"the manifest cannot be read: {error.strerror or error}", got=path) from None


def check_cover(name: str, tensor: StoredTensor) -> None:
    """Check that the shards of a tensor hold each of its elements exactly once.

    Args:
        name: of the tensor, for messages.
        tensor: its entry in the manifest.

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
    size = math.prod(tensor.shape)
    if not size and not tensor.shards:
        return
    held = sum(_elements(shard) for shard in tensor.shards)
    if held != size or _overlap(tensor, dims):
        raise CheckpointError(
            f"the shards of '{name}' {NOT_COVERED}",
            got=f"{held} elements in {len(tensor.shards)} shards for shape {tensor.shape} = {size} elements",
        )


def _elements(shard: StoredShard) -> int:
    return math.prod(b - a for a, b in zip(shard.start, shard.stop, strict=True))


def _overlap(tensor: StoredTensor, dims: int) -> bool:
    count = len(tensor.shards)
    if dims == 0 or count == 1:
        return count > 1
    starts = np.array([shard.start for shard in tensor.shards], dtype=np.int64).reshape(count, dims)
    stops = np.array([shard.stop for shard in tensor.shards], dtype=np.int64).reshape(count, dims)
    if _is_grid(starts, stops, tensor.shape):
        return False
    # Any other set of boxes, each against all that follow: no layout cuts so, and the time grows with the square.
    if count > _MAX_LOOSE_SHARDS:
        raise CheckpointError(
            "a tensor is cut into too many shards that are no grid", got=count, allowed=str(_MAX_LOOSE_SHARDS)
        )
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


def _parse(data: Any, directory: AnyPath) -> Manifest:
    if data["format"] != FORMAT:
        raise CheckpointError("not a checkpoint of this product", got=shown(data["format"]), allowed=FORMAT)
    if data["version"] != VERSION:
        raise CheckpointError(
            "the checkpoint has another format version",
            got=shown(data["version"]),
            allowed=str(VERSION),
            fix="read it with the version of the product that wrote it",
        )
    required = set(map(str, data.get("requires", [])))
    unknown = sorted(required - FEATURES)
    if unknown:
        raise CheckpointError(
            "the checkpoint needs what this version does not know",
            got=shown(", ".join(unknown)),
            allowed=", ".join(FEATURES) or "nothing",
            fix="read it with the version of the product that wrote it, or a newer one",
        )
    body = {key: value for key, value in data.items() if key != "digest"}
    if data["digest"] != _digest(body):
        raise CheckpointError("the manifest is damaged: its digest does not match", got=directory / MANIFEST)
    files = {_safe(name): stored_from_dict(name, entry) for name, entry in data["files"].items()}
    tensors = {}
    for name, entry in data["tensors"].items():
        _check_name(name, "the name of a tensor")
        if entry["dtype"] not in ITEM_BYTES:
            raise CheckpointError(
                f"tensor '{name}' has an unknown dtype", got=shown(entry["dtype"]), allowed=", ".join(ITEM_BYTES)
            )
        shards = tuple(_shard_from_dict(shard) for shard in entry["shards"])
        tensors[name] = StoredTensor(entry["dtype"], _counts(entry["shape"]), shards)
    manifest = Manifest(_count(data["step"]), tensors, files, BLAKE3 if BLAKE3 in required else "sha256")
    # What other readers go by: nothing that the schema forbids is read here either.
    try:
        problem = next(schema().iter_errors(data), None)
    except ValueError as error:  # nested deeper than the validator goes
        raise CheckpointError(f"the manifest is damaged: {error}", got=directory) from error
    if problem is not None:
        where = shown("/".join(map(str, problem.instance_path)))
        raise CheckpointError(f"the manifest is damaged: {shown(problem.message)}", got=f"{where} in {directory}")
    return manifest


def _shard_from_dict(entry: Mapping[str, Any]) -> StoredShard:
    key = _check_name(entry["key"], "the key of a shard")
    return StoredShard(_safe(entry["file"]), key, _counts(entry["start"]), _counts(entry["stop"]))


def check_state(state: Mapping[str, Any], step: int) -> None:
    """Validate `state.json` against its schema: the types that a resumed run relies on.

    Args:
        state: parsed JSON.
        step: of the manifest.

    Raises:
        ValueError: it does not fit, or is of another step than the manifest.
    """
    if (problem := next(schema("state").iter_errors(state), None)) is not None:
        where = "/".join(map(str, problem.instance_path))
        raise ValueError(shown(f"{where}: {problem.message}"))
    if state.get("step", step) != step:
        raise ValueError(f"it is of step {state['step']}, the manifest of step {step}")


@functools.cache
def schema(name: str = "manifest") -> Any:
    """Return the validator of a JSON schema of this package.

    Args:
        name: of the schema: `manifest`, `state`, `statement`.
    """
    text = resources.files(__package__).joinpath(f"{name}.schema.json").read_text()
    return jsonschema_rs.Draft202012Validator(json.loads(text))


def stored_to_dict(file: StoredFile) -> dict[str, Any]:
    """Convert to the JSON entry of a file: its bytes, and bytes and hash of each piece.

    Args:
        file: its entry in the manifest.
    """
    return {"bytes": file.bytes, "pieces": [[piece.bytes, piece.hash] for piece in file.pieces]}


def stored_from_dict(name: str, entry: Mapping[str, Any]) -> StoredFile:
    """Parse the JSON entry of a file.

    Args:
        name: of the file, for messages.
        entry: as `stored_to_dict` writes it.

    Raises:
        CheckpointError: a piece has no bytes or no hash, or the pieces do not add up to the file.
    """
    pieces = tuple(Piece(_count(size), text) for size, text in entry["pieces"])
    for piece in pieces:
        if not piece.bytes or not _HASH.fullmatch(piece.hash):
            raise CheckpointError(f"a piece of file '{name}' has no bytes or no hash", got=shown(piece))
    file = StoredFile(_count(entry["bytes"]), pieces)
    if sum(piece.bytes for piece in pieces) != file.bytes:
        raise CheckpointError(f"the pieces of file '{name}' do not add up to its size", got=file.bytes)
    return file


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_json(content: bytes) -> Any:
    """Parse JSON whose objects repeat no key: two readers could take different ones of two values.

    Args:
        content: UTF-8 text.

    Raises:
        ValueError: it is no JSON, or a key is there twice.
        RecursionError: it is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    return json.loads(content, object_pairs_hook=unique)


_NAMES = "1 to 512 printable ASCII characters, no spaces, quotes or backslashes"


def _check_name(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{what} is not allowed", got=shown(name), allowed=_NAMES)
    return name


def is_file_name(name: str) -> bool:
    """Return whether a file of a checkpoint may be called `name`."""
    return _FILE_NAME.fullmatch(name) is not None


def _safe(name: str) -> str:
    if not is_file_name(name):
        raise CheckpointError(
            "a file name in the manifest is not allowed", got=shown(name), allowed="letters, digits, . _ -"
        )
    return name


def _counts(values: Sequence[Any]) -> tuple[int, ...]:
    if len(values) > MAX_DIMS:
        raise CheckpointError("a tensor in the manifest has too many dims", got=len(values), allowed=str(MAX_DIMS))
    return tuple(_count(value) for value in values)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise CheckpointError("a number in the manifest is not a count", got=shown(value))
    return value
