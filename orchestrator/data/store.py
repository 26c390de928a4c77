"""The token store: a directory of memory-mapped shards that many processes read at random positions.

```
index.json            written last, by atomic rename: a directory without it is not a store
tokenizer.json        and tokenizer_config.json: a store always carries its tokenizer
tokens-00000.bin      little-endian uint16, or uint32 for more than 65536 tokens; every document ends with eos
offsets-00000.bin     little-endian int64: where in the shard each document starts
```

The documents of a split are in a shuffled order, so that any window mixes what the inputs held apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from orchestrator.data.tokenize import TOKENIZER_FILE, Tokenizer, load_tokenizer
from orchestrator.errors import DataError

FORMAT, FORMAT_VERSION = "orchestrator-token-store", 1
INDEX_FILE = "index.json"
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")
_OFFSET_BYTES = 8


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the index lists it.

    Attributes:
        tokens: how many, the end-of-text tokens included.
        bytes: size of the token file.
    """

    file: str
    offsets_file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    offsets_sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split as the index lists it: its shards in order, and the UTF-8 bytes of its text."""

    shards: tuple[int, ...]
    tokens: int
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class StoreIndex:
    """The content of `index.json`.

    Attributes:
        unigram_entropy_nats: of the training split's tokens; a model that has learnt anything has a lower loss.
        fingerprint: of every token, of the order of the documents and of the tokenizer.
        skipped_files: files that a search found and that are not text.
    """

    dtype: str
    vocab_size: int
    eos_id: int
    shards: tuple[ShardInfo, ...]
    splits: dict[str, SplitInfo]
    unigram_entropy_nats: float
    tokenizer_fingerprint: str
    fingerprint: str
    source: dict[str, Any] = field(default_factory=dict)
    skipped_files: int = 0

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"


class Split:
    """One long sequence of tokens over several shards.

    Attributes:
        tokens: its length.
        documents: how many end-of-text tokens it has.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardInfo], dtype: str):
        self._folder, self._shards, self._dtype = folder, list(shards), np.dtype(dtype)
        self._maps: dict[int, np.memmap] = {}
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)]).tolist()
        self.tokens: int = self._starts[-1]
        self.documents: int = sum(shard.documents for shard in shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` (excluded) as int64 of shape [stop - start].

        Raises:
            IndexError: the range is not within the split.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of a split that has {self.tokens}")
        result = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        position = start
        while position < stop:
            low = self._starts[shard]
            end = min(stop, self._starts[shard + 1])
            result[position - start : end - start] = self._map(shard)[position - low : end - low]
            position, shard = end, shard + 1
        return result

    def document(self, index: int) -> np.ndarray:
        """Tokens of the `index`-th document, its end-of-text token included, int64 of shape [tokens]."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of a split that has {self.documents}")
        for number, shard in enumerate(self._shards):
            if index < shard.documents:
                offsets = np.memmap(self._folder / shard.offsets_file, dtype="<i8", mode="r")
                stop = int(offsets[index + 1]) if index + 1 < shard.documents else shard.tokens
                return self.read(self._starts[number] + int(offsets[index]), self._starts[number] + stop)
            index -= shard.documents
        raise AssertionError("the shards have all the documents")

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._folder / self._shards[shard].file, dtype=self._dtype, mode="r")
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself instead of receiving a copy of them.
        return {**self.__dict__, "_maps": {}}


class TokenStore:
    """A store that is complete. Open one with `TokenStore.open`."""

    def __init__(self, path: Path, index: StoreIndex):
        self.path, self.index = path, index

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> TokenStore:
        """Open the store in the directory `path`.

        Args:
            verify: read and hash every file instead of comparing sizes only.

        Raises:
            DataError: not a store, of another version, or damaged; names the file.
        """
        folder = Path(path)
        index = _read_index(folder)
        for shard in index.shards:
            _check_file(folder / shard.file, shard.bytes, shard.sha256 if verify else None)
            offsets_hash = shard.offsets_sha256 if verify else None
            _check_file(folder / shard.offsets_file, shard.documents * _OFFSET_BYTES, offsets_hash)
        store = cls(folder, index)
        if verify or not (folder / TOKENIZER_FILE).is_file():
            _ = store.tokenizer
        return store

    def split(self, name: str) -> Split:
        """The split `train` or `validation`; it may be empty."""
        if name not in self.index.splits:
            raise DataError("there is no such split", got=name, allowed=", ".join(SPLITS))
        return Split(self.path, [self.index.shards[i] for i in self.index.splits[name].shards], self.index.dtype)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            DataError: it is missing or is another one.
        """
        tokenizer = load_tokenizer(self.path)
        if tokenizer.fingerprint != self.index.tokenizer_fingerprint:
            raise _damaged(
                self.path / TOKENIZER_FILE,
                f"fingerprint {tokenizer.fingerprint[:12]}",
                f"fingerprint {self.index.tokenizer_fingerprint[:12]}, with which the tokens were made",
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self.index.vocab_size

    @property
    def eos_id(self) -> int:
        return self.index.eos_id

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint

    @property
    def unigram_entropy_nats(self) -> float:
        return self.index.unigram_entropy_nats

    def describe(self) -> dict[str, Any]:
        """What the store holds, for reports, as JSON-able values."""
        index = self.index
        return {
            "path": str(self.path),
            "vocab_size": index.vocab_size,
            "unigram_entropy_nats": index.unigram_entropy_nats,
            "fingerprint": index.fingerprint,
            "splits": {
                name: {"tokens": split.tokens, "documents": split.documents, "text_bytes": split.text_bytes}
                for name, split in index.splits.items()
            },
            "source": index.source,
        }


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory that a store was written to; it may be damaged or incomplete."""
    folder = Path(path).expanduser()
    if (folder / "tokens-00000.bin").is_file():
        return True
    try:
        content = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def store_fingerprint(shards: Sequence[ShardInfo], splits: dict[str, SplitInfo], tokenizer_fingerprint: str) -> str:
    """sha256 over the hashes of the tokens, split by split, and the tokenizer's."""
    parts = [tokenizer_fingerprint]
    for name in SPLITS:
        parts += [name, *(shards[i].sha256 for i in splits[name].shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(folder: Path) -> StoreIndex:
    file = folder / INDEX_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"this is not a token store: {folder}",
            got=f"{error.strerror}: {file}",
            allowed="a directory that 'python -m orchestrator data prepare' has completed",
            fix="prepare it: python -m orchestrator data prepare input='docs/*.jsonl' output=data/docs",
        ) from error
    except ValueError as error:
        raise _damaged(file, f"not JSON ({error})", "the index as it was written") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"this is not a token store: {folder}", got=f"{file} without format={FORMAT}")
    if content.get("version") != FORMAT_VERSION:
        raise DataError(
            f"the store was written in another version of the format: {folder}",
            got=content.get("version"),
            allowed=str(FORMAT_VERSION),
            fix="prepare it again with this version of orchestrator",
        )
    try:
        index = _parse_index(content)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}", "the index as it was written") from error
    if store_fingerprint(index.shards, index.splits, index.tokenizer_fingerprint) != index.fingerprint:
        raise _damaged(file, "a fingerprint that is not that of the shards it lists", "the index as it was written")
    return index


def _parse_index(content: dict[str, Any]) -> StoreIndex:
    values = {key: value for key, value in content.items() if key not in ("format", "version")}
    values["shards"] = tuple(ShardInfo(**shard) for shard in values["shards"])
    values["splits"] = {
        name: SplitInfo(**{**values["splits"][name], "shards": tuple(values["splits"][name]["shards"])})
        for name in SPLITS
    }
    index = StoreIndex(**values)
    if index.dtype not in ("<u2", "<u4"):
        raise ValueError(f"dtype {index.dtype}")
    width = np.dtype(index.dtype).itemsize
    for shard in index.shards:
        # The names come from a file that others may have written: they stay inside the directory.
        if Path(shard.file).name != shard.file or Path(shard.offsets_file).name != shard.offsets_file:
            raise ValueError(f"file name {shard.file}")
        if shard.bytes != shard.tokens * width or shard.documents < 1:
            raise ValueError(f"{shard.tokens} tokens in {shard.bytes} bytes of {shard.file}")
    for name, split in index.splits.items():
        if split.tokens != sum(index.shards[i].tokens for i in split.shards):
            raise ValueError(f"{split.tokens} tokens in the split {name}")
    return index


def _check_file(file: Path, size: int, sha256: str | None) -> None:
    if not file.is_file():
        raise _damaged(file, "no such file", f"{size} bytes")
    if file.stat().st_size != size:
        raise _damaged(file, f"{file.stat().st_size} bytes", f"{size} bytes")
    if sha256 is not None and (found := hash_file(file)) != sha256:
        raise _damaged(file, f"sha256 {found[:12]}", f"sha256 {sha256[:12]}")


def _damaged(file: Path, got: str, wanted: str) -> DataError:
    return DataError(
        f"the token store is damaged: {file}",
        got=got,
        allowed=wanted,
        fix="copy the store again from where it is whole, or move it away and prepare it again",
    )
