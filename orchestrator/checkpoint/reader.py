"""Reading a checkpoint: each rank just the slices that it holds, whatever layout wrote them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from orchestrator.checkpoint.format import Manifest, StoredShard, StoredTensor
from orchestrator.checkpoint.tensorfile import TensorFile
from orchestrator.checkpoint.verify import Checkpoint
from orchestrator.checkpoint.writer import DTYPE_NAMES
from orchestrator.errors import CheckpointError
from orchestrator.sharding.shard import Shard

_THREADS = min(8, os.cpu_count() or 1)
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Reader:
    """Reads parts of the tensors of one checkpoint. Each file is opened once; several threads may read.

    Args:
        cast: floating point numbers that are stored in another format are converted.
    """

    def __init__(self, checkpoint: Checkpoint, cast: bool = False):
        self._checkpoint, self._cast = checkpoint, cast
        self._opened: dict[str, TensorFile] = {}
        self._opening = threading.Lock()

    def fill(self, shard: Shard) -> None:
        """Write the stored elements into `shard.data`.

        Raises:
            CheckpointError: there is no such tensor, it has another shape or dtype, or its file is damaged.
        """
        stored = self._checkpoint.manifest.tensors.get(shard.name)
        if stored is None:
            raise CheckpointError(f"the checkpoint has no tensor '{shard.name}'", got=self._checkpoint.directory)
        dtype = DTYPES[stored.dtype]
        try:
            if self._cast and dtype != shard.data.dtype and dtype.is_floating_point:
                as_stored = torch.empty(shard.data.shape, dtype=dtype)
                _fill(replace(shard, data=as_stored), stored, self._source)
                shard.data.copy_(as_stored)
            else:
                _fill(shard, stored, self._source)
        except OSError as error:
            raise CheckpointError(
                f"a file of the checkpoint is damaged: {error}", got=self._checkpoint.directory
            ) from error

    def tensor(self, name: str, box: tuple[slice, ...] | None = None) -> torch.Tensor:
        """A tensor, or the part `box` of it, in host memory and as it is stored.

        Raises:
            CheckpointError: as `fill`.
        """
        stored = self._checkpoint.manifest.tensors[name]
        box = tuple(slice(0, size) for size in stored.shape) if box is None else box
        data = torch.empty([part.stop - part.start for part in box], dtype=DTYPES[stored.dtype])
        self.fill(Shard(name, stored.shape, box, data))
        return data

    def _source(self, file: str) -> TensorFile:
        with self._opening:
            if file not in self._opened:
                self._opened[file] = TensorFile(self._checkpoint.directory / file)
            return self._opened[file]


def read_into(checkpoint: Checkpoint, shards: Sequence[Shard], ignore: Iterable[str] = (), cast: bool = False) -> None:
    """Fill `shards` from the stored tensors.

    Args:
        shards: the parts that this process holds; `data` is written in place.
        ignore: prefixes of stored names that need not be wanted.
        cast: as for `Reader`.

    Raises:
        CheckpointError: names, shapes or dtypes differ between the checkpoint and the run.
    """
    _check_names(checkpoint.manifest, {shard.name for shard in shards}, tuple(ignore))
    reader = Reader(checkpoint, cast)
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(reader.fill, shards):
            pass


def _check_names(manifest: Manifest, wanted: set[str], ignore: tuple[str, ...]) -> None:
    stored = {name for name in manifest.tensors if not name.startswith(ignore)} if ignore else set(manifest.tensors)
    missing, extra = sorted(wanted - set(manifest.tensors)), sorted(stored - wanted)
    if missing or extra:
        raise CheckpointError(
            "the checkpoint is of another model",
            got=f"it lacks {_some(missing)}; it has beside {_some(extra)}",
            fix="give the model configuration that it was trained with",
        )


def _fill(shard: Shard, stored: StoredTensor, source: Callable[[str], TensorFile]) -> None:
    dtype = DTYPE_NAMES[shard.data.dtype]
    if (stored.shape, stored.dtype) != (shard.shape, dtype):
        raise CheckpointError(
            f"tensor '{shard.name}' differs",
            got=f"{stored.dtype} {stored.shape} in the checkpoint",
            allowed=f"{dtype} {shard.shape}",
        )
    missing = shard.data.numel()
    for part in stored.shards:
        common = [
            (max(p.start, a), min(p.stop, b)) for p, a, b in zip(shard.slices, part.start, part.stop, strict=True)
        ]
        if any(low >= high for low, high in common):
            continue
        into = tuple(slice(low - p.start, high - p.start) for (low, high), p in zip(common, shard.slices, strict=True))
        _read(source(part.file), part, stored, common, shard.data[into] if into else shard.data)
        missing -= math.prod(high - low for low, high in common)
    # The manifest proves that shards cover a tensor once; this, that all that was wanted of it was filled.
    if missing:
        raise CheckpointError(
            f"tensor '{shard.name}' was not filled exactly once", got=f"{missing} elements are missing"
        )


def _read(
    file: TensorFile, part: StoredShard, stored: StoredTensor, common: list[tuple[int, int]], out: torch.Tensor
) -> None:
    entry = file.entries.get(part.key)
    shape = tuple(b - a for a, b in zip(part.start, part.stop, strict=True))
    if entry is None or (entry.dtype, entry.shape) != (stored.dtype, shape):
        raise CheckpointError(
            "a shard is not what the manifest says",
            got=f"{part.key}: {f'{entry.dtype} {entry.shape}' if entry else 'missing'}",
            allowed=f"{stored.dtype} {shape}",
        )
    box = tuple(slice(low - a, high - a) for (low, high), a in zip(common, part.start, strict=True))
    if out.device.type == "cpu" and out.is_contiguous():
        memory = out.detach().reshape(-1).view(torch.uint8).numpy().data
        if file.read_into(part.key, box, memory):
            return
    dtype = DTYPES[stored.dtype]
    for place, items in file.parts(part.key, box):
        out[place].copy_(torch.from_numpy(np.ascontiguousarray(items)).view(dtype).squeeze(-1))


def _some(names: list[str], limit: int = 3) -> str:
    return (", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "nothing"
