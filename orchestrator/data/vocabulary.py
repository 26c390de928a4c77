"""Make vocabularies: byte-level BPE trained on texts, or one token per byte."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import ConfigError

EOS = "<|endoftext|>"
MIN_BPE_VOCAB = 257  # every byte and the end-of-text token
MAX_BPE_VOCAB = 1 << 20  # the trainer allocates room for all of it ahead; `config.validate` says so too


def train_bpe_json(texts: Iterator[str], vocab_size: int) -> str:
    """Train a byte-level BPE vocabulary, a `tokenizer.json`; the same texts give the same vocabulary.

    Args:
        texts: what to train on, read once.
        vocab_size: wanted number of tokens, the end-of-text token included; short texts may give fewer.

    Raises:
        ConfigError: `vocab_size` does not hold the 256 bytes and the end-of-text token, or is absurdly large.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if not MIN_BPE_VOCAB <= vocab_size <= MAX_BPE_VOCAB:
        raise ConfigError(
            "the vocabulary of a byte-level BPE holds every byte and the end-of-text token, and has a limit",
            got=f"vocab_size={vocab_size}",
            allowed=f"{MIN_BPE_VOCAB} and more, up to {MAX_BPE_VOCAB:,}",
            fix="change it; the tokenizer of kind bytes has the smallest vocabulary",
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
    return str(backend.to_str())


def byte_json() -> str:
    """One token per byte, a `tokenizer.json`: written out, so that its fingerprint depends on no library's version."""
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


@contextmanager
def library_threads(enabled: bool) -> Iterator[None]:
    """Set whether the library itself uses every core for a call, within the block.

    Afterwards it does not, unless the user has said so: the callers bring their threads, and a later fork of a
    process that left this open would be warned about on standard error.

    Args:
        enabled: whether it does.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name, "false")
    os.environ[name] = "true" if enabled else "false"
    try:
        yield
    finally:
        os.environ[name] = before


def _byte_alphabet() -> list[str]:
    """Return the character that stands for each of the 256 bytes in byte-level vocabularies (as in GPT-2).

    Bytes that print stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]
