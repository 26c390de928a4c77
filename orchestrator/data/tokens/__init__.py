"""Readers of data that other software has tokenized already.

`known_token_formats` lists them: Megatron, nanoGPT, llm.c, OLMo, MDS, LitData, and columns of ids in tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.data.tokens.known_token_formats import TOKEN_FORMATS
    from orchestrator.data.tokens.nameless import nameless_tokenizer
    from orchestrator.data.tokens.token_reader import TokenTally, token_batches, token_spec
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "data.tokens.known_token_formats": ["TOKEN_FORMATS"],
            "data.tokens.nameless": ["nameless_tokenizer"],
            "data.tokens.token_reader": ["TokenTally", "token_batches", "token_spec"],
        },
    )

__all__ = [
    "TOKEN_FORMATS",
    "TokenTally",
    "nameless_tokenizer",
    "token_batches",
    "token_spec",
]
