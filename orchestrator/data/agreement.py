"""Check that prepared stores agree with the configuration and each other on how documents begin and end."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.config.schema import TokenizerConfig
from orchestrator.data.documents import Corpus
from orchestrator.data.formats.known_formats import FORMATS
from orchestrator.data.store import TokenStore
from orchestrator.data.tokenize import Tokenizer
from orchestrator.errors import DataError


def check_same_documents(store: TokenStore, tokenizer: Tokenizer, other: str, fix: str) -> None:
    """Check that a source begins and ends its documents as the other sources of the mixture do.

    Args:
        store: the token store of the source.
        tokenizer: the one that its documents must fit.
        other: what has `tokenizer`, and what to do about it if it differs: `fix`.
        fix: what the user can do where they differ.

    Raises:
        DataError: the store differs from `tokenizer`.
    """
    if store.tokenizer.record() != tokenizer.record():
        raise DataError(
            "the sources of a mixture begin or end their documents differently",
            got=f"{store.path}: {store.tokenizer.describe_documents()}; {other}: {tokenizer.describe_documents()}",
            allowed="documents of one form",
            fix=fix,
        )


def check_as_asked(store: TokenStore, config: TokenizerConfig) -> None:
    """Check that a prepared store is what the configuration asks for by name; `auto` takes it as it is.

    Args:
        store: a token store.
        config: what the user asks for.

    Raises:
        DataError: it is otherwise.
    """
    documents, tokenizer = store.documents, store.tokenizer
    wanted = {
        "bos": (config.bos, bool(documents.bos_ids)),
        "eos": (config.eos, documents.eos),
        "bos_token": (config.bos_token, tokenizer.bos_token),
        "eos_token": (config.eos_token, tokenizer.eos_token),
    }
    for key, (asked, found) in wanted.items():
        if asked not in (None, "auto") and asked != found:
            shown, has = (_word(key, value) for value in (asked, found))
            raise DataError(
                f"the token store was prepared otherwise than asked for: {store.path}",
                got=f"its documents are {tokenizer.describe_documents()}",
                allowed=f"{shown}, from the command line or the model that the run starts from",
                fix=f"prepare it again with that, or train on it as it is: {has}",
            )


def _word(key: str, value: object) -> str:
    """Return a key of the tokenizer as a word of a command line."""
    if isinstance(value, str):
        return f"""'data.tokenizer.{key}="{value}"'"""
    return f"data.tokenizer.{key}={'null' if value is None else str(value).lower()}"


def check_made(config: TokenizerConfig, corpora: Sequence[Corpus]) -> None:
    """Check that tokens come with the tokenizer that made them, or without one by request, and that text has one.

    Args:
        config: what the user asks for.
        corpora: the documents of each source.

    Raises:
        DataError: it is otherwise.
    """
    tokens = [corpus for corpus in corpora if corpus.holds_tokens]
    text = [corpus for corpus in corpora if not corpus.holds_tokens]
    if tokens and config.made_from == "bpe":
        raise DataError(
            f"the input holds tokens, and which tokenizer made them is not known: {', '.join(tokens[0].named)}",
            got=FORMATS[tokens[0].inputs[0].format].title,
            allowed="the tokenizer.json that made them, or none",
            fix="name it: data.tokenizer.kind=file data.tokenizer.path=... (data prepare: tokenizer=...); or say"
            " data.tokenizer.kind=none data.tokens.vocab_size=... data.tokens.eos_id=... (data prepare: tokenizer=none"
            " vocab_size=... eos_id=...)",
        )
    if text and config.made_from == "none":
        raise DataError(
            f"text cannot become tokens without a tokenizer: {', '.join(text[0].named)}",
            got="data.tokenizer.kind=none",
            allowed="bpe, bytes, or the path of a tokenizer.json",
            fix="choose one of them; for a column of ids in a table or data set, set data.tokens.column=...",
        )
