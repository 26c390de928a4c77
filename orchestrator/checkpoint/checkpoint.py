"""Open and verify a checkpoint. No torch: the launcher uses it before it starts any process."""

from __future__ import annotations

import bisect
import itertools
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import yaml

from orchestrator.checkpoint.format import (
    CONFIG,
    SIGNATURE,
    STATE,
    Manifest,
    check_state,
    parse_json,
    read_manifest,
)
from orchestrator.checkpoint.hashing import Piece, hash_of, new_hash
from orchestrator.checkpoint.signing import MAX_BYTES as MAX_SIGNATURE_BYTES
from orchestrator.checkpoint.signing import Trust
from orchestrator.checkpoint.storage import (
    PIECE_BYTES,
    READ_BYTES,
    AnyPath,
    is_remote,
    read_bounded,
    read_range,
    read_range_into,
    size_of,
    there,
)
from orchestrator.checkpoint.tensorfile import TensorFile
from orchestrator.errors import CheckpointError, DamagedError

_NO_MATCH, _MAX_LINES = "does not match its hash", 8
_MAX_TENSORS = 20  # that are named of one damaged range
_OWN = threading.local()
_MAX_STATE_BYTES, _MAX_CONFIG_BYTES = 1 << 26, 1 << 16
_MAX_YAML_MARKS, _MAX_YAML_OPENED = 2000, 300
_NESTED = re.compile(rb"(?:[-?:][ \t]+){30}")
# What the parsers of JSON and YAML raise where a text is none; PyYAML's constructors some more than they say.
_NOT_PARSED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, yaml.YAMLError)
_THREADS = min(16, 2 * (os.cpu_count() or 1))


@dataclass(frozen=True)
class Damage:
    """A range of a file whose hash is not the recorded one.

    Attributes:
        file: its name.
        start: first byte that the hash covers.
        stop: the byte behind the last one.
        tensors: `name[box]` of the stored shards that have bytes there, where that can be told.
        reason: what is wrong, where it is not the hash.
    """

    file: str
    start: int
    stop: int
    tensors: tuple[str, ...]
    reason: str = _NO_MATCH

    def __str__(self) -> str:
        holds = f" ({', '.join(self.tensors)})" if self.tensors else ""
        return f"{self.file} bytes {self.start} to {self.stop} {self.reason}{holds}"


@dataclass(frozen=True)
class ByteRange:
    """The location of a piece: `piece.bytes` bytes of `file` from `start` on.

    Attributes:
        file: its name.
        start: first byte.
        piece: size and hash.
    """

    file: str
    start: int
    piece: Piece

    @property
    def stop(self) -> int:
        """The first byte of the file behind the piece."""
        return self.start + self.piece.bytes


class Checkpoint:
    """A committed checkpoint.

    Args:
        directory: of this machine or of a store.
        trust: whose checkpoints are accepted; by default all.
        look: see whether every file is there with its size. False where that was done a moment ago.
        partial: this host may have some of its tensor files only, and others the rest.

    Attributes:
        directory: where it is.
        partial: as above.
        content: bytes of its manifest.
        signature: bytes of `manifest.sig`, which was checked; None where there is none.
        manifest: what it says.

    Raises:
        CheckpointError: not a checkpoint, its manifest contradicts itself, or it is not trusted.
        DamagedError: a file is missing or of another size.
        MissingExtraError: its hashes are of a kind whose library is not installed.
    """

    def __init__(self, directory: AnyPath, trust: Trust = Trust(), look: bool = True, partial: bool = False):
        self.directory, self.partial = directory, partial
        self._spans: dict[str, list[tuple[int, int, str]]] = {}
        self.content = read_manifest(directory)
        self.signature = self._signature()
        trust.check(self.content, self.signature, directory)
        self.manifest = Manifest.parse(self.content, directory)
        new_hash(self.manifest.hash)  # or say what is missing
        if look:
            self._look()

    def _look(self) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            sizes = pool.map(self._size, self.manifest.files)
            for (name, file), size in zip(self.manifest.files.items(), sizes, strict=True):
                if size != file.bytes:
                    got = "missing" if size is None else f"{size} bytes"
                    raise DamagedError(
                        f"file '{name}' of the checkpoint is damaged",
                        got=f"{got} in {self.directory}",
                        allowed=f"{file.bytes} bytes",
                    )

    def _size(self, name: str) -> int | None:
        try:
            return size_of(self.directory / name)
        except OSError as error:
            raise DamagedError(
                f"file '{name}' of the checkpoint cannot be read: {error.strerror or error}", got=self.directory
            ) from None

    def _signature(self) -> bytes | None:
        path = self.directory / SIGNATURE
        try:
            return read_bounded(path, MAX_SIGNATURE_BYTES) if there(path) else None
        except OSError as error:
            raise CheckpointError(f"the signature cannot be read: {error.strerror or error}", got=path) from None

    def tensor_files_here(self) -> list[str]:
        """Return the tensor files that this host has, with their size."""
        return [name for name in sorted(self.manifest.tensor_files()) if self._is_here(name)]

    def _is_here(self, name: str) -> bool:
        try:
            return size_of(self.directory / name) == self.manifest.files[name].bytes
        except OSError:
            return False

    @property
    def step(self) -> int:
        """Optimizer steps completed when it was saved."""
        return self.manifest.step

    def places(self) -> Iterator[ByteRange]:
        """Every piece of every file, in the order of the manifest."""
        for name, file in self.manifest.files.items():
            for offset, piece in file.ranges():
                yield ByteRange(name, offset, piece)

    def state(self) -> dict[str, Any]:
        """Read `state.json`: step, data position, provenance."""

        def parse(content: bytes) -> Any:
            data = parse_json(content)
            if isinstance(data, dict):
                check_state(data, self.step)
            return data

        return self._mapping(STATE, _MAX_STATE_BYTES, parse)

    def config(self) -> dict[str, Any]:
        """Read the configuration of the run that wrote it, as plain data."""
        return self._mapping(CONFIG, _MAX_CONFIG_BYTES, _parse_yaml)

    def read(self, name: str, limit: int = _MAX_STATE_BYTES) -> bytes:
        """Return the content of one of its small files.

        Args:
            name: of the file.
            limit: largest size in bytes.

        Raises:
            CheckpointError: there is no such file in the manifest, or it is larger.
            DamagedError: it cannot be read, or is not what was written.
        """
        if name not in self.manifest.files:
            raise CheckpointError(f"the checkpoint has no file '{name}'", got=self.directory)
        try:
            content = read_bounded(self.directory / name, limit)
        except OSError as error:
            raise DamagedError(f"file '{name}' of the checkpoint is damaged: {error!r}", got=self.directory) from None
        stored = self.manifest.files[name]
        # It was as large as that when the checkpoint was opened.
        whole = len(content) == stored.bytes and all(
            hash_of(self.manifest.hash, content[start : start + piece.bytes]) == piece.hash
            for start, piece in stored.ranges()
        )
        if not whole:
            raise DamagedError(
                f"file '{name}' of the checkpoint is damaged: it does not match its hash", got=self.directory
            )
        return content

    def _mapping(self, name: str, limit: int, parse: Callable[[bytes], Any]) -> dict[str, Any]:
        try:
            data = parse(self.read(name, limit))
        except _NOT_PARSED as error:
            raise CheckpointError(
                f"file '{name}' of the checkpoint is damaged: {error!r}"[:500], got=self.directory / name
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
            DamagedError: a file does not have the content that was written; it names files, ranges and tensors.
        """
        self._refuse(self.damage(progress))

    def verify_beside(self) -> None:
        """Hash what lies beside the tensors: little, and all of it is read at a start.

        Raises:
            DamagedError: as `verify`.
        """
        hold_tensors = self.manifest.tensor_files()
        self._refuse(self.damage(places=(place for place in self.places() if place.file not in hold_tensors)))

    def _refuse(self, damage: Iterable[Damage]) -> None:
        if found := list(damage):
            raise damaged_error(self.directory, [one.file for one in found], [str(one) for one in found])

    def damage(
        self, progress: Callable[[int], object] = lambda done: None, places: Iterable[ByteRange] | None = None
    ) -> Iterator[Damage]:
        """Yield what `verify` finds, piece by piece, in the order of the manifest, or of `places`.

        Args:
            progress: told the number of bytes of each piece.
            places: pieces to look at; None: all.
        """

        def check(place: ByteRange) -> Damage | None:
            reason = self.compare(place, lambda part: progress(len(part)))
            return self.damage_at(place, reason) if reason else None

        tasks = iter(self.places() if places is None else places)
        waiting: deque[Future[Damage | None]] = deque()
        with ThreadPoolExecutor(_THREADS) as pool:
            # Not all at once: a manifest can name millions of pieces.
            waiting.extend(pool.submit(check, task) for task in itertools.islice(tasks, 4 * _THREADS))
            while waiting:
                found = waiting.popleft().result()
                waiting.extend(pool.submit(check, task) for task in itertools.islice(tasks, 1))
                if found:
                    yield found

    def compare(self, place: ByteRange, tell: Callable[[memoryview], object]) -> str:
        """Compare a piece with its hash. Returns what is wrong with it, empty where nothing is.

        Args:
            place: of the piece.
            tell: given each stretch of it, in order.
        """
        return _compare(self.directory / place.file, place, self.manifest.hash, tell)

    def damage_at(self, place: ByteRange, reason: str = _NO_MATCH) -> Damage:
        """Describe a damaged piece, with the tensors that lie in it.

        Args:
            place: of the piece.
            reason: what is wrong with it.
        """
        return Damage(
            place.file, place.start, place.stop, self._tensors_at(place.file, place.start, place.stop), reason
        )

    def _tensors_at(self, name: str, start: int, stop: int) -> tuple[str, ...]:
        if name not in self._spans:
            self._spans[name] = self._spans_of(name)
        spans = self._spans[name]
        # They lie one behind the other.
        first = bisect.bisect_right(spans, start, key=lambda span: span[1])
        hit = itertools.takewhile(lambda span: span[0] < stop, itertools.islice(spans, first, None))
        return tuple(text for _, _, text in itertools.islice(hit, _MAX_TENSORS))

    def _spans_of(self, name: str) -> list[tuple[int, int, str]]:
        """First byte, last and name of each shard of a tensor file, in order; none where its header is damaged."""
        try:
            spans = TensorFile(self.directory / name).spans() if name.endswith(".safetensors") else {}
        except (CheckpointError, OSError):
            return []
        found = []
        for tensor_name, tensor in self.manifest.tensors.items():
            for shard in tensor.shards:
                if shard.file == name and shard.key in spans:
                    box = ", ".join(f"{a}:{b}" for a, b in zip(shard.start, shard.stop, strict=True))
                    found.append((*spans[shard.key], f"{tensor_name}[{box}]"))
        return sorted(found)


def damaged_error(directory: AnyPath, files: Iterable[str], lines: Sequence[str]) -> DamagedError:
    """Make the error for damage in `files`, with the `lines` that describe it.

    Args:
        directory: of the checkpoint.
        files: names of the damaged ones.
        lines: what is wrong, one line each.
    """
    shown = "\n           ".join(lines[:_MAX_LINES])
    more = f"\n           and {len(lines) - _MAX_LINES} more ranges" if len(lines) > _MAX_LINES else ""
    return DamagedError(
        f"the checkpoint is damaged: {', '.join(dict.fromkeys(files))} cannot be read or does not match its hash",
        got=f"{shown}{more}\n           in {directory}",
    )


def _compare(path: AnyPath, place: ByteRange, algorithm: str, tell: Callable[[memoryview], object]) -> str:
    digest, offset, left = new_hash(algorithm), place.start, place.piece.bytes

    def add(part: memoryview) -> None:
        digest.update(part)
        tell(part)

    try:
        # Of a store a piece at a time, which the writer keeps to 16 MiB: a request takes longer than to read that.
        if is_remote(path) and left <= PIECE_BYTES:
            add(memoryview(read_range(path, offset, offset + left)))
        else:
            buffer = _buffer()
            while left and (count := read_range_into(path, offset, buffer[:left], add)):
                offset, left = offset + count, left - count
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return "" if digest.hexdigest() == place.piece.hash else _NO_MATCH


def _buffer() -> memoryview:
    """Memory of this thread to read into: new pages for each stretch cost as much as its hash."""
    if not hasattr(_OWN, "buffer"):
        _OWN.buffer = memoryview(bytearray(READ_BYTES))
    buffer: memoryview = _OWN.buffer
    return buffer


def _parse_yaml(content: bytes) -> Any:
    """YAML of no more nesting than a configuration has: PyYAML's time grows with its square."""
    opened = content.count(b"[") + content.count(b"{")
    if opened > _MAX_YAML_OPENED or opened + content.count(b",") > _MAX_YAML_MARKS or _NESTED.search(content):
        raise ValueError("it is nested too deep or too long")
    return _PlainLoader(content).get_single_data()


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, by which a few lines can expand beyond any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)
