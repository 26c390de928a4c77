"""The loss of a model on texts: nats per token, and bits per byte of the text itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from orchestrator.config.schema import DataConfig, SourceConfig
from orchestrator.data.documents import find_corpus, spec_of
from orchestrator.data.store import TokenStore, is_store
from orchestrator.data.tokenize import Tokenizer
from orchestrator.errors import CheckpointError, DataError
from orchestrator.evaluation.scoring import ScoredText, TextScore

_MOST_TOKENS = 1 << 20  # that are handed on at a time


@dataclass(frozen=True)
class TextLoss:
    """What was measured.

    Attributes:
        loss: nats per token, the mean over all tokens of the texts; what begins and ends a document does not count.
        tokens: that were predicted.
        documents: that they are in.
        bytes: of the texts, in UTF-8; None where the tokens' text is not known.
    """

    loss: float
    tokens: int
    documents: int
    bytes: int | None

    @property
    def perplexity(self) -> float:
        """`exp` of the loss; infinite where that does not fit a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Which does not depend on the tokenizer; None where the bytes are not known."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


@dataclass(frozen=True)
class TokenText:
    """A document.

    Attributes:
        first: tokens in front of it, at least one.
        ids: its tokens.
        bytes: of its text; None where that is not known.
    """

    first: Sequence[int]
    ids: np.ndarray
    bytes: int | None


def read_texts(path: str, tokenizer: Tokenizer, config: DataConfig, split: str | None = None) -> Iterator[TokenText]:
    """Yield the documents of files or of a token store, begun as the documents that the model was trained on.

    Args:
        path: files, a glob, a folder, or a prepared store.
        tokenizer: of the model.
        config: in which field of a row the text is.
        split: of a store; None: what it holds out, or all of it where that is nothing.

    Raises:
        CheckpointError: the store has other tokens than the model.
        DataError: nothing is there, or it is damaged.
    """
    first = tokenizer.documents.bos_ids or (tokenizer.eos_id,)
    if is_store(path):
        yield from _of_store(TokenStore.open(path), tokenizer, first, split)
        return
    if split is not None:
        raise DataError("only a token store has splits", got=f"split={split} of {path}", fix="leave split out")
    spec = spec_of(config, SourceConfig(path))
    if spec.holds_conversations:
        raise _conversations(path)
    corpus = find_corpus([path], spec)
    if corpus.holds_tokens:
        raise DataError(
            "the data is tokens of other software, whose text is not known",
            got=path,
            allowed="text, rows with a field of text, or a token store",
            fix="prepare a store of it: data prepare",
        )
    for document in corpus.documents():
        yield TokenText(
            first, np.asarray(tokenizer.encode(document.text)), len(document.text.encode("utf-8", "replace"))
        )


def _of_store(store: TokenStore, tokenizer: Tokenizer, first: Sequence[int], split: str | None) -> Iterator[TokenText]:
    if not tokenizer.agrees_with(store.tokenizer):
        raise CheckpointError(
            "the store has another tokenizer than the model",
            got=f"{store.vocab_size} tokens in {store.path}, {tokenizer.vocab_size} in the checkpoint",
            fix="name the text itself, or prepare it with the tokenizer of the checkpoint",
        )
    if store.holds_conversations:
        raise DataError(
            "the store holds conversations, of which answers alone count; evaluate measures whole texts",
            got=store.path,
            allowed="text, rows with a field of text, or a store of documents",
            fix="name it in a run, whose val_loss is that of the answers: data.validation=...",
        )
    name = split or ("validation" if store.index.splits["validation"].tokens else "train")
    part, documents = store.split(name), store.documents
    if part.documents and part.document_mask(0) is not None:
        raise _conversations(store.path)
    for number in range(part.documents):
        ids = part.document(number)
        begin = len(documents.bos_ids) if tuple(ids[: len(documents.bos_ids)]) == documents.bos_ids else 0
        ids = ids[begin : len(ids) - 1 if documents.eos and ids[-1] == store.eos_id else len(ids)]
        text = None if tokenizer.is_nameless else len(tokenizer.decode(ids).encode("utf-8", "replace"))
        yield TokenText(first, ids, text)


def _conversations(path: object) -> DataError:
    return DataError(
        "of conversations only the answers count, and texts are scored whole",
        got=path,
        allowed="text, rows with a field of text, or a token store of them",
        fix="a run evaluates conversations: data.validation={NAME: PATH}; data.messages=plain scores them as text",
    )


def windows(text: TokenText, longest: int) -> Iterator[ScoredText]:
    """Yield the parts of a document that a model is to score, so that each token is predicted once.

    The first window begins with what stands in front of the document. Each further one reaches back as far as the model
    sees, as lm-eval's do, and scores what is new in it.

    Args:
        text: the document.
        longest: tokens that the model takes at most.
    """
    whole = np.concatenate([np.asarray(text.first, dtype=np.int64), text.ids])
    begin, done = len(text.first), len(text.first)
    while done < len(whole):
        stop = min(len(whole), (longest + 1) if done == begin else done + longest)
        start = max(0, stop - longest - 1)
        yield ScoredText(whole[start:stop], done - start)
        done = stop


def measure_texts(
    texts: Iterator[TokenText],
    score: Callable[[Sequence[ScoredText]], list[TextScore]],
    longest: int,
    limit: int | None,
) -> TextLoss:
    """Measure the loss of a model on documents.

    Args:
        texts: the documents; those without a token say nothing.
        score: of the model.
        longest: tokens that it takes at most.
        limit: documents to read at most; None: all.

    Raises:
        DataError: there is not one token.
    """
    total, tokens, documents, size = 0.0, 0, 0, 0
    known, waiting, held = True, list[ScoredText](), 0

    def flush() -> float:
        found = math.fsum(one.log_likelihood for one in score(waiting))
        waiting.clear()
        return found

    for text in texts:
        if limit is not None and documents >= limit:
            break
        if not len(text.ids):
            continue
        documents, tokens = documents + 1, tokens + len(text.ids)
        known = known and text.bytes is not None
        size += text.bytes or 0
        waiting += windows(text, longest)
        held += len(text.ids)
        if held >= _MOST_TOKENS:
            total, held = total + flush(), 0
    total += flush()
    if not tokens:
        raise DataError("there is no text to measure the loss on", got="no document with a token")
    return TextLoss(-total / tokens, tokens, documents, size if known else None)
