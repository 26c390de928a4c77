"""Text from a trained model: drawing tokens, many texts at a time on one device or a layout, and from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.inference.decoding import Decoding, TextRequest, generate_tokens
    from orchestrator.inference.generator import Writer, load_decoder
    from orchestrator.inference.place import LayoutPlace, Place
    from orchestrator.inference.sampling import Sampling
    from orchestrator.inference.texts import Writing, WrittenText
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "inference.generator": ["Writer", "load_decoder"],
            "inference.decoding": ["Decoding", "TextRequest", "generate_tokens"],
            "inference.place": ["LayoutPlace", "Place"],
            "inference.sampling": ["Sampling"],
            "inference.texts": ["Writing", "WrittenText"],
        },
    )

__all__ = [
    "Decoding",
    "LayoutPlace",
    "Place",
    "Sampling",
    "TextRequest",
    "Writer",
    "Writing",
    "WrittenText",
    "generate_tokens",
    "load_decoder",
]
