"""Reading a checkpoint: each rank just the slices that it holds, whatever layout wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from orchestrator.checkpoint.format import Manifest, StoredShard, StoredTensor
from orchestrator.checkpoint.verify import Checkpoint
from orchestrator.checkpoint.writer import DTYPE_NAMES
from orchestrator.errors import CheckpointError
from orchestrator.sharding.shard import Shard


def read_into(checkpoint: Checkpoint, shards: Sequence[Shard], ignore: Iterable[str] = ()) -> None:
    """Fill `shards` from the stored tensors.

    Args:
        shards: the parts that this process holds; `data` is written in place.
        ignore: prefixes of stored names that need not be wanted.

    Raises:
        CheckpointError: names, shapes or dtypes differ between the checkpoint and the run.
    """
    tensors = checkpoint.manifest.tensors
    _check_names(checkpoint.manifest, {shard.name for shard in shards}, tuple(ignore))
    with ExitStack() as stack:
        opened: dict[str, Any] = {}

        def source(file: str) -> Any:
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(str(checkpoint.directory / file), framework="pt"))
            return opened[file]

        try:
            for shard in shards:
                _fill(shard, tensors[shard.name], source)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"a file of the checkpoint is damaged: {error}", got=checkpoint.directory) from error


def _check_names(manifest: Manifest, wanted: set[str], ignore: tuple[str, ...]) -> None:
    stored = {name for name in manifest.tensors if not name.startswith(ignore)} if ignore else set(manifest.tensors)
    missing, extra = sorted(wanted - set(manifest.tensors)), sorted(stored - wanted)
    if missing or extra:
        raise CheckpointError(
            "the checkpoint is of another model",
            got=f"it lacks {_some(missing)}; it has beside {_some(extra)}",
            fix="give the model configuration that it was trained with",
        )


def _fill(shard: Shard, stored: StoredTensor, source: Callable[[str], Any]) -> None:
    dtype = DTYPE_NAMES[shard.data.dtype]
    if (stored.shape, stored.dtype) != (shard.shape, dtype):
        raise CheckpointError(
            f"tensor '{shard.name}' differs",
            got=f"{stored.dtype} {stored.shape} in the checkpoint",
            allowed=f"{dtype} {shard.shape}",
        )
    for part in stored.shards:
        common = [
            (max(p.start, a), min(p.stop, b)) for p, a, b in zip(shard.slices, part.start, part.stop, strict=True)
        ]
        if any(low >= high for low, high in common):
            continue
        into = tuple(slice(low - p.start, high - p.start) for (low, high), p in zip(common, shard.slices, strict=True))
        piece = _read(source(part.file), part, stored, common)
        shard.data[into] = piece.to(shard.data.device)


def _read(file: Any, part: StoredShard, stored: StoredTensor, common: list[tuple[int, int]]) -> torch.Tensor:
    entry = file.get_slice(part.key)
    shape = [b - a for a, b in zip(part.start, part.stop, strict=True)]
    if list(entry.get_shape()) != shape or str(entry.get_dtype()) != stored.dtype:
        raise CheckpointError(
            "a shard is not what the manifest says",
            got=f"{part.key}: {entry.get_dtype()} {entry.get_shape()}",
            allowed=f"{stored.dtype} {shape}",
        )
    if not common:
        return file.get_tensor(part.key)
    return entry[tuple(slice(low - a, high - a) for (low, high), a in zip(common, part.start, strict=True))]


def _some(names: list[str], limit: int = 3) -> str:
    return (", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "nothing"
