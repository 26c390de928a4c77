"""A tokenizer for token ids without a vocabulary: it names every id and encodes no text."""

from __future__ import annotations

import json

from orchestrator.config.schema import TokensConfig
from orchestrator.data.tokenize import Tokenizer
from orchestrator.errors import ConfigError


def nameless_tokenizer(config: TokensConfig) -> Tokenizer:
    """Make a tokenizer of the ids 0 to `config.vocab_size` - 1, of which `config.eos_id` ends a document.

    Args:
        config: of tokens that were made elsewhere.

    Raises:
        ConfigError: one of the two is not given.
    """
    size, eos = config.vocab_size, config.eos_id
    if size is None or eos is None or not 0 <= eos < size:
        raise ConfigError(
            "tokens without a tokenizer need the size of their vocabulary and the token that ends a document",
            got=f"data.tokens.vocab_size={size} data.tokens.eos_id={eos}".replace("None", "null"),
            allowed="whole numbers, the second below the first",
            fix="set both (data prepare: vocab_size=... eos_id=...), or name the tokenizer that made the tokens",
        )
    names = {f"<id {number}>": number for number in range(size)}
    end = {"id": eos, "content": f"<id {eos}>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, **flags}],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": names, "unk_token": f"<id {eos}>"},
    }
    return Tokenizer(json.dumps(content), f"<id {eos}>")
