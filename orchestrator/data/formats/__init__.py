"""Readers of text data, one module per file format.

`known_formats` lists them and recognises a file by its content and name: plain text, JSON Lines, CSV, Parquet,
Arrow, MDS, LitData.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.data.formats.find import find_inputs
    from orchestrator.data.formats.known_formats import FORMATS
    from orchestrator.data.formats.reading import Input
    from orchestrator.data.formats.rows import TextSpec
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "data.formats.find": ["find_inputs"],
            "data.formats.known_formats": ["FORMATS"],
            "data.formats.reading": ["Input"],
            "data.formats.rows": ["TextSpec"],
        },
    )

__all__ = [
    "FORMATS",
    "Input",
    "TextSpec",
    "find_inputs",
]
