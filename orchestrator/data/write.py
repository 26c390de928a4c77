"""Write documents into a token store: tokenized in parallel, shuffled, divided into splits and shards.

Two passes keep memory bounded. The first tokenises in the order of the input into one spool file; the second gathers
the documents in their final order, one shard at a time.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from orchestrator.atomic_files import write_atomically
from orchestrator.config.schema import TokensConfig
from orchestrator.data.conversation_encoder import ConversationEncoder
from orchestrator.data.document_tokens import Chunk, encode_conversations, encode_documents, token_chunks
from orchestrator.data.documents import Corpus, Tally
from orchestrator.data.holdout import Extents, hold_out
from orchestrator.data.store import TokenStore, hash_file
from orchestrator.data.store_index import (
    BLOCK_BYTES,
    CONVERSATIONS_VERSION,
    COUNTS,
    DOCUMENTS_VERSION,
    INDEX_FILE,
    SPLITS,
    ShardInfo,
    SplitInfo,
    StoreIndex,
    store_fingerprint,
)
from orchestrator.data.tokenize import Tokenizer
from orchestrator.data.tokens.token_reader import TokenTally
from orchestrator.errors import DataError
from orchestrator.output import is_printed

SHARD_TOKENS = 1 << 26
_ORDER_SEED = 0x5EED
_SPOOL_FILE = "spool.tmp"


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
    encoder: ConversationEncoder | None = None,
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
        encoder: of a corpus of conversations.

    Raises:
        DataError: an input cannot be read, or there is no document in any.
        ConfigError: the fraction leaves nothing to train on.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    tally, token_tally = Tally(), TokenTally()
    if corpus.holds_tokens:
        chunks = token_chunks(corpus, tokens or TokensConfig(), tokenizer, token_tally, dtype)
    elif encoder is not None:
        tokenizer = encoder.tokenizer
        chunks = encode_conversations(corpus.conversations(tally), encoder, tally, dtype, workers)
    else:
        chunks = encode_documents(corpus.documents(tally), tokenizer, dtype, workers)
    extents = _spool(folder / _SPOOL_FILE, chunks, corpus.size_bytes, progress)
    if not extents.lengths.size:
        raise DataError(
            f"the inputs have no {'tokens' if corpus.holds_tokens else 'answers' if encoder else 'text'}",
            got=f"{', '.join(corpus.named)}: {len(corpus.inputs)} files"
            + (f", {tally.unanswered} conversations of which the loss counts nothing" if encoder else ""),
            allowed="at least one document that is not empty",
        )
    tokenizer.save(folder)
    train, validation = hold_out(extents, validation_fraction, divide=encoder is None)
    spool = _Spool(folder, tokenizer, dtype, shard_tokens, masked=encoder is not None)
    splits: dict[str, SplitInfo] = {
        name: spool.write(part) for name, part in zip(SPLITS, (train, validation), strict=True)
    }
    shards, version = spool.shards, DOCUMENTS_VERSION if encoder is None else CONVERSATIONS_VERSION
    spool.remove()
    index = StoreIndex(
        dtype=dtype.str,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        shards=tuple(shards),
        splits=splits,
        unigram_entropy_nats=entropy_nats(spool.counts),
        tokenizer_fingerprint=tokenizer.fingerprint,
        fingerprint=store_fingerprint(shards, splits, tokenizer.fingerprint),
        source={**source, "left_out": corpus.left_out_facts(tally), "tokens": token_tally.lines()},
        skipped_files=len(corpus.left_out),
        version=version,
        documents=tokenizer.documents.record(),
        conversations={**encoder.record(), "counted": spool.counted} if encoder else {},
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


def _spool(path: Path, chunks: Iterable[Chunk], total: int, progress: bool) -> Extents:
    """Write tokens into one file in the order of the input, which has `total` bytes, and masks beside it."""
    lengths: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    text_bytes: list[np.ndarray] = []
    # A log would be filled with carriage returns: there the bar is shown on a terminal only.
    hide = None if progress and is_printed() else True
    bar = tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True, disable=hide)
    with bar, open(path, "wb") as spool, open(_mask_of(path), "wb") as masks:
        for chunk in chunks:
            spool.write(chunk.tokens.tobytes())
            if chunk.mask is not None:
                masks.write(chunk.mask.tobytes())
            lengths.append(chunk.lengths)
            hashes.append(chunk.hashes)
            text_bytes.append(chunk.text_bytes)
            bar.update(chunk.consumed)
        bar.update(max(0, total - bar.n))
    if not lengths:
        return Extents(*(np.zeros(0, dtype=np.int64) for _ in range(4)))
    joined = np.concatenate(lengths)
    return Extents(np.cumsum(joined) - joined, joined, np.concatenate(hashes), np.concatenate(text_bytes))


def _mask_of(spool: Path) -> Path:
    return spool.with_name(f"mask-{spool.name}")


class _Spool:
    """The documents in the order of the input, of which shards are made in the final order (the second pass).

    Attributes:
        shards: that were written.
        counts: how often each token is a target that counts in training, [V].
        counted: of conversations, tokens of each split that count in the loss.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, dtype: np.dtype, shard_tokens: int, masked: bool):
        self._folder, self._tokenizer, self._shard_tokens = folder, tokenizer, shard_tokens
        self._tokens = np.memmap(folder / _SPOOL_FILE, dtype=dtype, mode="r")
        self._mask = np.memmap(_mask_of(folder / _SPOOL_FILE), dtype=np.uint8, mode="r") if masked else None
        # A chat template begins and ends conversations itself.
        documents = tokenizer.documents
        self._first = np.array([] if masked else documents.bos_ids, dtype=dtype)
        self._last = np.array([tokenizer.eos_id] if documents.eos and not masked else [], dtype=dtype)
        self.shards: list[ShardInfo] = []
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.counted: dict[str, int] = {}

    def write(self, part: Extents) -> SplitInfo:
        """Write the next split."""
        name, first, overhead = SPLITS[len(self.counted)], len(self.shards), self._first.size + self._last.size
        counted = 0
        for shard in _shard_plan(_shuffled(part), self._shard_tokens, overhead):
            tokens, mask = self._gather(shard), self._gather_mask(shard)
            self.shards.append(_write_shard(self._folder, len(self.shards), tokens, shard.lengths + overhead, mask))
            counted += 0 if mask is None else int((mask & COUNTS).sum())
            if name == "train":
                self.counts += self._target_counts(tokens, shard.lengths.size, mask)
        self.counted[name] = counted
        numbers = tuple(range(first, len(self.shards)))
        total = sum(self.shards[i].tokens for i in numbers)
        return SplitInfo(numbers, total, int(part.lengths.size), int(part.text_bytes.sum()))

    def remove(self) -> None:
        """Remove the files of the first pass."""
        for path in (self._folder / _SPOOL_FILE, _mask_of(self._folder / _SPOOL_FILE)):
            path.unlink()

    def _gather(self, extents: Extents) -> np.ndarray:
        """Put the documents back to back, each with what begins and ends it."""
        parts: list[np.ndarray] = []
        for start, length in zip(extents.starts.tolist(), extents.lengths.tolist(), strict=True):
            parts += [self._first, self._tokens[start : start + length], self._last]
        return np.concatenate(parts)

    def _gather_mask(self, extents: Extents) -> np.ndarray | None:
        mask = self._mask
        if mask is None:
            return None
        rows = zip(extents.starts.tolist(), extents.lengths.tolist(), strict=True)
        return np.concatenate([mask[start : start + length] for start, length in rows])

    def _target_counts(self, tokens: np.ndarray, documents: int, mask: np.ndarray | None) -> np.ndarray:
        """How often each token is a target, [V]: a BOS that follows the end of another document never is."""
        counts = np.bincount(tokens if mask is None else tokens[(mask & COUNTS) != 0], minlength=self.counts.size)
        if mask is None and self._last.size:
            counts[self._first[:1]] -= documents
        return counts


def _shuffled(extents: Extents) -> Extents:
    """Return a fixed pseudo-random order (splitmix64 of the position), the same for every version of NumPy."""
    with np.errstate(over="ignore"):
        key = (np.arange(extents.lengths.size, dtype=np.uint64) + np.uint64(_ORDER_SEED)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return extents.take(np.argsort(key ^ (key >> np.uint64(31)), kind="stable"))


def _shard_plan(extents: Extents, shard_tokens: int, overhead: int) -> Iterator[Extents]:
    """Whole documents into shards of about `shard_tokens`; each has `overhead` tokens beside its text."""
    if not extents.lengths.size:
        return
    ends = np.cumsum(extents.lengths + overhead)
    number = (ends - 1) // shard_tokens
    for which in np.split(np.arange(number.size), np.flatnonzero(np.diff(number)) + 1):
        yield extents.take(which)


def _write_shard(
    folder: Path, number: int, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None
) -> ShardInfo:
    """Write one shard of documents of these many tokens, what begins and ends them included."""
    names = {kind: f"{kind}-{number:05d}.bin" for kind in ("tokens", "offsets", "mask", "checks")}
    contents = {"tokens": tokens.tobytes(), "offsets": (np.cumsum(lengths) - lengths).astype("<i8").tobytes()}
    if mask is not None:
        contents["mask"] = mask.tobytes()
    blocks = [contents[kind][low : low + BLOCK_BYTES] for kind in ("tokens", "mask") if kind in contents
              for low in range(0, len(contents[kind]), BLOCK_BYTES)]  # fmt: skip
    contents["checks"] = np.array([zlib.crc32(block) for block in blocks], dtype="<u4").tobytes()
    for kind, content in contents.items():
        with open(folder / names[kind], "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    hashes = {kind: hash_file(folder / names[kind]) for kind in contents}
    return ShardInfo(
        file=names["tokens"],
        offsets_file=names["offsets"],
        tokens=int(tokens.size),
        documents=int(lengths.size),
        bytes=int(tokens.nbytes),
        sha256=hashes["tokens"],
        offsets_sha256=hashes["offsets"],
        checks_file=names["checks"],
        checks_sha256=hashes["checks"],
        mask_file=None if mask is None else names["mask"],
        mask_sha256=hashes.get("mask"),
    )
