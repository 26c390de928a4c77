"""Read a checkpoint: each rank only the slices that it holds, whatever layout wrote them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import Manifest, StoredShard, StoredTensor
from orchestrator.checkpoint.hashing import new_hash
from orchestrator.checkpoint.read_check import Checks
from orchestrator.checkpoint.storage import PIECE_BYTES
from orchestrator.checkpoint.tensorfile import TensorFile
from orchestrator.checkpoint.writer import DTYPE_NAMES
from orchestrator.distributed.exchange import Coordinator
from orchestrator.errors import CheckpointError, DamagedError
from orchestrator.sharding.shard import Shard

_THREADS = min(8, os.cpu_count() or 1)
# Beside weights and optimizer state: what a Trainer keeps, which nobody has to want.
_KEPT_BESIDE = ("rng.", "state.")
Job: TypeAlias = Callable[[], None]
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Reader:
    """Reads parts of the tensors of one checkpoint. Each file is opened once. Thread-safe.

    Args:
        checkpoint: the checkpoint to read.
        cast: floating point numbers that are stored in another format are converted.
        checks: told of what is read, where it is to be checked on the way.
        progress: told the number of bytes of each stretch that was read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        cast: bool = False,
        checks: Checks | None = None,
        progress: Callable[[int], object] = lambda done: None,
    ):
        self._checkpoint, self._cast, self._checks, self._progress = checkpoint, cast, checks, progress
        self._opened: dict[str, TensorFile] = {}
        self._opening = threading.Lock()

    def fill(self, shard: Shard) -> None:
        """Write the stored elements of `shard` into its `data`.

        Raises:
            CheckpointError: there is no such tensor, or it has another shape or dtype.
            DamagedError: its file is damaged.
        """
        for job in self.jobs(shard):
            job()

    def jobs(self, shard: Shard) -> list[Job]:
        """Divide what `fill` does into parts that may run concurrently.

        Args:
            shard: the part to fill.

        Raises:
            CheckpointError: as `fill`; the parts may raise it too.
        """
        stored = self._checkpoint.manifest.tensors.get(shard.name)
        if stored is None:
            raise CheckpointError(f"the checkpoint has no tensor '{shard.name}'", got=self._checkpoint.directory)
        dtype = DTYPES[stored.dtype]
        if self._cast and dtype != shard.data.dtype and dtype.is_floating_point:
            return [functools.partial(self._fill_cast, shard, stored)]
        return self._fill(shard, stored)

    def tensor(self, name: str, box: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Read a tensor, or the part `box` of it, into host memory as it is stored.

        Args:
            name: of the tensor.
            box: the part, a slice per dim.

        Raises:
            CheckpointError: as `fill`.
        """
        stored = self._checkpoint.manifest.tensors[name]
        box = tuple(slice(0, size) for size in stored.shape) if box is None else box
        data = torch.empty([part.stop - part.start for part in box], dtype=DTYPES[stored.dtype])
        self.fill(Shard(name, stored.shape, box, data))
        return data

    def _fill_cast(self, shard: Shard, stored: StoredTensor) -> None:
        as_stored = torch.empty(shard.data.shape, dtype=DTYPES[stored.dtype])
        for job in self._fill(replace(shard, data=as_stored), stored):
            job()
        shard.data.copy_(as_stored)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Within it, what the system refuses to read is damage."""
        try:
            yield
        except OSError as error:
            raise DamagedError(
                f"a file of the checkpoint is damaged: {error}", got=self._checkpoint.directory
            ) from error

    def _fill(self, shard: Shard, stored: StoredTensor) -> list[Job]:
        dtype = DTYPE_NAMES[shard.data.dtype]
        if (stored.shape, stored.dtype) != (shard.shape, dtype):
            raise CheckpointError(
                f"tensor '{shard.name}' differs",
                got=f"{stored.dtype} {stored.shape} in the checkpoint",
                allowed=f"{dtype} {shard.shape}",
            )
        jobs: list[Job] = []
        missing = shard.data.numel()
        for part in stored.shards:
            common = [
                (max(p.start, a), min(p.stop, b)) for p, a, b in zip(shard.slices, part.start, part.stop, strict=True)
            ]
            if any(low >= high for low, high in common):
                continue
            into = tuple(
                slice(low - p.start, high - p.start) for (low, high), p in zip(common, shard.slices, strict=True)
            )
            box = tuple(slice(low - a, high - a) for (low, high), a in zip(common, part.start, strict=True))
            jobs += self._read(part, stored, box, shard.data[into] if into else shard.data)
            missing -= math.prod(high - low for low, high in common)
        # The manifest proves that shards cover a tensor once; this, that all that was wanted of it is filled.
        if missing:
            raise CheckpointError(
                f"tensor '{shard.name}' was not filled exactly once", got=f"{missing} elements are missing"
            )
        return jobs

    def _read(
        self, part: StoredShard, stored: StoredTensor, box: tuple[slice, ...], out: torch.Tensor
    ) -> Iterator[Job]:
        """Read `box` of a stored shard into `out`, in place or through host memory."""
        file = self._source(part.file)
        entry = file.entries.get(part.key)
        shape = tuple(b - a for a, b in zip(part.start, part.stop, strict=True))
        if entry is None or (entry.dtype, entry.shape) != (stored.dtype, shape):
            raise DamagedError(
                "a shard is not what the manifest says",
                got=f"{part.key}: {f'{entry.dtype} {entry.shape}' if entry else 'missing'}",
                allowed=f"{stored.dtype} {shape}",
            )
        stretch = file.stretch(part.key, box)
        if stretch is None or not out.is_contiguous():
            yield functools.partial(self._read_rows, file, part.key, box, out)
            return
        start, stop = stretch
        content = out.detach().reshape(-1).view(torch.uint8)
        for low, high, piece in self._portions(part.file, start, stop):
            yield functools.partial(self._read_stretch, file, low, piece, content[low - start : high - start])

    def _portions(self, file: str, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
        if self._checks:
            return self._checks.portions(file, start, stop)
        return ((low, min(low + PIECE_BYTES, stop), None) for low in range(start, stop, PIECE_BYTES))

    def _read_stretch(self, file: TensorFile, start: int, piece: int | None, out: torch.Tensor) -> None:
        on_host = out.device.type == "cpu"
        content = out if on_host else torch.empty(out.shape, dtype=torch.uint8)
        memory = content.numpy().data
        if piece is None or self._checks is None:
            with self._reading():
                file.fill(start, memory)
        else:
            digest = new_hash(self._checkpoint.manifest.hash)
            with self._reading():
                file.fill(start, memory, digest.update)
            self._checks.hold(piece, digest.hexdigest())
        if not on_host:
            out.copy_(content)
        self._progress(len(memory))

    def _read_rows(self, file: TensorFile, key: str, box: tuple[slice, ...], out: torch.Tensor) -> None:
        with self._reading():
            for place, items in file.parts(key, box):
                out[place].copy_(torch.from_numpy(np.ascontiguousarray(items)).view(out.dtype).squeeze(-1))
                self._progress(items.nbytes)

    def _source(self, file: str) -> TensorFile:
        with self._opening, self._reading():
            if file not in self._opened:
                self._opened[file] = TensorFile(self._checkpoint.directory / file)
            return self._opened[file]


def read_into(
    checkpoint: Checkpoint,
    shards: Sequence[Shard],
    ignore: Iterable[str] = (),
    cast: bool = False,
    check: Coordinator | None = None,
    progress: Callable[[int], object] = lambda done: None,
    elsewhere: Collection[str] = (),
) -> None:
    """Fill `shards` from the stored tensors.

    Args:
        checkpoint: the checkpoint to read.
        shards: the parts that this process holds; `data` is written in place.
        ignore: prefixes of stored names that need not be wanted.
        cast: as for `Reader`.
        check: the processes that read the checkpoint together, each its own shards: all of it is then compared with
            its hashes, and what one of them finds is raised by all. None: nothing is hashed, and no rank waits.
        progress: told the number of bytes of each stretch that this process has read.
        elsewhere: parameters that other processes alone have, with their optimizer state.

    Raises:
        CheckpointError: names, shapes or dtypes differ between the checkpoint and the run.
        DamagedError: the checkpoint is not what was written; what was filled is worth nothing.
    """
    checks = Checks(checkpoint) if check else None
    problem = None
    try:
        _check_names(checkpoint.manifest, {shard.name for shard in shards}, tuple(ignore), elsewhere)
        reader = Reader(checkpoint, cast, checks, progress)
        with ThreadPoolExecutor(_THREADS) as pool:
            jobs = itertools.chain.from_iterable(list(pool.map(reader.jobs, shards)))
            for _ in pool.map(lambda job: job(), jobs):
                pass
    except CheckpointError as error:
        if check is None:
            raise
        problem = error
    if check and checks:
        checks.conclude(check, problem, progress)


def _check_names(manifest: Manifest, wanted: set[str], ignore: tuple[str, ...], elsewhere: Collection[str]) -> None:
    stored = {
        name
        for name in manifest.tensors
        if not name.startswith((*ignore, *_KEPT_BESIDE)) and _parameter(name) not in elsewhere
    }
    missing, extra = sorted(wanted - set(manifest.tensors)), sorted(stored - wanted)
    if missing or extra:
        alike = all(name.startswith("optimizer.") for name in (*missing, *extra))
        raise CheckpointError(
            f"the checkpoint is of another {'optimizer' if alike else 'model'}",
            got=f"it lacks {_some(missing)}; it has in addition: {_some(extra)}",
            fix=f"give the {'optim' if alike else 'model'} configuration that it was trained with",
        )


def _parameter(name: str) -> str:
    """`model.embed.weight`, `optimizer.step.embed.weight` -> `embed.weight`."""
    return name.split(".", 2)[-1] if name.startswith("optimizer.") else name.partition(".")[2]


def _some(names: list[str], limit: int = 3) -> str:
    return (", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "nothing"
