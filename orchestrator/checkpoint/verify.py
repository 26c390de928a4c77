"""Opening a checkpoint means checking it. No torch: the launcher decides where to resume before it starts anyone."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import yaml

from orchestrator.checkpoint.format import (
    CONFIG,
    STATE,
    Manifest,
    Piece,
    parse_json,
    read_bounded,
)
from orchestrator.checkpoint.storage import AnyPath, read_range_into
from orchestrator.checkpoint.tensorfile import TensorFile
from orchestrator.errors import CheckpointError

_READ_BYTES = 1 << 20
_OWN = threading.local()
_MAX_STATE_BYTES, _MAX_CONFIG_BYTES = 1 << 26, 1 << 20
_THREADS = min(16, 2 * (os.cpu_count() or 1))


@dataclass(frozen=True)
class Damage:
    """A stretch of a file that is not what was written.

    Attributes:
        file: its name.
        start, stop: the bytes that a hash covers.
        tensors: `name[box]` of the stored shards that have bytes there, where that can be told.
        reason: what is wrong, where it is not the hash.
    """

    file: str
    start: int
    stop: int
    tensors: tuple[str, ...]
    reason: str = "does not match its hash"

    def __str__(self) -> str:
        holds = f" ({', '.join(self.tensors)})" if self.tensors else ""
        return f"{self.file} bytes {self.start} to {self.stop} {self.reason}{holds}"


class Checkpoint:
    """A committed checkpoint.

    Raises:
        CheckpointError: not a checkpoint, or its manifest and files contradict each other.
    """

    def __init__(self, directory: AnyPath):
        self.directory = directory
        self.manifest = Manifest.read(directory)
        for name, file in self.manifest.files.items():
            path = directory / name
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                got = "missing" if size is None else f"{size} bytes"
                raise CheckpointError(
                    f"file '{name}' of the checkpoint is damaged",
                    got=f"{got} in {directory}",
                    allowed=f"{file.bytes} bytes",
                )

    @property
    def step(self) -> int:
        return self.manifest.step

    def state(self) -> dict[str, Any]:
        """What travelled along: step, data position, provenance."""
        return self._mapping(STATE, _MAX_STATE_BYTES, parse_json)

    def config(self) -> dict[str, Any]:
        """The configuration of the run that wrote it, as plain data."""
        return self._mapping(CONFIG, _MAX_CONFIG_BYTES, lambda text: _PlainLoader(text).get_single_data())

    def read(self, name: str, limit: int = _MAX_STATE_BYTES) -> bytes:
        """The content of one of its small files.

        Raises:
            CheckpointError: there is no such file in the manifest, or it cannot be read.
        """
        if name not in self.manifest.files:
            raise CheckpointError(f"the checkpoint has no file '{name}'", got=self.directory)
        try:
            return read_bounded(self.directory / name, limit)
        except OSError as error:
            raise CheckpointError(
                f"file '{name}' of the checkpoint is damaged: {error!r}", got=self.directory
            ) from None

    def _mapping(self, name: str, limit: int, parse: Callable[[bytes], Any]) -> dict[str, Any]:
        try:
            data = parse(self.read(name, limit))
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"file '{name}' of the checkpoint is damaged: {error!r}", got=self.directory / name
            ) from None
        if not isinstance(data, dict):
            raise CheckpointError(
                f"file '{name}' of the checkpoint is damaged: not a mapping", got=self.directory / name
            )
        return data

    def verify(self, progress: Callable[[int], object] = lambda done: None) -> None:
        """Hash every piece of every file, in parallel.

        Args:
            progress: told the number of bytes of each stretch that was read.

        Raises:
            CheckpointError: a file does not have the content that was written; it names files, ranges and tensors.
        """
        damaged = list(self.damage(progress))
        if damaged:
            files = ", ".join(dict.fromkeys(one.file for one in damaged))
            shown = "\n           ".join(str(one) for one in damaged[:8])
            more = f"\n           and {len(damaged) - 8} more ranges" if len(damaged) > 8 else ""
            raise CheckpointError(
                f"the checkpoint is damaged: {files} cannot be read or does not match its hash",
                got=f"{shown}{more}\n           in {self.directory}",
            )

    def damage(self, progress: Callable[[int], object] = lambda done: None) -> Iterator[Damage]:
        """What `verify` finds, piece by piece, in the order of the manifest."""

        def check(task: tuple[str, int, Piece]) -> Damage | None:
            name, offset, piece = task
            reason = _compare(self.directory / name, offset, piece, progress)
            stop = offset + piece.bytes
            return Damage(name, offset, stop, self._tensors_at(name, offset, stop), reason) if reason else None

        tasks = [(name, *place) for name, file in self.manifest.files.items() for place in file.ranges()]
        with ThreadPoolExecutor(_THREADS) as pool:
            yield from (one for one in pool.map(check, tasks) if one)

    def _tensors_at(self, name: str, start: int, stop: int) -> tuple[str, ...]:
        try:
            spans = TensorFile(self.directory / name).spans() if name.endswith(".safetensors") else {}
        except (CheckpointError, OSError):
            return ()  # the header itself is damaged
        hit = {key for key, (first, last) in spans.items() if first < stop and last > start}
        found = []
        for tensor_name, tensor in self.manifest.tensors.items():
            for shard in tensor.shards:
                if shard.file == name and shard.key in hit:
                    box = ", ".join(f"{a}:{b}" for a, b in zip(shard.start, shard.stop, strict=True))
                    found.append(f"{tensor_name}[{box}]")
        return tuple(found)


def _compare(path: AnyPath, offset: int, piece: Piece, progress: Callable[[int], object]) -> str:
    """What is wrong with a piece; nothing where it is as it was written."""
    digest, left = hashlib.sha256(), piece.bytes
    buffer = _buffer()
    try:
        while left and (count := read_range_into(path, offset, buffer[:left])):
            digest.update(buffer[:count])
            offset, left = offset + count, left - count
            progress(count)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return "" if digest.hexdigest() == piece.sha256 else "does not match its hash"


def _buffer() -> memoryview:
    """Memory of this thread to read into: new pages for each stretch cost as much as its hash."""
    if not hasattr(_OWN, "buffer"):
        _OWN.buffer = memoryview(bytearray(_READ_BYTES))
    buffer: memoryview = _OWN.buffer
    return buffer


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them describe more data than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)
