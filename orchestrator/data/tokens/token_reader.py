"""Shared code of the token readers: documents as arrays of ids, checked against the vocabulary, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from orchestrator.config.schema import TokensConfig
from orchestrator.data.plain_files import regular_size
from orchestrator.errors import ConfigError, DataError

PIECE_TOKENS = 1 << 22  # longer documents are divided, so that memory stays bounded
_BATCH_TOKENS = 1 << 20
_SCAN_TOKENS = 1 << 22


@dataclass(frozen=True)
class TokenSpec:
    """How the ids of a source are to be read.

    Attributes:
        vocab_size: ids are below it.
        eos_id: the token that ends a document.
        dtype: of files that do not say it; None: uint16 where the vocabulary fits, else uint32.
        column: of tables and data sets; None: input_ids, tokens, or the only one that holds lists of ids.
        packed: rows are cut from one sequence without regard to documents, which end at `eos_id` alone.
    """

    vocab_size: int
    eos_id: int
    dtype: str | None = None
    column: str | None = None
    packed: bool = False

    @property
    def raw_dtype(self) -> np.dtype:
        """Little-endian type of ids in a file without a header."""
        return np.dtype(self.dtype or ("uint16" if self.vocab_size <= 1 << 16 else "uint32")).newbyteorder("<")


def token_spec(config: TokensConfig, vocab_size: int, eos_id: int) -> TokenSpec:
    """Return what the configuration says, with the rest from the tokenizer.

    Args:
        config: the `tokens` settings of the source.
        vocab_size: tokens of the tokenizer.
        eos_id: of the tokenizer.

    Raises:
        ConfigError: a value contradicts the tokenizer.
    """
    size = config.vocab_size if config.vocab_size is not None else vocab_size
    eos = config.eos_id if config.eos_id is not None else eos_id
    if not 0 < size <= vocab_size or not 0 <= eos < size:
        raise ConfigError(
            "data.tokens does not fit the tokenizer",
            got=f"vocab_size={size} eos_id={eos}",
            allowed=f"at most the {vocab_size} ids of the tokenizer, and an end-of-text token below it",
            fix="leave them out: null takes the tokenizer's",
        )
    return TokenSpec(size, eos, config.dtype, config.column, config.packed)


@dataclass(frozen=True)
class TokenRow:
    """One document, or one row of a packed data set, as the file has it.

    Attributes:
        ids: integers of shape [tokens].
        where: for messages.
        bytes: of the input that it took.
    """

    ids: np.ndarray
    where: str
    bytes: int


@dataclass
class TokenTally:
    """Counts of how documents were delimited."""

    ended: int = 0  # with the end-of-text token in the data
    given_an_end: int = 0
    inner_ends: int = 0  # documents of the format that have the end-of-text token inside
    empty: int = 0  # without a token: left out
    divided: int = 0
    by: set[str] = field(default_factory=set)
    eos_id: int = 0  # in the data
    stored_eos_id: int = 0

    def lines(self) -> list[str]:
        """Return what a user has to know, as lines."""
        eos_id = self.eos_id
        lines = [f"documents are delimited {' and '.join(sorted(self.by))}"] if self.by else []
        if self.stored_eos_id != eos_id:
            lines.append(
                f"documents end with token {eos_id} in the data, and with the tokenizer's {self.stored_eos_id} here"
            )
        if self.given_an_end:
            lines.append(
                f"{self.given_an_end:,} of {self.given_an_end + self.ended:,} documents had no token {eos_id} at their"
                " end: one was added"
            )
        if self.inner_ends:
            lines.append(
                f"{self.inner_ends:,} documents have token {eos_id} inside, where attention and the loss see an end;"
                " if rows were packed, say data.tokens.packed=true"
            )
        if self.empty:
            lines.append(f"{self.empty:,} documents without a token are left out")
        if self.divided:
            lines.append(f"{self.divided:,} documents of more than {PIECE_TOKENS:,} tokens are divided")
        return lines


@dataclass(frozen=True)
class TokenChunk:
    """Documents back to back without their ends: `tokens`, and per document its length and the hash of its content.

    Attributes:
        lengths: of the documents, in tokens.
        hashes: of the documents' content, uint64.
        consumed: bytes of the input that were read for them.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    consumed: int


def token_batches(
    rows: Iterable[TokenRow], spec: TokenSpec, tally: TokenTally, dtype: np.dtype
) -> Iterator[TokenChunk]:
    """Convert the rows of a reader to batches of documents of `dtype`.

    Args:
        rows: of a reader.
        spec: how ids are to be read.
        tally: counts what was read and left out.
        dtype: of the ids of a batch.

    Raises:
        DataError: an id is not in the vocabulary; names the place.
    """
    documents = _unpacked(rows, spec.eos_id) if spec.packed else _ended(rows, spec.eos_id, tally)
    batch: list[np.ndarray] = []
    tokens = consumed = 0
    for row in documents:
        consumed += row.bytes
        _check_ids(row, spec)
        pieces = [row.ids[low : low + PIECE_TOKENS] for low in range(0, max(1, row.ids.size), PIECE_TOKENS)]
        tally.divided += len(pieces) > 1
        for piece in pieces:
            batch.append(piece.astype(dtype))
            tokens += piece.size
            if tokens >= _BATCH_TOKENS:
                yield _chunk(batch, consumed)
                batch, tokens, consumed = [], 0, 0
    if batch:
        yield _chunk(batch, consumed)


def split_flat(ids: np.ndarray, eos_id: int, where: str) -> Iterator[TokenRow]:
    """Divide one long sequence into documents, each with its end; or with the token in front, if it begins so.

    Args:
        ids: [tokens].
        eos_id: the token between documents.
        where: the place, for messages.
    """
    size = ids.itemsize
    leading = bool(ids.size) and int(ids[0]) == eos_id
    start = 1 if leading else 0
    begun = start
    for low in range(start, ids.size, _SCAN_TOKENS):
        for end in (np.flatnonzero(ids[low : low + _SCAN_TOKENS] == eos_id) + low + 1).tolist():
            yield TokenRow(ids[begun:end], f"{where}, token {begun:,}", (end - begun) * size)
            begun = end
    if begun < ids.size or leading:
        yield TokenRow(ids[begun:], f"{where}, token {begun:,}", (ids.size - begun) * size)


def map_ids(file: Path, dtype: np.dtype, offset: int = 0, count: int | None = None) -> np.ndarray:
    """Map the ids of a file into memory, from byte `offset` on.

    Args:
        file: its path.
        dtype: of an id.
        offset: first byte of the ids.
        count: number of ids; None: to the end of the file.

    Raises:
        DataError: its size does not fit.
    """
    size = regular_size(file) - offset
    if size < 0 or size % dtype.itemsize or (count is not None and size != count * dtype.itemsize):
        wanted = f"{count:,} ids of {dtype.itemsize} bytes" if count is not None else f"ids of {dtype.itemsize} bytes"
        raise DataError(
            f"the file's size is not that of its tokens: {file}",
            got=f"{size:,} bytes after {offset} bytes of header",
            allowed=wanted,
            fix="fetch it again; if it holds ids of another width, say data.tokens.dtype=...",
        )
    return np.memmap(file, dtype, "r", offset) if size else np.zeros(0, dtype)


def integers(values: np.ndarray, where: str) -> np.ndarray:
    """Return the array, if it holds integers in one dimension.

    Args:
        values: as read.
        where: the place, for messages.

    Raises:
        DataError: it does not.
    """
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise DataError(
            f"the data does not hold token ids: {where}",
            got=f"{values.dtype} of shape {list(values.shape)}",
            allowed="whole numbers in one dimension",
        )
    return values


def _check_ids(row: TokenRow, spec: TokenSpec) -> None:
    if not row.ids.size:
        return
    for at in (int(row.ids.argmax()), int(row.ids.argmin())):
        if not 0 <= int(row.ids[at]) < spec.vocab_size:
            raise DataError(
                f"a token id is not in the vocabulary: {row.where}",
                got=f"id {int(row.ids[at])} at {at:,} of it",
                allowed=f"0 to {spec.vocab_size - 1}",
                fix="name the tokenizer that made the tokens, or data.tokens.dtype if the ids have another width",
            )


def _ended(rows: Iterable[TokenRow], eos_id: int, tally: TokenTally) -> Iterator[TokenRow]:
    """Every row is a document; its own end is taken off."""
    for row in rows:
        if not row.ids.size:
            tally.empty += 1
            continue
        ended = int(row.ids[-1]) == eos_id
        ids = row.ids[:-1] if ended else row.ids
        tally.ended += ended
        tally.given_an_end += not ended
        tally.inner_ends += bool((ids == eos_id).any())
        yield TokenRow(ids, row.where, row.bytes)


def _unpacked(rows: Iterable[TokenRow], eos_id: int) -> Iterator[TokenRow]:
    """Rows put together again and cut where the token is."""
    held: list[np.ndarray] = []
    where, size, tokens = "", 0, 0
    for row in rows:
        where, begun = where or row.where, 0
        for end in np.flatnonzero(row.ids == eos_id).tolist():
            yield TokenRow(np.concatenate([*held, row.ids[begun:end]]), where, size)
            held, where, size, tokens, begun = [], row.where, 0, 0, end + 1
        held.append(row.ids[begun:])
        tokens += row.ids.size - begun
        size += row.bytes
        if tokens >= PIECE_TOKENS:
            yield TokenRow(np.concatenate(held), where, size)
            held, size, tokens = [], 0, 0
    if tokens:
        yield TokenRow(np.concatenate(held), where, size)


def _chunk(documents: list[np.ndarray], consumed: int) -> TokenChunk:
    digests = b"".join(hashlib.blake2b(ids.tobytes(), digest_size=8).digest() for ids in documents)
    lengths = np.array([ids.size for ids in documents], dtype=np.int64)
    return TokenChunk(np.concatenate(documents), lengths, np.frombuffer(digests, dtype="<u8"), consumed)
