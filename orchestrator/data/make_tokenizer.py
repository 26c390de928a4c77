"""The tokenizer that a configuration describes: read from a file, of bytes, or trained on a sample of the sources."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.config.schema import TokenizerConfig, TokensConfig
from orchestrator.data.agreement import check_made
from orchestrator.data.document_format import DocumentFormat
from orchestrator.data.documents import Corpus, read_documents
from orchestrator.data.model_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from orchestrator.data.plain_files import read_bounded, regular_size
from orchestrator.data.store_cache import note
from orchestrator.data.tokenize import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from orchestrator.data.tokens.nameless import nameless_tokenizer
from orchestrator.errors import ConfigError, DataError

BPE_SAMPLE_CHARACTERS = 20_000_000
FINGERPRINT_FILE = "fingerprint"
_MIN_FILE_SAMPLE = 1 << 18
_SAMPLE_PART = 1 << 16  # characters that are given to the training at once: it keeps many times what it is given


def load_made(folder: Path) -> Tokenizer:
    """Load a tokenizer of the cache, and check that its vocabulary is the one that was made.

    Args:
        folder: of the cache.

    Raises:
        DataError: it is damaged, or another one.
    """
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        regular_size(folder / name, within=folder)
    tokenizer = load_tokenizer(folder)
    made = read_bounded(folder / FINGERPRINT_FILE, 64, within=folder).decode("ascii", "replace")
    if tokenizer.fingerprint != made:
        raise DataError(
            f"the tokenizer is not the one that was made: {folder}", got=tokenizer.fingerprint, allowed=ascii(made)
        )
    return tokenizer


def of_corpus(tokenizer: Tokenizer, config: TokenizerConfig, corpus: Corpus) -> Tokenizer:
    """Return the tokenizer as a corpus needs it: tokens that were made elsewhere may have their BOS already.

    Args:
        tokenizer: of the mixture.
        config: what the user asks of it.
        corpus: of one source.
    """
    if corpus.holds_tokens and config.bos == "auto" and tokenizer.documents.eos:
        return tokenizer.with_documents(DocumentFormat())
    return tokenizer


def make_tokenizer(
    config: TokenizerConfig, tokens: TokensConfig, corpora: Sequence[Corpus], progress: bool
) -> Tokenizer:
    """Read or train the tokenizer that a configuration describes.

    Args:
        config: the tokenizer.
        tokens: how sources of tokens are read, for `kind=none`.
        corpora: what a vocabulary is trained on.
        progress: say on standard error what takes time.

    Raises:
        ConfigError: the file is not named.
        DataError: the file is no tokenizer.
    """
    check_made(config, corpora)
    if config.made_from == "none":
        return nameless_tokenizer(tokens)
    if config.made_from == "bytes":
        return byte_tokenizer()
    if config.made_from == "file":
        if not config.path:
            raise ConfigError(
                "data.tokenizer.kind=file needs the file",
                got="data.tokenizer.path=null",
                allowed="a tokenizer.json or the directory that holds one",
                fix="add data.tokenizer.path=<file>",
            )
        tokenizer = load_tokenizer(config.path, config)
        for text in tokenizer.notes:
            note(text, progress)
        return tokenizer
    note(f"training a vocabulary of {config.vocab_size} tokens", progress)
    tokenizer = train_bpe(_sample(corpora), config.vocab_size)
    if tokenizer.vocab_size < config.vocab_size:
        note(f"the text gives only {tokenizer.vocab_size} of the {config.vocab_size} tokens", progress)
    return tokenizer


def _sample(corpora: Sequence[Corpus]) -> Iterator[str]:
    """Texts to train a vocabulary on: everything, or of large inputs the beginnings of files in a fixed random order.

    Every corpus has an equal part of the sample.
    """
    for corpus in corpora:
        budget = BPE_SAMPLE_CHARACTERS // len(corpora)
        small = corpus.is_plain and corpus.size_bytes <= budget
        by_hash = lambda item: hashlib.sha256(item.name.encode("utf-8", "surrogateescape")).digest()  # noqa: E731
        ordered = corpus.inputs if small else sorted(corpus.inputs, key=by_hash)
        share = budget if small else max(_MIN_FILE_SAMPLE, budget // max(1, len(ordered)))
        for item in ordered:
            taken = 0
            for document in read_documents(item, corpus.spec, own=corpus.own):
                text = document.text[: min(share - taken, budget)]
                taken += len(text)
                budget -= len(text)
                yield from (text[start : start + _SAMPLE_PART] for start in range(0, len(text), _SAMPLE_PART))
                if taken >= share or budget <= 0:
                    break
            if budget <= 0:
                break
