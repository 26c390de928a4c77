"""The index of a token store and its validation, before any other file of the store is opened."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonschema_rs
import numpy as np

from orchestrator.data.document_format import DocumentFormat, from_record
from orchestrator.data.plain_files import read_bounded
from orchestrator.errors import DamagedDataError, DataError, shown

FORMAT = "orchestrator-token-store"
FORMAT_VERSION = 3  # 1: no checks of blocks; documents are held out by the hash alone
DOCUMENTS_VERSION, CONVERSATIONS_VERSION = 2, 3  # what is written: conversations have a mask, which version 2 has not
INDEX_FILE = "index.json"
COUNTS, SECOND = 1, 2  # of a mask: the token counts in the loss; the second conversation of a pair begins here
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")
OFFSET_BYTES = 8
CHECK_BYTES = 4
BLOCK_BYTES = 1 << 16  # of a token file: what one checksum covers, about what a disk reads at once anyway
MAX_VOCAB = 1 << 24
_MAX_INDEX_BYTES = 1 << 26


@dataclass(frozen=True)
class ShardInfo:
    """The index entry of one shard.

    Attributes:
        file: of the tokens.
        offsets_file: of the documents' ends.
        tokens: how many, the end-of-text tokens included.
        documents: how many.
        bytes: size of the token file.
        sha256: of the token file.
        offsets_sha256: of the offsets file.
        checks_file: CRC-32 of every block of the token file, and then of the mask; None in stores of version 1.
        checks_sha256: of the checks file.
        mask_file: of conversations, a byte per token: `COUNTS` and `SECOND`. None of documents.
        mask_sha256: of the mask.
    """

    file: str
    offsets_file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    offsets_sha256: str
    checks_file: str | None = None
    checks_sha256: str | None = None
    mask_file: str | None = None
    mask_sha256: str | None = None

    @property
    def blocks(self) -> int:
        """Blocks of the token file, the last one perhaps shorter."""
        return -(-self.bytes // BLOCK_BYTES)

    @property
    def mask_blocks(self) -> int:
        """Blocks of the mask, the last one perhaps shorter."""
        return 0 if self.mask_file is None else -(-self.tokens // BLOCK_BYTES)

    def files(self) -> list[tuple[str, int, str]]:
        """Name, size in bytes and sha256 of each of its files."""
        listed = [
            (self.file, self.bytes, self.sha256),
            (self.offsets_file, self.documents * OFFSET_BYTES, self.offsets_sha256),
        ]
        if self.mask_file is not None and self.mask_sha256 is not None:
            listed.append((self.mask_file, self.tokens, self.mask_sha256))
        if self.checks_file is not None and self.checks_sha256 is not None:
            size = (self.blocks + self.mask_blocks) * CHECK_BYTES
            listed.append((self.checks_file, size, self.checks_sha256))
        return listed


@dataclass(frozen=True)
class SplitInfo:
    """The index entry of one split: its shards in order, and the UTF-8 bytes of its text.

    Attributes:
        shards: numbers of its shards, in order.
        tokens: how many.
        documents: how many.
        text_bytes: of its text as UTF-8.
    """

    shards: tuple[int, ...]
    tokens: int
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class StoreIndex:
    """The content of `index.json`.

    Attributes:
        dtype: of a token in the files.
        vocab_size: tokens of the tokenizer.
        eos_id: id of the end-of-text token.
        shards: the files of tokens.
        splits: `train` and `validation`.
        unigram_entropy_nats: of the training split's tokens; a model that has learnt anything has a lower loss.
        tokenizer_fingerprint: hash of the tokenizer.
        fingerprint: of every token, of the order of the documents and of the tokenizer.
        source: where the documents come from.
        skipped_files: files that a search found and that are not text.
        version: of the format.
        documents: what documents are in tokens, as `DocumentFormat.record` says; of older stores nothing, which is
            the end-of-text token after each.
        conversations: how conversations became tokens, as `ConversationEncoder.record` says, and how many tokens of
            each split count in the loss; empty for documents.
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
    version: int = DOCUMENTS_VERSION
    documents: dict[str, Any] = field(default_factory=dict)
    conversations: dict[str, Any] = field(default_factory=dict)

    @property
    def document_format(self) -> DocumentFormat:
        """What documents are in tokens."""
        return from_record(self.documents, self.vocab_size) if self.documents else DocumentFormat()

    @property
    def bytes(self) -> int:
        """Size of all token files."""
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> str:
        """Serialize to the text of `index.json`."""
        content = dataclasses.asdict(self)
        version = content.pop("version")
        if not self.conversations:  # of documents: what earlier versions of this product read
            content.pop("conversations")
            for shard in content["shards"]:
                del shard["mask_file"], shard["mask_sha256"]
        return json.dumps({"format": FORMAT, "version": version, **content}, indent=2) + "\n"


def read_index(folder: Path) -> StoreIndex:
    """Read and check the index of the store in `folder`.

    Raises:
        DataError: there is none, it is of another version, or it cannot be true; names the file and the entry.
    """
    file = folder / INDEX_FILE
    content = _load(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"this is not a token store: {folder}", got=f"{file} without format={FORMAT}")
    version = content.get("version")
    if version not in range(1, FORMAT_VERSION + 1) or isinstance(version, bool):
        raise DataError(
            f"the store was written in another version of the format: {folder}",
            got=shown(version),
            allowed=", ".join(map(str, range(1, FORMAT_VERSION + 1))),
            fix="prepare it again with this version of orchestrator",
        )
    try:
        problem = next(_schema().iter_errors(content), None)
    except ValueError as error:  # nested deeper than the validator goes
        raise damaged(file, shown(error), "the index as it was written") from error
    if problem is not None:
        where = "/".join(map(str, problem.instance_path)) or "the index"
        raise damaged(file, f"{shown(where)}: {shown(problem.message)}", "the index as it was written")
    index = _parse(content)
    try:
        _check(index)
        _ = index.document_format
    except ValueError as error:
        raise damaged(file, str(error), "the index as it was written") from error
    except DataError as error:
        raise damaged(file, f"documents: {shown(error.got)}", "the index as it was written") from error
    return index


def has_index(folder: Path) -> bool:
    """Whether `folder` holds an index of a token store, whole or not."""
    try:
        content = _parse_json(read_bounded(folder / INDEX_FILE, _MAX_INDEX_BYTES))
    except (DataError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def store_fingerprint(shards: Sequence[ShardInfo], splits: dict[str, SplitInfo], tokenizer_fingerprint: str) -> str:
    """Hash the hashes of the tokens, split by split, and the tokenizer's, by sha256.

    Of conversations also those of the masks and of where each begins, as batches depend on both.

    Args:
        shards: of the store.
        splits: of the store, by name.
        tokenizer_fingerprint: hash of the tokenizer.
    """
    parts = [tokenizer_fingerprint]
    for name in SPLITS:
        ours = [shards[i] for i in splits[name].shards]
        parts += [name, *(shard.sha256 for shard in ours)]
        parts += [text for shard in ours if shard.mask_sha256 for text in (shard.mask_sha256, shard.offsets_sha256)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def damaged(file: Path, got: str, wanted: str) -> DamagedDataError:
    """Make the error for a file of a store that is not what was written.

    Args:
        file: its path.
        got: what was found.
        wanted: what was expected.
    """
    return DamagedDataError(
        f"the token store is damaged: {file}",
        got=got,
        allowed=wanted,
        fix="copy the store again from where it is whole, or move it away and prepare it again",
    )


def _load(file: Path) -> Any:
    try:
        return _parse_json(read_bounded(file, _MAX_INDEX_BYTES, within=file.parent))
    except DataError as error:
        raise DataError(
            f"this is not a token store: {file.parent}",
            got=f"{error.what} ({error.got})",
            allowed="a directory that 'python -m orchestrator data prepare' has completed",
            fix="prepare it: python -m orchestrator data prepare input='docs/*.jsonl' output=data/docs",
        ) from error
    except (ValueError, RecursionError) as error:
        raise damaged(file, f"not JSON ({shown(error)})", "the index as it was written") from error


def _parse_json(content: bytes) -> Any:
    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{text} is no number")

    return json.loads(content, parse_constant=refuse)


@functools.cache
def _schema() -> Any:
    text = resources.files(__package__).joinpath("index.schema.json").read_text()
    return jsonschema_rs.Draft202012Validator(json.loads(text))


def _parse(content: dict[str, Any]) -> StoreIndex:
    values = {key: value for key, value in content.items() if key != "format"}
    values["shards"] = tuple(ShardInfo(**shard) for shard in values["shards"])
    values["splits"] = {
        name: SplitInfo(**{**values["splits"][name], "shards": tuple(values["splits"][name]["shards"])})
        for name in SPLITS
    }
    return StoreIndex(**values)


def _check(index: StoreIndex) -> None:
    """Check what the schema cannot express.

    Raises:
        ValueError: two entries contradict each other.
    """
    _check_shards(index)
    for name, split in index.splits.items():
        for what in ("tokens", "documents"):
            found, listed = sum(getattr(index.shards[i], what) for i in split.shards), getattr(split, what)
            if found != listed:
                raise ValueError(f"splits/{name}: {listed} {what}, where its shards have {found}")
    if not index.eos_id < index.vocab_size:
        raise ValueError(f"eos_id {index.eos_id} in a vocabulary of {index.vocab_size} tokens")
    if index.dtype == "<u2" and index.vocab_size > 1 << 16:
        raise ValueError(f"a vocabulary of {index.vocab_size} tokens in two bytes per token")
    if index.unigram_entropy_nats > math.log(index.vocab_size) + 1e-6:
        raise ValueError(f"unigram_entropy_nats {index.unigram_entropy_nats} of {index.vocab_size} tokens")
    if store_fingerprint(index.shards, index.splits, index.tokenizer_fingerprint) != index.fingerprint:
        raise ValueError("a fingerprint that is not that of the shards it lists")


def _check_shards(index: StoreIndex) -> None:
    used = sorted(number for split in index.splits.values() for number in split.shards)
    if used != list(range(len(index.shards))):
        raise ValueError(f"splits that do not have each of the {len(index.shards)} shards once")
    width, names = np.dtype(index.dtype).itemsize, [name for shard in index.shards for name, _, _ in shard.files()]
    if len(set(names)) != len(names):
        raise ValueError("a file that is listed twice")
    for number, shard in enumerate(index.shards):
        if shard.bytes != shard.tokens * width or shard.documents > shard.tokens:
            raise ValueError(
                f"shards/{number}: {shard.tokens} tokens of {shard.documents} documents in {shard.bytes} bytes"
            )
        checked = (shard.checks_file is not None, shard.checks_sha256 is not None)
        if checked != (index.version > 1,) * 2:
            raise ValueError(f"shards/{number}: checks that are missing, or that version {index.version} does not have")
        masked = (shard.mask_file is not None, shard.mask_sha256 is not None, bool(index.conversations))
        if masked != (index.version == CONVERSATIONS_VERSION,) * 3:
            raise ValueError(f"shards/{number}: a mask that is missing, or that version {index.version} does not have")
