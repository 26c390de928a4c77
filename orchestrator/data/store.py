"""The token store: a directory of memory-mapped shards, read by many processes at random positions.

```
index.json            written last, by atomic rename: a directory without it is not a store
tokenizer.json        and the files that belong to it: a store always carries its tokenizer
tokens-00000.bin      little-endian uint16, or uint32 for more than 65536 tokens; every document begins and ends as
                      the index says, with the end-of-text token at its end by default
offsets-00000.bin     little-endian int64: where in the shard each document starts
mask-00000.bin        of conversations, a byte per token: 1 where it counts in the loss; 2 where a pair's second begins
checks-00000.bin      little-endian uint32: CRC-32 of each 64 KiB of the token file, then of the mask
```

The documents of a split are in a shuffled order, so that any window mixes what the inputs held apart.

Nothing is taken on trust: the index is checked as a whole and every file's kind and size before one is opened; a
block's checksum and its token ids when the block is first read. So a store of terabytes opens at once, and a flipped
bit is an error that names the file, never a token that is trained on.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.document_format import DocumentFormat
from orchestrator.data.model_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from orchestrator.data.plain_files import regular_size
from orchestrator.data.store_index import (
    BLOCK_BYTES,
    CHECK_BYTES,
    COUNTS,
    OFFSET_BYTES,
    SECOND,
    SPLITS,
    ShardInfo,
    StoreIndex,
    damaged,
    has_index,
    read_index,
)
from orchestrator.data.tokenize import Tokenizer, load_tokenizer
from orchestrator.errors import DataError

MAX_TOKENIZER_BYTES = 1 << 27
_READ_TOKENS = 1 << 20


class Split:
    """One long sequence of tokens over several shards.

    Args:
        folder: of the store.
        shards: those of the split, in order.
        index: of the store.

    Attributes:
        tokens: its length.
        documents: how many end-of-text tokens it has.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardInfo], index: StoreIndex):
        self._folder, self._shards = folder, list(shards)
        self._dtype, self._vocab_size = np.dtype(index.dtype), index.vocab_size
        self._open: dict[int, dict[str, _Column]] = {}
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)]).tolist()
        self.tokens: int = self._starts[-1]
        self.documents: int = sum(shard.documents for shard in shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` (excluded) as int64 of shape [stop - start].

        Raises:
            IndexError: the range is not within the split.
            DataError: a file is not what was written; names it.
        """
        return self._read("tokens", start, stop, np.empty(max(0, stop - start), dtype=np.int64))

    def read_mask(self, start: int, stop: int) -> np.ndarray:
        """Return whether tokens count in the loss, bool of shape [stop - start]; of conversations alone.

        Args:
            start: the first token.
            stop: the one behind the last.

        Raises:
            IndexError: the range is not within the split.
            DataError: a file is not what was written; names it.
        """
        return (self.read_marks(start, stop) & COUNTS).astype(bool)

    def read_marks(self, start: int, stop: int) -> np.ndarray:
        """Return the bytes of the mask of tokens `start` to `stop`, uint8: `COUNTS` and `SECOND`.

        Raises:
            IndexError: the range is not within the split.
            DataError: a file is not what was written; names it.
        """
        return self._read("mask", start, stop, np.empty(max(0, stop - start), dtype=np.uint8))

    def _read(self, column: str, start: int, stop: int, result: np.ndarray) -> np.ndarray:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of a split that has {self.tokens}")
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        position = start
        while position < stop:
            low = self._starts[shard]
            end = min(stop, self._starts[shard + 1])
            result[position - start : end - start] = self._shard(shard)[column].read(position - low, end - low)
            position, shard = end, shard + 1
        return result

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Where each document starts, and the end of the last one, int64 of shape [documents + 1].

        Raises:
            DataError: they do not follow on each other.
        """
        parts = [self._offsets(shard) + low for shard, low in zip(self._shards, self._starts, strict=False)]
        starts = np.concatenate([*parts, [self.tokens]]).astype(np.int64)
        if starts[0] != 0 or (np.diff(starts) < 1).any():
            raise damaged(
                self._folder, "documents that do not follow on each other", "the offsets as they were written"
            )
        return starts

    def _offsets(self, shard: ShardInfo) -> np.ndarray:
        _check_file(self._folder, shard.offsets_file, shard.documents * OFFSET_BYTES)
        return np.memmap(self._folder / shard.offsets_file, dtype="<i8", mode="r")

    def document(self, index: int) -> np.ndarray:
        """Tokens of the `index`-th document, its end-of-text token included, int64 of shape [tokens]."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of a split that has {self.documents}")
        for number, shard in enumerate(self._shards):
            if index < shard.documents:
                start, stop = self._extent(shard, index)
                return self.read(self._starts[number] + start, self._starts[number] + stop)
            index -= shard.documents
        raise AssertionError("the shards have all the documents")

    def document_mask(self, index: int) -> np.ndarray | None:
        """Which tokens of the `index`-th document count in the loss, bool of shape [tokens]; None where all do."""
        if not self._shards or self._shards[0].mask_file is None:
            return None
        return self.read_mask(*self.document_starts[index : index + 2].tolist())

    def _extent(self, shard: ShardInfo, index: int) -> tuple[int, int]:
        """Where in its shard a document starts and ends."""
        file, offsets = self._folder / shard.offsets_file, self._offsets(shard)
        start = int(offsets[index])
        stop = int(offsets[index + 1]) if index + 1 < shard.documents else shard.tokens
        if not 0 <= start < stop <= shard.tokens:
            raise damaged(file, f"document {index} from {start} to {stop}", f"within 0 to {shard.tokens}")
        return start, stop

    def _shard(self, number: int) -> dict[str, _Column]:
        if number not in self._open:
            self._open[number] = _columns(self._folder, self._shards[number], self._dtype, self._vocab_size)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself instead of receiving a copy of them.
        return {**self.__dict__, "_open": {}}


def _columns(folder: Path, info: ShardInfo, dtype: np.dtype, vocab_size: int) -> dict[str, _Column]:
    """Return the tokens of a shard and, of conversations, their mask."""
    for name, size, _ in info.files():
        _check_file(folder, name, size)
    checks: np.ndarray | None = None
    if info.checks_file is not None:
        # A few kilobytes: read whole and compared with the index, so that what is compared with is right.
        size = (info.blocks + info.mask_blocks) * CHECK_BYTES
        _check_file(folder, info.checks_file, size, info.checks_sha256)
        checks = np.fromfile(folder / info.checks_file, dtype="<u4")
    columns = {"tokens": _Column(folder / info.file, dtype, vocab_size - 1, checks)}
    if info.mask_file is not None:
        rest = None if checks is None else checks[info.blocks :]
        columns["mask"] = _Column(folder / info.mask_file, np.dtype(np.uint8), COUNTS | SECOND, rest)
    return columns


class _Column:
    """One file of a shard. Each block is compared with its checksum when it is first read."""

    def __init__(self, file: Path, dtype: np.dtype, largest: int, checks: np.ndarray | None):
        self._file, self._largest, self._checks = file, largest, checks
        self._values = np.memmap(file, dtype=dtype, mode="r")
        self._bytes = self._values.view(np.uint8)
        self._seen = np.zeros(-(-self._bytes.size // BLOCK_BYTES), dtype=bool)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values `start` to `stop` of the shard."""
        width = self._values.itemsize
        if self._checks is not None and stop > start:
            self._check(start * width // BLOCK_BYTES, (stop * width - 1) // BLOCK_BYTES)
        values = self._values[start:stop]
        # Also where the checksums agree: the writer of the store may have been wrong.
        if values.size and (largest := int(values.max())) > self._largest:
            at = start + int(np.argmax(values))
            what = "the ids of its vocabulary" if self._largest > COUNTS | SECOND else "what a mask has"
            raise damaged(self._file, f"token id {largest} at token {at}", f"0 to {self._largest}, {what}")
        return values

    def _check(self, first: int, last: int) -> None:
        assert self._checks is not None
        for block in range(first, last + 1):
            if self._seen[block]:
                continue
            low = block * BLOCK_BYTES
            found = zlib.crc32(self._bytes[low : low + BLOCK_BYTES].data)
            if found != int(self._checks[block]):
                high = min(low + BLOCK_BYTES, self._bytes.size)
                raise damaged(
                    self._file, f"bytes {low} to {high} with checksum {found:08x}", f"{int(self._checks[block]):08x}"
                )
            self._seen[block] = True


class TokenStore:
    """A complete token store. Open one with `TokenStore.open`.

    Args:
        path: the directory.
        index: its parsed `index.json`.
    """

    def __init__(self, path: Path, index: StoreIndex):
        self.path, self.index = path, index

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> TokenStore:
        """Open the store in the directory `path`.

        Args:
            path: the directory.
            verify: read and hash every file instead of comparing sizes only.

        Raises:
            DataError: not a store, of another version, or damaged; names the file.
        """
        folder = Path(path)
        index = read_index(folder)
        for shard in index.shards:
            for name, size, sha256 in shard.files():
                _check_file(folder, name, size, sha256 if verify else None)
        store = cls(folder, index)
        store._check_tokenizer_files()
        if verify:
            _ = store.tokenizer
            store._check_ids()
        return store

    def split(self, name: str) -> Split:
        """Return the split `train` or `validation`; it may be empty.

        Args:
            name: of the split.
        """
        if name not in self.index.splits:
            raise DataError("there is no such split", got=name, allowed=", ".join(SPLITS))
        return Split(self.path, [self.index.shards[i] for i in self.index.splits[name].shards], self.index)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            DataError: it is missing or is another one.
        """
        self._check_tokenizer_files()
        record = {**self.index.document_format.record(), "eos_id": self.index.eos_id}
        tokenizer = load_tokenizer(self.path, record=record)
        if tokenizer.fingerprint != self.index.tokenizer_fingerprint:
            raise damaged(
                self.path / TOKENIZER_FILE,
                f"fingerprint {tokenizer.fingerprint[:12]}",
                f"fingerprint {self.index.tokenizer_fingerprint[:12]}, with which the tokens were made",
            )
        return tokenizer

    def _check_tokenizer_files(self) -> None:
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
            file = self.path / name
            if name == TOKENIZER_CONFIG_FILE and not os.path.lexists(file):
                continue  # the tokenizer's own names tell the end-of-text token
            try:
                size = regular_size(file, within=self.path)
            except DataError as error:
                raise damaged(file, str(error.got), "a regular file in the store") from error
            if size > MAX_TOKENIZER_BYTES:
                raise damaged(file, f"{size} bytes", f"at most {MAX_TOKENIZER_BYTES} bytes")

    def _check_ids(self) -> None:
        for name in SPLITS:
            split = self.split(name)
            for start in range(0, split.tokens, _READ_TOKENS):
                split.read(start, min(start + _READ_TOKENS, split.tokens))
                if self.holds_conversations:
                    split.read_mask(start, min(start + _READ_TOKENS, split.tokens))

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer that wrote it."""
        return self.index.vocab_size

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token."""
        return self.index.eos_id

    @property
    def documents(self) -> DocumentFormat:
        """The tokens that documents begin and end with."""
        return self.index.document_format

    @property
    def holds_conversations(self) -> bool:
        """Whether its documents are conversations, of whose tokens a mask says which count in the loss."""
        return bool(self.index.conversations)

    @property
    def holds_pairs(self) -> bool:
        """Whether its documents are pairs of responses."""
        return bool(self.index.conversations.get("pairs"))

    @property
    def fingerprint(self) -> str:
        """Hash of the content: equal stores have equal ones."""
        return self.index.fingerprint

    @property
    def unigram_entropy_nats(self) -> float:
        """Entropy of the token frequencies, in nats per token."""
        return self.index.unigram_entropy_nats

    def describe(self) -> dict[str, Any]:
        """Return what the store holds, for reports, as plain data for JSON."""
        index = self.index
        return {
            "path": str(self.path),
            "vocab_size": index.vocab_size,
            "unigram_entropy_nats": index.unigram_entropy_nats,
            "fingerprint": index.fingerprint,
            "documents": {**index.document_format.record(), "eos_id": index.eos_id},
            "splits": {
                name: {"tokens": split.tokens, "documents": split.documents, "text_bytes": split.text_bytes}
                for name, split in index.splits.items()
            },
            "source": index.source,
            **({"conversations": index.conversations} if index.conversations else {}),
        }


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory that a store was written to; it may be damaged or incomplete."""
    folder = Path(path).expanduser()
    return (folder / "tokens-00000.bin").is_file() or has_index(folder)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's content, in hex.

    Args:
        path: a file or a directory.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(folder: Path, name: str, size: int, sha256: str | None = None) -> None:
    file = folder / name
    try:
        found_size = regular_size(file, within=folder)
    except DataError as error:
        raise damaged(file, str(error.got), f"a regular file of {size} bytes in the store") from error
    if found_size != size:
        raise damaged(file, f"{found_size} bytes", f"{size} bytes")
    if sha256 is not None and (found := hash_file(file)) != sha256:
        raise damaged(file, f"sha256 {found[:12]}", f"sha256 {sha256[:12]}")
