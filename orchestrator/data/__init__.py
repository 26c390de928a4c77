"""From files to batches.

Files are read and tokenized into memory-mapped token stores, and a stream draws batches from them: the batch of a
step is a function of stores, seed and step alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.data.prepare import PreparedData, build_store
    from orchestrator.data.store import TokenStore
    from orchestrator.data.stream import Position, StepLoader, TokenStream
    from orchestrator.data.tokenize import Tokenizer, load_tokenizer
    from orchestrator.data.validation import ValidationData, validation_data
    from orchestrator.data.validation_sets import validation_batches
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "data.prepare": ["PreparedData", "build_store"],
            "data.store": ["TokenStore"],
            "data.stream": ["Position", "StepLoader", "TokenStream"],
            "data.tokenize": ["Tokenizer", "load_tokenizer"],
            "data.validation": ["ValidationData", "validation_data"],
            "data.validation_sets": ["validation_batches"],
        },
    )

__all__ = [
    "Position",
    "PreparedData",
    "StepLoader",
    "TokenStore",
    "TokenStream",
    "Tokenizer",
    "ValidationData",
    "build_store",
    "load_tokenizer",
    "validation_batches",
    "validation_data",
]
