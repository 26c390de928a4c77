"""Tokenizers: one wrapper over Hugging Face `tokenizers`, whatever the vocabulary came from.

A tokenizer is a `tokenizer.json` and the files beside it that say which tokens begin and end a text. These are formats
of Hugging Face, so a tokenizer from there is used as it is and one from here is read there.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config.schema import TokenizerConfig
from orchestrator.data.document_format import DocumentFormat, from_record
from orchestrator.data.model_files import (
    MERGES_FILE,
    SOURCE_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    VOCAB_FILE,
    collect,
    limit_of,
)
from orchestrator.data.plain_files import read_regular
from orchestrator.data.tokenizer_backend import encode_all, encodings, load_backend
from orchestrator.data.tokenizer_files import (
    ALLOWED,
    Beside,
    complete,
    from_vocab_and_merges,
    guessed_eos,
    parse_json,
    refuse_foreign,
    set_spaces_of_class,
    template_prefix,
    without_special_tokens,
)
from orchestrator.data.vocabulary import EOS, byte_json, train_bpe_json
from orchestrator.errors import ConfigError, DataError

_CONTEXT = 64  # tokens before a continuation whose text may change the beginning of its own


class Tokenizer:
    """A vocabulary, and the document format in its tokens.

    Args:
        text: the content of a `tokenizer.json`.
        eos_token: the token that ends a text.
        documents: what documents and prompts are in tokens.
        files: what travels with the model, this `tokenizer.json` among them; None: it was made here.

    Attributes:
        vocab_size: one more than the largest token id, so that it sizes an embedding.
        eos_id: id of the end-of-text token.
        files: what `save` writes, by name.
        notes: what of the files was not taken as it stands, in sentences.
        model_type: of the `config.json` that came with them; None where that is not known.

    Raises:
        DataError: the content is no tokenizer, or does not have `eos_token`.
    """

    def __init__(
        self,
        text: str,
        eos_token: str = EOS,
        documents: DocumentFormat = DocumentFormat(),
        files: Mapping[str, bytes] | None = None,
    ):
        self._content = parse_json(text, TOKENIZER_FILE)
        if complete(self._content, Beside(files or {})):
            text = json.dumps(self._content, ensure_ascii=False)
        self._backend = load_backend(text)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        for token in self._content.get("added_tokens") or ():
            if vocabulary.get(token["content"]) != token.get("id"):
                raise DataError(
                    "the library reads another id for an added token than its file says",
                    got=f"{token['content'][:100]!r}: {vocabulary.get(token['content'])}, the file {token.get('id')}",
                    allowed="added tokens whose ids follow on those of the vocabulary, without holes",
                )
        self.vocab_size = 1 + max(vocabulary.values(), default=0)
        self.notes: tuple[str, ...] = ()
        self.model_type: str | None = None
        self._set(eos_token, documents)
        self.files = dict(files) if files is not None else self._made_files()

    def _set(self, eos_token: str, documents: DocumentFormat) -> None:
        eos_id = self._backend.token_to_id(eos_token)
        if eos_id is None:
            raise DataError("the tokenizer does not have its end-of-text token", got=eos_token)
        self.eos_token, self.eos_id, self.documents = eos_token, int(eos_id), documents
        # Text that merely spells a special token is text: otherwise a document about tokenizers would fall apart.
        self._backend.encode_special_tokens = documents.special_tokens_in_text == "text"

    def with_documents(self, documents: DocumentFormat, eos_token: str | None = None) -> Tokenizer:
        """Return the same vocabulary with another document format.

        Args:
            documents: what begins and ends a document.
            eos_token: the end-of-text token; None: as it is.
        """
        result = copy.copy(self)
        for cached in ("fingerprint", "_with_specials"):
            result.__dict__.pop(cached, None)
        # The library does not read back all that it has read once, so a copy is loaded like a file.
        result._backend = load_backend(self._backend.to_str())
        result._set(eos_token or self.eos_token, documents)
        return result

    def with_files(self, files: Mapping[str, bytes]) -> Tokenizer:
        """Return the same vocabulary with other files that travel with the model.

        Args:
            files: content by name.
        """
        result = copy.copy(self)
        result.files = dict(files)
        return result

    def decided(self, config: TokenizerConfig) -> Tokenizer:
        """Return it with the documents that a configuration asks for; `auto` is what the tokenizer's files say.

        Args:
            config: what the user asks for.

        Raises:
            ConfigError: it has no such token, or nothing would separate documents.
        """
        eos_token = config.eos_token or self.eos_token
        self._need(eos_token, "data.tokenizer.eos_token")
        documents = DocumentFormat(self._bos_ids(config), config.eos is not False, config.special_tokens_in_text)
        return self.with_documents(documents, eos_token)

    def _bos_ids(self, config: TokenizerConfig) -> tuple[int, ...]:
        """Return the tokens in front of a text: the named one, those of the template, or the BOS token of the files."""
        beside = Beside(self.files)
        if config.bos is False:
            return ()
        if config.bos_token is not None:
            return (self._need(config.bos_token, "data.tokenizer.bos_token"),)
        template, named = template_prefix(self._content), beside.token("bos_token")
        if template:
            if max(template) >= self.vocab_size:
                raise DataError("the template of the tokenizer puts a token that it does not have", got=max(template))
            return template
        if config.bos is True or beside.config.get("add_bos_token") is True:
            if named is not None:
                return (self._need(named, "bos_token"),)
            if config.bos is True:
                raise ConfigError(
                    "the tokenizer names no BOS token to put in front of documents",
                    got="data.tokenizer.bos=true",
                    fix="name one of its tokens: data.tokenizer.bos_token=..., or leave out data.tokenizer.bos",
                )
        return ()

    def _need(self, token: str, key: str) -> int:
        number = self._backend.token_to_id(token)
        if number is None:
            raise ConfigError("the tokenizer does not have this token", got=f"{key}={token}", allowed="one of its own")
        return int(number)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the content, independent of the layout of the JSON and of the library's version."""
        canonical = json.dumps(self._content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(f"{self.eos_token}\n{canonical}".encode("utf-8", "surrogatepass")).hexdigest()

    def agrees_with(self, other: Tokenizer) -> bool:
        """Return whether both turn any text into the same tokens; document formats may differ.

        Args:
            other: the tokenizer to compare with.
        """
        keys = ("model", "added_tokens", "normalizer", "pre_tokenizer")
        return all(self._content.get(key) == other._content.get(key) for key in keys)

    @cached_property
    def is_bytes(self) -> bool:
        """Whether a token is a byte, which needs no library to encode."""
        return self.fingerprint == _byte_fingerprint()

    @property
    def is_nameless(self) -> bool:
        """Whether ids stand for no text: the tokens were made elsewhere, by an unknown tokenizer."""
        return self.eos_token == f"<id {self.eos_id}>"

    @property
    def bos_token(self) -> str | None:
        """The first of the tokens in front of a text, if any are put there."""
        return self.token_of(self.documents.bos_ids[0]) if self.documents.bos_ids else None

    def token_of(self, number: int) -> str:
        """Return the text of a token, special or not, as the vocabulary writes it.

        Args:
            number: its id.
        """
        return str(self._backend.id_to_token(number))

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its text; None where there is none.

        Args:
            token: its text, as the vocabulary writes it.
        """
        number = self._backend.token_to_id(token)
        return None if number is None else int(number)

    def record(self) -> dict[str, Any]:
        """Return what documents are in tokens, as a store or a checkpoint keeps it."""
        return {"eos_id": self.eos_id, **self.documents.record()}

    def describe_documents(self) -> str:
        """Describe in a line what documents are in tokens."""
        first = [f"{self.token_of(number)} ({number})" for number in self.documents.bos_ids]
        last = [f"{self.eos_token} ({self.eos_id})"] if self.documents.eos else []
        spelt = {"text": "are plain text", "token": "become these tokens", "error": "are an error"}
        end = f"special tokens spelled in it {spelt[self.documents.special_tokens_in_text]}"
        return f"{' '.join([*first, 'text', *last])}; {end}"

    def split(self, text: str) -> list[str]:
        """Divide a text into documents: where special tokens in text are tokens, the end-of-text token separates.

        Args:
            text: the text.
        """
        if self.documents.special_tokens_in_text != "token" or not self.documents.eos or self.eos_token not in text:
            return [text]
        return [part for part in text.split(self.eos_token) if part]

    def encode(self, text: str) -> list[int]:
        """Encode a text alone, with nothing in front of it and nothing behind. Returns token ids.

        Args:
            text: the text.
        """
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def prompt_ids(self, text: str) -> list[int]:
        """Encode a text that a model is to continue, begun as a document. Returns at least one token id.

        Args:
            text: the text.
        """
        ids, first = self.encode(text), list(self.documents.bos_ids)
        return (ids if ids[: len(first)] == first else first + ids) or [self.eos_id]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts, each into int64 of shape [tokens]. Other threads run meanwhile.

        Args:
            texts: the texts.

        Raises:
            DataError: the vocabulary has ids alone, or no token for a text, or a text spells a special token and must
                not.
        """
        if self.is_nameless:
            raise DataError(
                "no text has ids here: the model was trained on tokens whose tokenizer was not named",
                got="data.tokenizer.kind=none",
                allowed="a tokenizer",
                fix="train with the tokenizer that made the tokens: data.tokenizer.path=...",
            )
        mode = self.documents.special_tokens_in_text
        if self.is_bytes and (mode == "text" or not any(self.eos_token in text for text in texts)):
            return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) for text in texts]
        # Lone surrogates (possible in JSON) have no UTF-8 form.
        clean = [text if text.isascii() else text.encode("utf-8", "replace").decode() for text in texts]
        result = encode_all(self._backend, clean)
        if mode == "token":
            return result
        unknown, special = self._special
        for place, (text, ids) in enumerate(zip(clean, result, strict=True)):
            if special[ids].any() or (unknown and unknown in text):
                if mode == "error":
                    raise self._spelt(text, ids[special[ids]])
                result[place] = self._plain_ids(text)
        return result

    def encode_rendered(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode a text whose special tokens are meant, as a chat template writes it.

        Args:
            text: the text.

        Returns:
            Token ids, and where in the text each begins and ends, int64 of shape [tokens].
        """
        clean = text if text.isascii() else text.encode("utf-8", "replace").decode()
        encoding = encodings(self._with_specials, [clean])[0]
        spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(encoding.ids, dtype=np.int64), spans[:, 0], spans[:, 1]

    @cached_property
    def _with_specials(self) -> Any:
        content = json.loads(self._backend.to_str())
        set_spaces_of_class(content, Beside(self.files), self.model_type)
        backend = load_backend(json.dumps(content))
        backend.encode_special_tokens = False
        return backend

    def encode_within(self, text: str) -> list[int]:
        """Encode a text that stands within another one, special tokens that it spells as plain text.

        Args:
            text: the text.
        """
        # Behind a line end, as some vocabularies put a space in front of what begins a text.
        end, whole = self._plain_ids("\n").tolist(), self._plain_ids(f"\n{text}").tolist()
        return list(whole[len(end) :] if whole[: len(end)] == end else self._plain_ids(text).tolist())

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts of the special tokens."""
        added = self._content.get("added_tokens") or ()
        return tuple(str(token["content"]) for token in added if token.get("special"))

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of the special tokens."""
        added = self._content.get("added_tokens") or ()
        return tuple(int(token["id"]) for token in added if token.get("special"))

    @cached_property
    def _special(self) -> tuple[str | None, np.ndarray]:
        """The token for what is unknown, which also stands for text, and which other ids are special, bool [V]."""
        model, mask = self._content["model"], np.zeros(self.vocab_size, dtype=bool)
        for token in self._content.get("added_tokens") or ():
            mask[token["id"]] = bool(token.get("special"))
        unknown = model.get("unk_token")
        if isinstance(number := model.get("unk_id"), int) and number < self.vocab_size:
            unknown = self._backend.id_to_token(number)
        if not isinstance(unknown, str) or (number := self._backend.token_to_id(unknown)) is None or not mask[number]:
            return None, mask
        mask[number] = False
        return unknown, mask

    def _plain_ids(self, text: str) -> np.ndarray:
        """Encode a text whose special tokens the model itself would take for pieces, without those pieces."""
        ids = encode_all(self._plain, [text])[0] if self._plain else None
        if ids is None or self._special[1][ids].any():
            raise DataError(
                "this tokenizer makes special tokens of text that spells them, and cannot be kept from it",
                got=text[:100],
                fix="set data.tokenizer.special_tokens_in_text=token, or take them out of the text",
            )
        return ids

    @cached_property
    def _plain(self) -> Any:
        try:
            backend = load_backend(without_special_tokens(self._content))
        except DataError:
            return None
        backend.encode_special_tokens = True
        return backend

    def _spelt(self, text: str, ids: np.ndarray) -> DataError:
        names = [self.token_of(int(number)) for number in ids[:1]] or [str(self._special[0])]
        at = max(0, text.find(names[0]))
        return DataError(
            "a text spells a special token",
            got=f"{names[0]} in {text[max(0, at - 30) : at + 50]!r}",
            allowed="text without special tokens, as data.tokenizer.special_tokens_in_text=error asks for",
            fix="set it to token (the text means the token) or to text (it only spells it)",
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode tokens, special ones written out; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
        """
        known = [int(token) for token in ids if 0 <= int(token) < self.vocab_size]
        return str(self._backend.decode(known, skip_special_tokens=False))

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that `ids` add to that of `before`, with the space between them, which some decoders cut."""
        context = list(before[-_CONTEXT:])
        start, whole = self.decode(context), self.decode([*context, *ids])
        same = next((at for at, pair in enumerate(zip(start, whole, strict=False)) if pair[0] != pair[1]), len(start))
        return whole[min(same, len(whole)) :]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `tokenizer.json` and what belongs to it into the directory `path`; returns the former."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder / TOKENIZER_FILE

    def _made_files(self) -> dict[str, bytes]:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token}
        text = json.dumps(self._content, ensure_ascii=False, indent=1) + "\n"
        return {
            TOKENIZER_CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
            TOKENIZER_FILE: text.encode("utf-8", "surrogatepass"),
        }


def load_tokenizer(
    path: str | os.PathLike[str], config: TokenizerConfig | None = None, record: Mapping[str, Any] | None = None
) -> Tokenizer:
    """Read a `tokenizer.json`, or the directory that holds one, with the files beside it.

    The end-of-text token is the `eos_token` that the files beside it name, else the first of the names that are common
    for it.

    Args:
        path: the file, or its directory.
        config: what documents are to be; None: plain ones, a text and the end-of-text token.
        record: or what they were, as a store or a checkpoint has kept it.

    Raises:
        ConfigError: `config` asks for tokens that it does not have.
        DataError: nothing there, not a tokenizer, or no end-of-text token to be found.
    """
    place = Path(path).expanduser()
    try:
        files, model_type = _read_files(place)
    except OSError as error:
        refuse_foreign(place)
        raise DataError("the tokenizer cannot be read", got=f"{place} ({error.strerror})", allowed=ALLOWED) from error
    notes: tuple[str, ...] = ()
    if TOKENIZER_FILE not in files:
        if VOCAB_FILE not in files or MERGES_FILE not in files:
            refuse_foreign(place)
            raise DataError("the tokenizer cannot be read", got=f"no {TOKENIZER_FILE} in {place}", allowed=ALLOWED)
        files[TOKENIZER_FILE] = from_vocab_and_merges(files, model_type, place).encode("utf-8", "surrogatepass")
        notes = (f"{place}: {TOKENIZER_FILE} was made of {VOCAB_FILE} and {MERGES_FILE}",)
    try:
        tokenizer = from_files(files, config, record)
    except DataError as error:
        if place.is_file():
            refuse_foreign(place)
        raise DataError(f"{error.what}: {place}", got=error.got, allowed=error.allowed, fix=error.fix) from error
    tokenizer.notes, tokenizer.model_type = notes, model_type if isinstance(model_type, str) else None
    return tokenizer


def from_files(
    files: Mapping[str, bytes], config: TokenizerConfig | None = None, record: Mapping[str, Any] | None = None
) -> Tokenizer:
    """Make a tokenizer from the content of its files, by name; else as `load_tokenizer`.

    Args:
        files: content by name, `tokenizer.json` among them.
        config: what documents are to be; None: plain ones.
        record: or what they were, as a store or a checkpoint has kept it.
    """
    try:
        text = files[TOKENIZER_FILE].decode("utf-8")
    except UnicodeDecodeError:
        raise DataError("the tokenizer cannot be read", got="not UTF-8 text", allowed=ALLOWED) from None
    content, beside = parse_json(text, TOKENIZER_FILE), Beside(files)
    eos = record.get("eos_id") if record is not None else None
    named = (config.eos_token if config else None) or beside.token("eos_token")
    if isinstance(eos, int) or (named is None and (eos := beside.eos_id) is not None):
        named = _token_of(content, beside, eos) or named
    tokenizer = Tokenizer(text, named or guessed_eos(content), files=files)
    if record is not None:
        return tokenizer.with_documents(from_record(record, tokenizer.vocab_size))
    return tokenizer.decided(config) if config else tokenizer


def _read_files(place: Path) -> tuple[dict[str, bytes], object]:
    """Read the files of a tokenizer by name, and the type of the model beside it, if a config.json says so."""
    folder = place if place.is_dir() else place.parent
    files = collect(folder) if place.is_dir() or place.name == TOKENIZER_FILE else {}
    if not place.is_dir():
        if place.name != TOKENIZER_FILE and (folder / TOKENIZER_CONFIG_FILE).exists():
            name = TOKENIZER_CONFIG_FILE
            files[name] = read_regular(folder / name, limit_of(name) or 0)
        files[TOKENIZER_FILE] = read_regular(place, limit_of(TOKENIZER_FILE) or 0)
    # Of a checkpoint the one that its model was imported with.
    config = next((folder / name for name in (SOURCE_CONFIG_FILE, "config.json") if (folder / name).is_file()), None)
    if config is None:
        return files, None
    try:
        return files, parse_json(read_regular(config, limit_of(TOKENIZER_CONFIG_FILE) or 0), config).get("model_type")
    except DataError:
        if TOKENIZER_FILE not in files:
            raise
        return files, None


def _token_of(content: Mapping[str, Any], beside: Beside, number: object) -> str | None:
    """Return the text of the token of an id, of the vocabulary or added to it."""
    for token in content.get("added_tokens") or ():
        if isinstance(token, dict) and token.get("id") == number:
            return str(token.get("content"))
    for listed, token in beside.added_tokens():
        if listed == number:
            return str(token["content"])
    vocab = (content.get("model") or {}).get("vocab") if isinstance(content.get("model"), dict) else None
    if isinstance(vocab, list) and isinstance(number, int) and 0 <= number < len(vocab):
        return str(vocab[number][0])
    if isinstance(vocab, dict):
        return next((piece for piece, place in vocab.items() if place == number), None)
    return None


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE vocabulary; the same texts give the same vocabulary. As `vocabulary.train_bpe_json`.

    Args:
        texts: the texts.
        vocab_size: tokens of the vocabulary.
    """
    return Tokenizer(train_bpe_json(texts, vocab_size))


def byte_tokenizer() -> Tokenizer:
    """256 tokens that are the bytes of UTF-8, id equal to value, and the end-of-text token 256."""
    return Tokenizer(byte_json())


@functools.cache
def _byte_fingerprint() -> str:
    return byte_tokenizer().fingerprint
