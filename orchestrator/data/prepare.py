"""Prepare the token stores that the data configuration describes.

A source is `builtin`, input files, or a store that exists already. The first two are tokenised into the user's cache,
under a key of everything that their tokens depend on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.config.schema import Auto, ChatConfig, DataConfig, SourceConfig, TokenizerConfig, TokensConfig
from orchestrator.data.agreement import check_as_asked, check_made, check_same_documents
from orchestrator.data.chat_template import TEMPLATE_FILE
from orchestrator.data.conversation_encoder import ConversationEncoder
from orchestrator.data.documents import Corpus, describe_left_out, find_corpus, spec_of
from orchestrator.data.formats.find import BUILTIN
from orchestrator.data.formats.reading import Input
from orchestrator.data.formats.rows import TextSpec
from orchestrator.data.holdout import nothing_left
from orchestrator.data.make_tokenizer import (
    BPE_SAMPLE_CHARACTERS,
    FINGERPRINT_FILE,
    load_made,
    make_tokenizer,
    of_corpus,
)
from orchestrator.data.own_documents import OwnDocuments, own_documents
from orchestrator.data.store import TokenStore, is_store
from orchestrator.data.store_cache import cache_root, cached, content_digest, key_of, note
from orchestrator.data.store_index import CONVERSATIONS_VERSION, DOCUMENTS_VERSION
from orchestrator.data.tokenize import Tokenizer
from orchestrator.data.write import write_store
from orchestrator.errors import ConfigError, DataError

WHOLE_CHECK_BYTES = 1 << 30  # of tokens: up to here the launcher reads a store whole, which takes seconds
_BPE_VERSION = 2  # of how a vocabulary is made and kept
_MAX_AUTO_WORKERS = 32


@dataclass(frozen=True)
class PreparedData:
    """The prepared data of a run: stores, weights and tokenizer.

    Attributes:
        stores: with one tokenizer.
        weights: of each store in the mixture; they sum to 1.
        tokenizer: of all stores.
        validation: stores to evaluate on in place of what the others hold out, by name; one without a name by "".
        names: what the user calls each store.
    """

    stores: tuple[TokenStore, ...]
    weights: tuple[float, ...]
    tokenizer: Tokenizer
    validation: Mapping[str, TokenStore] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def given_files(self) -> dict[str, bytes]:
        """The chat template with which conversations were made, where it is another one than the model's own."""
        stores = [store for store in self.stores if store.index.conversations.get("template_given")]
        return {TEMPLATE_FILE: stores[0].tokenizer.files[TEMPLATE_FILE]} if stores else {}

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def unigram_entropy_nats(self) -> float:
        """The loss of a model that knows only how often each token occurs, weighted like the mixture."""
        pairs = zip(self.stores, self.weights, strict=True)
        return sum(weight * store.unigram_entropy_nats for store, weight in pairs)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the stores and the weights: equal fingerprints mean equal data."""
        facts = [[store.fingerprint for store in self.stores], list(self.weights)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """JSON-able facts for reports."""
        pairs = zip(self.stores, self.weights, strict=True)
        held = {name: store.describe() for name, store in self.validation.items()}
        return {
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "unigram_entropy_nats": self.unigram_entropy_nats,
            "stores": [{"weight": weight, **store.describe()} for store, weight in pairs],
            "validation": held.get("", held) if held else None,
        }


@dataclass(frozen=True)
class _Source:
    """A source of the mixture: either a store, or files, their sizes and times, and the digest of their content."""

    config: SourceConfig
    store: TokenStore | None = None
    corpus: Corpus | None = None
    stamps: tuple[tuple[int, int], ...] = ()
    digest: str = ""


def prepare(config: DataConfig, *, progress: bool = True, verify: bool = True) -> PreparedData:
    """Make the sources of `config` ready. The second call with the same inputs finds everything in the cache.

    Several processes may call this together: one builds, the others wait.

    Args:
        config: the `data` group of a run.
        progress: show bars and messages on standard error.
        verify: read stores of up to `WHOLE_CHECK_BYTES` whole; of others a block is checked when it is first read.
            What is damaged in the cache is prepared again.

    Raises:
        ConfigError: a setting is out of range.
        DataError: an input is missing, unreadable, damaged, or has another tokenizer than the others.
    """
    _check_fraction(config.validation_fraction)
    _check_weights(config.sources)
    root = cache_root(config.cache_dir)
    if config.validation is not None:
        config = replace(config, validation_fraction=0.0)
    maker = _Maker(config, root, progress, verify)
    sources = [maker.resolve(source) for source in config.sources if source.weight > 0]
    tokenizer = _shared_tokenizer(sources, config, root, progress)
    note(f"documents: {tokenizer.describe_documents()}", progress)
    stores = tuple(maker.store(source, tokenizer) for source in sources)
    given = {"": config.validation} if isinstance(config.validation, str) else config.validation or {}
    validation = {name: _validation_store(path, maker, tokenizer) for name, path in given.items()}
    for source, store in zip(sources, stores, strict=True):
        for line in describe_left_out(store.index.source.get("left_out") or {}):
            note(f"left out of {source.config.path}: {line}", progress)
        for line in store.index.source.get("tokens") or ():
            note(f"tokens of {source.config.path}: {line}", progress)
    total = sum(source.config.weight for source in sources)
    weights = tuple(source.config.weight / total for source in sources)
    names = tuple(source.config.name or source.config.path for source in sources)
    return PreparedData(stores, weights, tokenizer, validation, names)


def build_store(
    inputs: Sequence[str],
    output: str | os.PathLike[str],
    tokenizer_config: TokenizerConfig,
    spec: TextSpec | None = None,
    validation_fraction: float = 0.02,
    workers: int | Auto = "auto",
    progress: bool = True,
    tokens: TokensConfig | None = None,
    own: OwnDocuments | None = None,
    chat: ChatConfig = ChatConfig(),
) -> TokenStore:
    """Tokenize inputs into a permanent store in the directory `output`, which may not hold anything yet.

    Args:
        inputs: paths, globs, folders or `builtin`.
        output: a new or empty directory.
        tokenizer_config: the tokenizer, and what documents are to be.
        spec: the fields of a document; None: the defaults.
        validation_fraction: of the tokens, held out.
        workers: threads that tokenize; `auto`: as many as cores.
        progress: show bars and messages on standard error.
        tokens: how inputs are to be read as tokens; None: as text.
        own: code of the user's own that reads or changes documents.
        chat: how conversations become tokens.

    Raises:
        ConfigError: a setting is out of range.
        DataError: an input is missing or unreadable, or `output` is in use.
    """
    _check_fraction(validation_fraction)
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "is a token store already" if is_store(target) else "exists and is not an empty directory"
        raise DataError(
            f"the output {what}; nothing is overwritten",
            got=target,
            allowed="a path that does not exist yet",
            fix="choose another output, or move this one away",
        )
    tokens = tokens or TokensConfig()
    corpus = find_corpus(inputs, spec or TextSpec(), tokens, own)
    tokenizer = make_tokenizer(tokenizer_config, tokens, [corpus], progress).decided(tokenizer_config)
    tokenizer = of_corpus(tokenizer, tokenizer_config, corpus)
    note(f"documents: {tokenizer.describe_documents()}", progress)
    aside = target.with_name(f"{target.name}.building-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        write_store(
            aside,
            corpus,
            tokenizer,
            validation_fraction=validation_fraction,
            workers=_workers(workers),
            source=_provenance(corpus),
            progress=progress,
            tokens=tokens,
            encoder=_encoder(corpus, chat, tokenizer),
        )
        os.rename(aside, target)
    except OSError as error:
        raise DataError("the store cannot be written", got=f"{target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return TokenStore.open(target)


@dataclass(frozen=True)
class _Maker:
    """Opens and makes the stores of a configuration, whose cache lies at `root`."""

    config: DataConfig
    root: Path
    progress: bool
    verify: bool

    def resolve(self, source: SourceConfig) -> _Source:
        """Find out what a source is: a store, or files."""
        if source.path != BUILTIN and is_store(source.path):
            return _Source(source, store=self._open(Path(source.path).expanduser()))
        corpus = find_corpus(
            [source.path], spec_of(self.config, source), self.config.tokens, own_documents(self.config, source)
        )
        digest = content_digest(corpus.inputs, self.root)
        return _Source(source, corpus=corpus, stamps=_stamps(corpus.inputs), digest=digest)

    def store(self, source: _Source, tokenizer: Tokenizer) -> TokenStore:
        """Return the store of a source; from the cache, where it is made from files."""
        if source.store is not None:
            return source.store
        assert source.corpus is not None
        config, corpus = self.config, source.corpus
        tokenizer = of_corpus(tokenizer, config.tokenizer, corpus)
        encoder = _encoder(corpus, config.chat, tokenizer)
        how = encoder.facts if encoder else []
        key = key_of(
            version=CONVERSATIONS_VERSION if encoder else DOCUMENTS_VERSION,
            inputs=source.digest,
            left_out=[[entry.name, entry.reason] for entry in corpus.left_out],
            tokenizer=tokenizer.fingerprint,
            documents=tokenizer.record(),
            text=dataclasses.asdict(config.tokens) if corpus.holds_tokens else [*corpus.facts, *how],
            validation_fraction=config.validation_fraction,
        )

        def build(folder: Path) -> None:
            write_store(
                folder,
                corpus,
                tokenizer,
                validation_fraction=config.validation_fraction,
                workers=_workers(config.workers),
                source=_provenance(corpus),
                progress=self.progress,
                tokens=config.tokens,
                encoder=encoder,
            )
            if _stamps(corpus.inputs) != source.stamps:
                raise DataError(
                    "an input was changed while it was read",
                    got=source.config.path,
                    allowed="files that stay as they are",
                    fix="wait until they are complete, and start again",
                )

        return cached(self.root, "stores", key, self._open, build, self.progress)

    def _open(self, path: Path) -> TokenStore:
        store = TokenStore.open(path)
        if not self.verify:
            return store
        if store.index.bytes <= WHOLE_CHECK_BYTES:
            return TokenStore.open(path, verify=True)
        if store.index.version == 1:
            note(
                f"{path} was written by an earlier version, without checksums of its parts: of its"
                f" {store.index.bytes:,} bytes only the size is checked. To check them all:"
                f" python -m orchestrator data inspect path={path} verify=true",
                self.progress,
            )
        return store


def _validation_store(path: str, maker: _Maker, tokenizer: Tokenizer) -> TokenStore:
    store = maker.store(maker.resolve(SourceConfig(path)), tokenizer)
    if not store.tokenizer.agrees_with(tokenizer):
        raise _mismatch(
            f"data.validation={path} and the sources",
            f"prepare it with theirs, give its text files, or train with its: data.tokenizer.path={path}",
        )
    check_same_documents(store, tokenizer, "the sources", "prepare it again as they are, or give its text files")
    return store


def _shared_tokenizer(sources: Sequence[_Source], config: DataConfig, root: Path, progress: bool) -> Tokenizer:
    """Return the one tokenizer of the mixture: that of the prepared stores in it, else the configured one."""
    stores = [source.store for source in sources if source.store]
    for other in stores[1:]:
        if other.tokenizer.fingerprint != stores[0].tokenizer.fingerprint:
            raise _mismatch(f"{stores[0].path} and {other.path}", "prepare them again with one tokenizer.json")
        check_same_documents(
            other, stores[0].tokenizer, str(stores[0].path), "prepare one of them again as the other is"
        )
    for store in stores:
        check_as_asked(store, config.tokenizer)
    raw, kind = [source for source in sources if not source.store], config.tokenizer.made_from
    if stores and (not raw or kind == "bpe"):
        # A vocabulary trained here could not agree with that of the store.
        return stores[0].tokenizer
    if kind == "bpe":
        return _cached_bpe(raw, config, root, progress)
    tokenizer = make_tokenizer(config.tokenizer, config.tokens, _corpora(raw), progress).decided(config.tokenizer)
    if stores and not tokenizer.agrees_with(stores[0].tokenizer):
        raise _mismatch(
            f"{stores[0].path} and data.tokenizer ({kind})",
            f"use the store's: data.tokenizer.path={stores[0].path}",
        )
    if stores:
        check_same_documents(
            stores[0], tokenizer, "data.tokenizer", "set data.tokenizer.bos, eos, eos_token as the store has"
        )
    return tokenizer


def _mismatch(got: str, fix: str) -> DataError:
    return DataError(
        "the sources of a mixture have different tokenizers", got=got, allowed="one tokenizer for all sources", fix=fix
    )


def _cached_bpe(raw: Sequence[_Source], config: DataConfig, root: Path, progress: bool) -> Tokenizer:
    key = key_of(
        kind="bpe",
        version=_BPE_VERSION,
        vocab_size=config.tokenizer.vocab_size,
        sample=BPE_SAMPLE_CHARACTERS,
        inputs=[[source.digest, source.corpus.facts] for source in raw if source.corpus],
    )
    corpora = _corpora(raw)
    check_made(config.tokenizer, corpora)

    def make(folder: Path) -> None:
        tokenizer = make_tokenizer(config.tokenizer, config.tokens, corpora, progress)
        tokenizer.save(folder)
        (folder / FINGERPRINT_FILE).write_text(tokenizer.fingerprint, encoding="ascii")

    return cached(root, "tokenizers", key, load_made, make, progress).decided(config.tokenizer)


def _encoder(corpus: Corpus, chat: ChatConfig, tokenizer: Tokenizer) -> ConversationEncoder | None:
    """Return what makes tokens of a corpus of conversations; None for documents."""
    if corpus.holds_tokens or not corpus.spec.holds_conversations:
        return None
    return ConversationEncoder(chat, tokenizer, pairs=corpus.spec.messages == "preference")


def _corpora(sources: Sequence[_Source]) -> list[Corpus]:
    return [source.corpus for source in sources if source.corpus]


def _provenance(corpus: Corpus) -> dict[str, Any]:
    source: dict[str, Any] = {
        "inputs": list(corpus.named),
        "files": sum(len(item.files) for item in corpus.inputs),
        "bytes": corpus.size_bytes,
        **corpus.own.names,
    }
    if BUILTIN in corpus.named:
        source["python"] = platform.python_version()
    return source


def _stamps(inputs: Sequence[Input]) -> tuple[tuple[int, int], ...]:
    stats = [file.stat() for item in inputs for file in item.files]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def _workers(workers: int | Auto) -> int:
    if workers == "auto":
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(usable, _MAX_AUTO_WORKERS))
    if workers < 1:
        raise ConfigError(
            "there must be a worker to tokenise", got=f"data.workers={workers}", allowed="auto, or 1 and more"
        )
    return workers


def _check_fraction(fraction: float) -> None:
    if not 0.0 <= fraction < 1.0:
        raise nothing_left(f"data.validation_fraction={fraction}")


def _check_weights(sources: Sequence[SourceConfig]) -> None:
    allowed = "sources with weights of 0 or more, one of them above 0"
    if not any(source.weight > 0 for source in sources):
        raise ConfigError("no source has a weight", got=f"{len(sources)} sources", allowed=allowed)
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight >= 0):
            raise ConfigError(f"the weight of '{source.path}' is no weight", got=source.weight, allowed=allowed)
    if not math.isfinite(total := sum(source.weight for source in sources)):
        raise ConfigError("the weights of the sources have no sum", got=total, allowed="shares such as 0.7 and 0.3")
