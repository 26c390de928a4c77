"""Text to tokens and back: one wrapper over Hugging Face `tokenizers`, whatever the vocabulary came from.

A tokenizer is a `tokenizer.json` and, beside it, a `tokenizer_config.json` that names the end-of-text token. Both
are the formats of Hugging Face, so a tokenizer from there is used as it is and one from here is read there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.errors import ConfigError, DataError

EOS = "<|endoftext|>"
TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
MIN_BPE_VOCAB = 257  # every byte and the end-of-text token
# What models in the field call the end of a document, most specific first.
_KNOWN_EOS = (EOS, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|eos|>", "<eos>", "</s>", "[EOS]", "<|im_end|>")


class Tokenizer:
    """A vocabulary with an end-of-text token.

    Args:
        text: the content of a `tokenizer.json`.
        eos_token: the token that ends every document.

    Attributes:
        vocab_size: one more than the largest token id, so that it sizes an embedding.
        eos_id: id of the end-of-text token.

    Raises:
        DataError: the content is no tokenizer, or does not have `eos_token`.
    """

    def __init__(self, text: str, eos_token: str = EOS):
        from tokenizers import Tokenizer as Backend

        try:
            self._content = json.loads(text)
            self._backend: Any = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                "this is not a tokenizer that can be read",
                got=str(error)[:200],
                allowed="a Hugging Face tokenizer.json",
            ) from error
        eos_id = self._backend.token_to_id(eos_token)
        if eos_id is None:
            raise DataError("the tokenizer does not have its end-of-text token", got=eos_token)
        # Text that merely spells a special token is text: otherwise a document about tokenizers would fall apart.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_token = eos_token
        self.eos_id = int(eos_id)
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the content, independent of the layout of the JSON and of the library's version."""
        canonical = json.dumps(self._content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(f"{self.eos_token}\n{canonical}".encode()).hexdigest()

    def agrees_with(self, other: Tokenizer) -> bool:
        """Whether both turn any text into the same tokens; they may end documents with different ones."""
        keys = ("model", "added_tokens", "normalizer", "pre_tokenizer")
        return all(self._content.get(key) == other._content.get(key) for key in keys)

    @cached_property
    def is_bytes(self) -> bool:
        """Whether a token is a byte, which needs no library to encode."""
        return self.fingerprint == _byte_fingerprint()

    @property
    def is_nameless(self) -> bool:
        """Whether ids stand for no text: the tokens were made elsewhere, and nobody said by what."""
        return self.eos_token == f"<id {self.eos_id}>"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end-of-text token and without any other special one."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of every text, each int64 of shape [tokens]. Other threads run meanwhile.

        Raises:
            DataError: the vocabulary has ids alone.
        """
        if self.is_nameless:
            raise DataError(
                "no text has ids here: the model was trained on tokens whose tokenizer was not named",
                got="data.tokenizer.kind=none",
                allowed="a tokenizer",
                fix="train with the tokenizer that made the tokens: data.tokenizer.kind=file data.tokenizer.path=...",
            )
        if self.is_bytes:
            return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) for text in texts]
        # Lone surrogates (possible in JSON) have no UTF-8 form.
        clean = [text if text.isascii() else text.encode("utf-8", "replace").decode() for text in texts]
        encodings = self._backend.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the tokens, special ones written out; bytes that are not UTF-8 become U+FFFD."""
        known = [int(token) for token in ids if 0 <= int(token) < self.vocab_size]
        return str(self._backend.decode(known, skip_special_tokens=False))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `tokenizer.json` and `tokenizer_config.json` into the directory `path`; returns the former."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token}
        (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        text = json.dumps(self._content, ensure_ascii=False, indent=1) + "\n"
        (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")
        return folder / TOKENIZER_FILE


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a `tokenizer.json`, or the directory that holds one.

    The end-of-text token is the `eos_token` of a `tokenizer_config.json` beside it, else the first of the names
    that are common for it.

    Raises:
        DataError: nothing there, not a tokenizer, or no end-of-text token to be found.
    """
    file = Path(path).expanduser()
    file = file / TOKENIZER_FILE if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the tokenizer cannot be read",
            got=f"{file} ({getattr(error, 'strerror', None) or 'not UTF-8 text'})",
            allowed="a tokenizer.json of Hugging Face's tokenizers library, or the directory that holds one",
        ) from error
    eos = _named_eos(file.parent / TOKENIZER_CONFIG_FILE) or _guessed_eos(text, file)
    try:
        return Tokenizer(text, eos)
    except DataError as error:
        raise DataError(f"{error.what}: {file}", got=error.got, allowed=error.allowed, fix=error.fix) from error


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE vocabulary; the same texts give the same vocabulary.

    Args:
        vocab_size: wanted number of tokens, the end-of-text token included; short texts may give fewer.

    Raises:
        ConfigError: `vocab_size` does not hold the 256 bytes and the end-of-text token.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_BPE_VOCAB:
        raise ConfigError(
            "the vocabulary of a byte-level BPE holds every byte and the end-of-text token",
            got=f"vocab_size={vocab_size}",
            allowed=f"{MIN_BPE_VOCAB} and more",
            fix="raise it, or use the tokenizer of kind bytes, which has the smallest vocabulary",
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=list(_byte_alphabet()),
        show_progress=False,
    )
    with library_threads(True):
        backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str())


def byte_tokenizer() -> Tokenizer:
    """256 tokens that are the bytes of UTF-8, id equal to value, and the end-of-text token 256."""
    return Tokenizer(_byte_json())


def _byte_json() -> str:
    """Written out, so that the fingerprint does not depend on the library's version."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": EOS, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {character: byte for byte, character in enumerate(_byte_alphabet())},
            "merges": [],
        },
    }
    return json.dumps(content)


@functools.cache
def _byte_fingerprint() -> str:
    return byte_tokenizer().fingerprint


@contextmanager
def library_threads(enabled: bool) -> Iterator[None]:
    """Whether the library itself uses every core for a call, within the block.

    Afterwards it does not, unless the user has said so: the callers bring their threads, and a later fork of a
    process that left this open would be warned about on standard error.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name, "false")
    os.environ[name] = "true" if enabled else "false"
    try:
        yield
    finally:
        os.environ[name] = before


def _byte_alphabet() -> list[str]:
    """The character that stands for each of the 256 bytes in byte-level vocabularies (the convention of GPT-2).

    Bytes that print stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


def _named_eos(config_file: Path) -> str | None:
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    eos = config.get("eos_token") if isinstance(config, dict) else None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    return eos if isinstance(eos, str) else None


def _guessed_eos(text: str, file: Path) -> str:
    try:
        content = json.loads(text)
        added = [str(token["content"]) for token in content.get("added_tokens") or ()]
        vocab = content["model"]["vocab"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"this is not a tokenizer that can be read: {file}",
            got=f"{type(error).__name__}: {error}",
            allowed="a tokenizer.json of Hugging Face's tokenizers library",
        ) from error
    # Unigram models list [piece, score], the others map pieces to ids.
    pieces = {str(entry[0]) for entry in vocab} if isinstance(vocab, list) else set(vocab)
    for name in _KNOWN_EOS:
        if name in added or name in pieces:
            return name
    raise DataError(
        f"the tokenizer does not say which token ends a document: {file}",
        got=f"special tokens {', '.join(added) or 'none'}",
        allowed=f"one of {', '.join(_KNOWN_EOS)}, or the one that {TOKENIZER_CONFIG_FILE} names",
        fix=f'put a {TOKENIZER_CONFIG_FILE} with {{"eos_token": "<the token>"}} beside it',
    )
