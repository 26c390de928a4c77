"""Text from a trained model, on one device: sampling from a model, and generating from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.inference.generator import Continuation, Writer, load_decoder
    from orchestrator.inference.sampling import Sampling, generate_tokens
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "inference.generator": ["Continuation", "Writer", "load_decoder"],
            "inference.sampling": ["Sampling", "generate_tokens"],
        },
    )

__all__ = [
    "Continuation",
    "Sampling",
    "Writer",
    "generate_tokens",
    "load_decoder",
]
