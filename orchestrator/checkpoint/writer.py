"""Writing a checkpoint: every rank its own shards, rank 0 the manifest when all are on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import yaml

from orchestrator.checkpoint.format import CONFIG, MANIFEST, STATE, Manifest, StoredFile, StoredShard, StoredTensor
from orchestrator.errors import CheckpointError
from orchestrator.sharding.shard import Shard

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
T = TypeVar("T")


class Peers(Protocol):
    """The other processes, as a strategy knows them."""

    @property
    def rank(self) -> int: ...
    def agree(self, text: str) -> str: ...
    def any_raised(self, flag: bool) -> bool: ...


def save(
    parent: Path,
    step: int,
    shards: Sequence[Shard],
    peers: Peers,
    *,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    extra: Mapping[str, bytes],
) -> Path:
    """Write the checkpoint of `step` below `parent`. All ranks call it together.

    Args:
        shards: this rank's part of everything; those it does not own are skipped.
        state: JSON data that travels along (the same on all ranks).
        config: the resolved configuration.
        extra: further files by name, such as the tokenizer's.

    Returns:
        The directory, committed.

    Raises:
        CheckpointError: a rank could not write; nothing was committed and the partial files are gone.
    """
    # Whatever is raised waits until the others know of it: they would hang at the next collective.
    directory, error = parent / f"step-{step:08d}", None
    if peers.rank == 0:
        directory, error = _attempt(lambda: _free_directory(parent, step), directory)
    chosen = peers.agree("" if error else str(directory))
    if chosen:
        directory = Path(chosen)
        _, error = _attempt(lambda: _write_rank(directory, peers.rank, shards), None)
    failed = peers.any_raised(error is not None)
    if peers.rank == 0 and not failed:
        _, error = _attempt(lambda: _commit(directory, step, state, config, extra), None)
    if failed or peers.any_raised(error is not None):
        if peers.rank == 0 and chosen:
            shutil.rmtree(directory, ignore_errors=True)
        reason = (
            "another rank failed" if error is None else getattr(error, "strerror", None) or str(error) or repr(error)
        )
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {reason}",
            got=directory,
            fix="free space or permissions there, or set checkpoint.dir; earlier checkpoints are untouched",
        ) from error
    return directory


def _attempt(action: Callable[[], T], otherwise: T) -> tuple[T, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return otherwise, error


def _free_directory(parent: Path, step: int) -> Path:
    """The directory for `step`; a committed one, even if damaged, is never written over."""
    directory, number = parent / f"step-{step:08d}", 1
    while (directory / MANIFEST).exists():
        number += 1
        directory = parent / f"step-{step:08d}.{number}"
    if directory.exists():
        shutil.rmtree(directory)  # left by a save that never committed
    return directory


def _write_rank(directory: Path, rank: int, shards: Sequence[Shard]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    # A part without elements is not written; a tensor without any still has its place in the manifest.
    owned = [shard for shard in shards if shard.owned and shard.data.numel()]
    empty = [shard for shard in shards if shard.owned and 0 in shard.shape]
    file = f"rank-{rank:05d}.safetensors"
    keys = [f"{shard.name}#{number}" for number, shard in enumerate(owned)]
    stored = write_safetensors(directory / file, keys, [shard.data for shard in owned]) if owned else None
    entries = [
        {
            "name": shard.name,
            "dtype": DTYPE_NAMES[shard.data.dtype],
            "shape": list(shard.shape),
            "key": key,
            "start": [part.start for part in shard.slices],
            "stop": [part.stop for part in shard.slices],
        }
        for key, shard in zip(keys, owned, strict=True)
    ]
    listing = {
        "file": file,
        "bytes": stored.bytes if stored else 0,
        "sha256": stored.sha256 if stored else "",
        "shards": entries,
        "empty": [
            {"name": shard.name, "dtype": DTYPE_NAMES[shard.data.dtype], "shape": list(shard.shape)} for shard in empty
        ],
    }
    _write_durably(directory / f"rank-{rank:05d}.json", json.dumps(listing).encode())


def _commit(
    directory: Path, step: int, state: Mapping[str, Any], config: Mapping[str, Any], extra: Mapping[str, bytes]
) -> None:
    """Merge the ranks' listings into the manifest and rename it into place."""
    files = {
        STATE: _write_durably(directory / STATE, json.dumps(state, indent=1).encode()),
        CONFIG: _write_durably(directory / CONFIG, yaml.safe_dump(dict(config), sort_keys=False).encode()),
        **{name: _write_durably(directory / name, content) for name, content in extra.items()},
    }
    tensors: dict[str, tuple[str, tuple[int, ...], list[StoredShard]]] = {}
    listings = sorted(directory.glob("rank-*.json"))
    for path in listings:
        listing = json.loads(path.read_bytes())
        if listing["shards"]:
            files[listing["file"]] = StoredFile(listing["bytes"], listing["sha256"])
        for entry in [*listing["shards"], *listing["empty"]]:
            described = (entry["dtype"], tuple(entry["shape"]))
            _, _, shards = tensors.setdefault(entry["name"], (*described, []))
            if tensors[entry["name"]][:2] != described:
                raise CheckpointError(f"ranks disagree on tensor '{entry['name']}'", got=described)
            if "key" in entry:
                shards.append(StoredShard(listing["file"], entry["key"], tuple(entry["start"]), tuple(entry["stop"])))
    stored = {name: StoredTensor(dtype, shape, tuple(parts)) for name, (dtype, shape, parts) in sorted(tensors.items())}
    manifest = Manifest(step, stored, files)
    for path in listings:
        path.unlink()
    aside = directory / f"{MANIFEST}.partial"
    _write_durably(aside, manifest.to_json().encode())
    aside.rename(directory / MANIFEST)
    _sync_directory(directory)
    _sync_directory(directory.parent)


def write_safetensors(path: Path, keys: Sequence[str], tensors: Sequence[torch.Tensor]) -> StoredFile:
    """Write tensors one after the other, hashing on the way: no second copy of them in memory or read from disk.

    The format is https://github.com/huggingface/safetensors#format; device tensors come to the host one by one.
    """
    header, offset = {}, 0
    for key, tensor in zip(keys, tensors, strict=True):
        size = tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in _parts(text, tensors):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(8 + len(text) + offset, digest.hexdigest())


def _parts(header: bytes, tensors: Sequence[torch.Tensor]) -> Any:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_durably(path: Path, content: bytes) -> StoredFile:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(len(content), hashlib.sha256(content).hexdigest())


def _sync_directory(path: Path) -> None:
    # Some file systems refuse to flush a directory; there the rename is as durable as it gets.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
