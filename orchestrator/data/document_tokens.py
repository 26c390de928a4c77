"""From documents and conversations to tokens, on several threads, in the order of the input."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from orchestrator.config.schema import TokensConfig
from orchestrator.data.conversation import Conversation
from orchestrator.data.conversation_encoder import ConversationEncoder
from orchestrator.data.documents import Corpus, Document, Tally
from orchestrator.data.store_index import COUNTS
from orchestrator.data.tokenize import Tokenizer
from orchestrator.data.tokens.known_token_formats import TOKEN_FORMATS
from orchestrator.data.tokens.token_reader import TokenTally, token_batches, token_spec
from orchestrator.data.vocabulary import library_threads

_CHUNK_CHARACTERS = 1 << 19
_PART_CHARACTERS = 1 << 20  # of a document that are encoded at once
T = TypeVar("T", Document, Conversation)


@dataclass(frozen=True)
class Chunk:
    """Some documents in tokens, each field of one entry per document but for `tokens` and `mask`.

    Attributes:
        tokens: back to back.
        lengths: in tokens.
        hashes: of the content.
        text_bytes: of the text.
        consumed: bytes of the input that they took.
        mask: of conversations, what `EncodedConversation` has.
        left_out: conversations that are not here, as nothing of them counts.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    text_bytes: np.ndarray
    consumed: int
    mask: np.ndarray | None = None
    left_out: int = 0


def token_chunks(
    corpus: Corpus, config: TokensConfig, tokenizer: Tokenizer, tally: TokenTally, dtype: np.dtype
) -> Iterator[Chunk]:
    """Yield documents that are tokens already.

    Args:
        corpus: of tokens.
        config: how they are to be understood.
        tokenizer: whose tokens they are.
        tally: counts how documents were told apart.
        dtype: of a token in the store.
    """
    spec = token_spec(config, tokenizer.vocab_size, tokenizer.eos_id)
    tally.eos_id, tally.stored_eos_id = spec.eos_id, tokenizer.eos_id
    for item in corpus.inputs:
        form = TOKEN_FORMATS[item.format]
        tally.by.add("by the end-of-text token" if spec.packed else form.delimited)
        for chunk in token_batches(form.read(item, spec), spec, tally, dtype):
            # How many bytes of text they stand for is not known.
            yield Chunk(chunk.tokens, chunk.lengths, chunk.hashes, np.zeros_like(chunk.lengths), chunk.consumed)


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype, workers: int
) -> Iterator[Chunk]:
    """Tokenise documents on threads; the results come in order and only a few are alive.

    Args:
        documents: the texts.
        tokenizer: makes tokens of them.
        dtype: of a token in the store.
        workers: threads.
    """
    return _encode_all(documents, lambda chunk: _encode_chunk(chunk, tokenizer, dtype), workers)


def encode_conversations(
    conversations: Iterable[Conversation], encoder: ConversationEncoder, tally: Tally, dtype: np.dtype, workers: int
) -> Iterator[Chunk]:
    """Tokenise conversations on threads, as `encode_documents` does; those of which nothing counts are left out.

    Args:
        conversations: to encode.
        encoder: makes tokens and masks of them.
        tally: counts what is left out.
        dtype: of a token in the store.
        workers: threads.
    """

    def encode(chunk: list[Conversation]) -> Chunk:
        made = [encoder.encode(conversation) for conversation in chunk]
        some = [one for one in made if (one.mask[1:] & COUNTS).any()]
        return Chunk(
            tokens=np.concatenate([np.zeros(0, dtype=dtype), *(one.ids.astype(dtype) for one in some)]),
            lengths=np.array([one.ids.size for one in some], dtype=np.int64),
            hashes=np.array([one.digest for one in some], dtype="<u8"),
            text_bytes=np.array([one.text_bytes for one in some], dtype=np.int64),
            consumed=sum(conversation.consumed for conversation in chunk),
            mask=np.concatenate([np.zeros(0, dtype=np.uint8), *(one.mask for one in some)]),
            left_out=len(made) - len(some),
        )

    for chunk in _encode_all(conversations, encode, workers):
        tally.unanswered += chunk.left_out
        yield chunk


def _encode_all(items: Iterable[T], encode: Callable[[list[T]], Chunk], workers: int) -> Iterator[Chunk]:
    pending: deque[tuple[Future[Chunk], int]] = deque()
    waiting, most = 0, 4 * workers * _CHUNK_CHARACTERS
    with library_threads(False), ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for chunk in _chunks(items):
                characters = sum(document.size for document in chunk)
                # A chunk is as long as its last document, so their number alone does not bound memory.
                while pending and (len(pending) > 2 * workers or waiting + characters > most):
                    future, done = pending.popleft()
                    waiting -= done
                    yield future.result()
                pending.append((pool.submit(encode, chunk), characters))
                waiting += characters
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    chunk: list[T] = []
    size = 0
    for document in items:
        chunk.append(document)
        size += document.size
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


def _encode_chunk(documents: list[Document], tokenizer: Tokenizer, dtype: np.dtype) -> Chunk:
    texts = [part for document in documents for part in tokenizer.split(document.text)]
    encoded = _encode_texts(texts, tokenizer, dtype)
    raw = [text.encode("utf-8", "replace") for text in texts]
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in raw)
    return Chunk(
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
