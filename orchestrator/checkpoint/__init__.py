"""Portable checkpoints: directories of safetensors and JSON.

Writing, reading, verifying, converting and signing them. Any layout on any backend reads what another one wrote;
docs/checkpoint-format.md specifies the format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.checkpoint.checkpoint import Checkpoint
    from orchestrator.checkpoint.reader import Reader
    from orchestrator.checkpoint.run_checkpoints import committed, newest_valid, prune
    from orchestrator.checkpoint.signing import Trust, signer, trust
    from orchestrator.checkpoint.storage import locate
    from orchestrator.checkpoint.writer import Contents, save
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "checkpoint.checkpoint": ["Checkpoint"],
            "checkpoint.reader": ["Reader"],
            "checkpoint.run_checkpoints": ["committed", "newest_valid", "prune"],
            "checkpoint.signing": ["Trust", "signer", "trust"],
            "checkpoint.storage": ["locate"],
            "checkpoint.writer": ["Contents", "save"],
        },
    )

__all__ = [
    "Checkpoint",
    "Contents",
    "Reader",
    "Trust",
    "committed",
    "locate",
    "newest_valid",
    "prune",
    "save",
    "signer",
    "trust",
]
