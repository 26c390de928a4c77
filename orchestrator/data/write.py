"""Write documents into a token store: tokenized in parallel, shuffled, divided into splits and shards.

Two passes keep memory bounded. The first tokenises in the order of the input into one spool file; the second gathers
the documents in their final order, one shard at a time.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from orchestrator.atomic_files import write_atomically
from orchestrator.config.schema import TokensConfig
from orchestrator.data.documents import Corpus, Document, Tally
from orchestrator.data.holdout import Extents, hold_out
from orchestrator.data.store import TokenStore, hash_file
from orchestrator.data.store_index import (
    BLOCK_BYTES,
    INDEX_FILE,
    SPLITS,
    ShardInfo,
    SplitInfo,
    StoreIndex,
    store_fingerprint,
)
from orchestrator.data.tokenize import Tokenizer
from orchestrator.data.tokens.known_token_formats import TOKEN_FORMATS
from orchestrator.data.tokens.token_reader import TokenTally, token_batches, token_spec
from orchestrator.data.vocabulary import library_threads
from orchestrator.errors import DataError
from orchestrator.output import is_printed

SHARD_TOKENS = 1 << 26
_CHUNK_CHARACTERS = 1 << 19
_PART_CHARACTERS = 1 << 20  # of a document that are encoded at once
_ORDER_SEED = 0x5EED
_SPOOL_FILE = "spool.tmp"


@dataclass(frozen=True)
class _Chunk:
    """Tokenised documents: `tokens` back to back, and per document its length, content hash and bytes of text."""

    tokens: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    text_bytes: np.ndarray
    consumed: int


def write_store(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    workers: int,
    source: dict[str, Any],
    progress: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    tokens: TokensConfig | None = None,
) -> TokenStore:
    """Tokenise a corpus into a store in `folder`, which exists and is empty. The index is written last.

    Args:
        folder: an empty directory.
        corpus: the documents.
        tokenizer: makes tokens of them.
        validation_fraction: of the tokens, held out by the hash of each document's content; copies stay together.
        workers: threads that tokenise (the library works outside of the interpreter's lock).
        source: where the documents come from, for the index.
        progress: show a bar on standard error.
        shard_tokens: tokens per file, about: documents are not divided.
        tokens: how a corpus of tokens is to be understood.

    Raises:
        DataError: an input cannot be read, or there is no document in any.
        ConfigError: the fraction leaves nothing to train on.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    tally, token_tally = Tally(), TokenTally()
    if corpus.holds_tokens:
        chunks = _token_chunks(corpus, tokens or TokensConfig(), tokenizer, token_tally, dtype)
    else:
        chunks = _encode_all(corpus.documents(tally), tokenizer, dtype, workers)
    extents = _spool(folder / _SPOOL_FILE, chunks, corpus.size_bytes, progress)
    if not extents.lengths.size:
        raise DataError(
            f"the inputs have no {'tokens' if corpus.holds_tokens else 'text'}",
            got=f"{', '.join(corpus.named)}: {len(corpus.inputs)} files",
            allowed="at least one document that is not empty",
        )
    tokenizer.save(folder)
    shards, splits, entropy = _write_splits(folder, extents, tokenizer, dtype, validation_fraction, shard_tokens)
    (folder / _SPOOL_FILE).unlink()
    index = StoreIndex(
        dtype=dtype.str,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        shards=tuple(shards),
        splits=splits,
        unigram_entropy_nats=entropy,
        tokenizer_fingerprint=tokenizer.fingerprint,
        fingerprint=store_fingerprint(shards, splits, tokenizer.fingerprint),
        source={**source, "left_out": corpus.left_out_facts(tally), "tokens": token_tally.lines()},
        skipped_files=len(corpus.left_out),
        documents=tokenizer.documents.record(),
    )
    write_atomically(folder / INDEX_FILE, index.to_json(), durable=True)
    return TokenStore.open(folder)


def entropy_nats(counts: np.ndarray) -> float:
    """Return the entropy, in nats, of the distribution that the counts describe.

    Args:
        counts: [vocab], at least one of them above 0.
    """
    total = int(counts.sum())
    share = counts[counts > 0] / total
    return float(-(share * np.log(share)).sum())


def _spool(path: Path, chunks: Iterable[_Chunk], total: int, progress: bool) -> Extents:
    """Write tokens into one file in the order of the input, which has `total` bytes."""
    lengths: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    text_bytes: list[np.ndarray] = []
    # A log would be filled with carriage returns: there the bar is shown on a terminal only.
    hide = None if progress and is_printed() else True
    bar = tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True, disable=hide)
    with bar, open(path, "wb") as spool:
        for chunk in chunks:
            spool.write(chunk.tokens.tobytes())
            lengths.append(chunk.lengths)
            hashes.append(chunk.hashes)
            text_bytes.append(chunk.text_bytes)
            bar.update(chunk.consumed)
        bar.update(max(0, total - bar.n))
    if not lengths:
        return Extents(*(np.zeros(0, dtype=np.int64) for _ in range(4)))
    joined = np.concatenate(lengths)
    return Extents(np.cumsum(joined) - joined, joined, np.concatenate(hashes), np.concatenate(text_bytes))


def _token_chunks(
    corpus: Corpus, config: TokensConfig, tokenizer: Tokenizer, tally: TokenTally, dtype: np.dtype
) -> Iterator[_Chunk]:
    """Documents that are tokens already."""
    spec = token_spec(config, tokenizer.vocab_size, tokenizer.eos_id)
    tally.eos_id, tally.stored_eos_id = spec.eos_id, tokenizer.eos_id
    for item in corpus.inputs:
        form = TOKEN_FORMATS[item.format]
        tally.by.add("by the end-of-text token" if spec.packed else form.delimited)
        for chunk in token_batches(form.read(item, spec), spec, tally, dtype):
            # How many bytes of text they stand for is not known.
            yield _Chunk(chunk.tokens, chunk.lengths, chunk.hashes, np.zeros_like(chunk.lengths), chunk.consumed)


def _encode_all(documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype, workers: int) -> Iterator[_Chunk]:
    """Tokenise chunks of documents on `workers` threads; the results come in order and only a few are alive."""
    pending: deque[tuple[Future[_Chunk], int]] = deque()
    waiting, most = 0, 4 * workers * _CHUNK_CHARACTERS
    with library_threads(False), ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for chunk in _chunks(documents):
                characters = sum(len(document.text) for document in chunk)
                # A chunk is as long as its last document, so their number alone does not bound memory.
                while pending and (len(pending) > 2 * workers or waiting + characters > most):
                    future, done = pending.popleft()
                    waiting -= done
                    yield future.result()
                pending.append((pool.submit(_encode_chunk, chunk, tokenizer, dtype), characters))
                waiting += characters
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_texts(texts: list[str], tokenizer: Tokenizer, dtype: np.dtype) -> list[np.ndarray]:
    """Tokens of every text. What the tokenizer keeps is many times the text, so a long one is encoded in parts."""
    if len(texts) > 1 and all(len(text) <= _PART_CHARACTERS for text in texts):
        batches = tokenizer.encode_batch(texts)
    else:
        parts = ([tokenizer.encode_batch([part])[0].astype(dtype) for part in _parts(text)] for text in texts)
        batches = [np.concatenate(part) for part in parts]
    # A text that spells the tokens which are put around it has them already.
    first = np.array(tokenizer.documents.bos_ids, dtype=dtype)
    return [_bare(ids.astype(dtype), first, tokenizer.eos_id) for ids in batches]


def _parts(text: str) -> Iterator[str]:
    """Divide a text into parts of at most `_PART_CHARACTERS`, cut after a line end or before a space if possible."""
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        limit = start + _PART_CHARACTERS
        cut = text.rfind("\n", start + 1, limit) + 1 or text.rfind(" ", start + 1, limit)
        cut = cut if cut > start else limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def _encode_chunk(documents: list[Document], tokenizer: Tokenizer, dtype: np.dtype) -> _Chunk:
    texts = [part for document in documents for part in tokenizer.split(document.text)]
    encoded = _encode_texts(texts, tokenizer, dtype)
    raw = [text.encode("utf-8", "replace") for text in texts]
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in raw)
    return _Chunk(
        tokens=np.concatenate([np.zeros(0, dtype=dtype), *encoded]),
        lengths=np.array([ids.size for ids in encoded], dtype=np.int64),
        hashes=np.frombuffer(digests, dtype="<u8"),
        text_bytes=np.array([len(text) for text in raw], dtype=np.int64),
        consumed=sum(document.consumed for document in documents),
    )


def _bare(ids: np.ndarray, first: np.ndarray, eos_id: int) -> np.ndarray:
    """Return the tokens of a text without those that `_gather` puts in front of it and at its end."""
    if first.size and ids.size >= first.size and (ids[: first.size] == first).all():
        ids = ids[first.size :]
    return ids[ids != eos_id]


def _write_splits(
    folder: Path, extents: Extents, tokenizer: Tokenizer, dtype: np.dtype, fraction: float, shard_tokens: int
) -> tuple[list[ShardInfo], dict[str, SplitInfo], float]:
    """Write the spool into shards in their final order (the second pass). Also returns the unigram entropy in nats."""
    spool = np.memmap(folder / _SPOOL_FILE, dtype=dtype, mode="r")
    shards: list[ShardInfo] = []
    splits: dict[str, SplitInfo] = {}
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for name, part in zip(SPLITS, hold_out(extents, fraction), strict=True):
        first = len(shards)
        for shard in _shard_plan(_shuffled(part), shard_tokens, tokenizer.documents.overhead):
            tokens = _gather(spool, shard, tokenizer)
            shards.append(_write_shard(folder, len(shards), tokens, shard.lengths + tokenizer.documents.overhead))
            if name == "train":
                counts += _target_counts(tokens, shard.lengths.size, tokenizer)
        numbers = tuple(range(first, len(shards)))
        total = sum(shards[i].tokens for i in numbers)
        splits[name] = SplitInfo(numbers, total, int(part.lengths.size), int(part.text_bytes.sum()))
    return shards, splits, entropy_nats(counts)


def _shuffled(extents: Extents) -> Extents:
    """Return a fixed pseudo-random order (splitmix64 of the position), the same for every version of NumPy."""
    with np.errstate(over="ignore"):
        key = (np.arange(extents.lengths.size, dtype=np.uint64) + np.uint64(_ORDER_SEED)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return extents.take(np.argsort(key ^ (key >> np.uint64(31)), kind="stable"))


def _target_counts(tokens: np.ndarray, documents: int, tokenizer: Tokenizer) -> np.ndarray:
    """How often each token is a target, [V]: a BOS that follows the end of another document never is."""
    counts = np.bincount(tokens, minlength=tokenizer.vocab_size)
    if tokenizer.documents.eos:
        counts[list(tokenizer.documents.bos_ids[:1])] -= documents
    return counts


def _shard_plan(extents: Extents, shard_tokens: int, overhead: int) -> Iterator[Extents]:
    """Whole documents into shards of about `shard_tokens`; each has `overhead` tokens beside its text."""
    if not extents.lengths.size:
        return
    ends = np.cumsum(extents.lengths + overhead)
    number = (ends - 1) // shard_tokens
    for which in np.split(np.arange(number.size), np.flatnonzero(np.diff(number)) + 1):
        yield extents.take(which)


def _gather(spool: np.ndarray, extents: Extents, tokenizer: Tokenizer) -> np.ndarray:
    """Put the documents back to back, each with what begins and ends it."""
    first = np.array(tokenizer.documents.bos_ids, dtype=spool.dtype)
    last = np.array([tokenizer.eos_id] if tokenizer.documents.eos else [], dtype=spool.dtype)
    parts: list[np.ndarray] = []
    for start, length in zip(extents.starts.tolist(), extents.lengths.tolist(), strict=True):
        parts += [first, spool[start : start + length], last]
    return np.concatenate(parts)


def _write_shard(folder: Path, number: int, tokens: np.ndarray, lengths: np.ndarray) -> ShardInfo:
    """One shard of documents of these many tokens, what begins and ends them included."""
    tokens_file, offsets_file, checks_file = (f"{kind}-{number:05d}.bin" for kind in ("tokens", "offsets", "checks"))
    content = tokens.tobytes()
    checks = [zlib.crc32(content[low : low + BLOCK_BYTES]) for low in range(0, len(content), BLOCK_BYTES)]
    offsets = (np.cumsum(lengths) - lengths).astype("<i8").tobytes()
    for name, data in (
        (tokens_file, content),
        (offsets_file, offsets),
        (checks_file, np.array(checks, dtype="<u4").tobytes()),
    ):
        with open(folder / name, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    return ShardInfo(
        file=tokens_file,
        offsets_file=offsets_file,
        tokens=int(tokens.size),
        documents=int(lengths.size),
        bytes=int(tokens.nbytes),
        sha256=hash_file(folder / tokens_file),
        offsets_sha256=hash_file(folder / offsets_file),
        checks_file=checks_file,
        checks_sha256=hash_file(folder / checks_file),
    )
