"""Models of other software: Hugging Face directories, `torch.distributed.checkpoint`, and files that are pickle.

`importing` makes a checkpoint from them and reports what became of every tensor and key; `exporting` writes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.interop.exporting import export_dcp, export_hf
    from orchestrator.interop.importing import Imported, describe, detect_format, import_weights
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "interop.exporting": ["export_dcp", "export_hf"],
            "interop.importing": ["Imported", "describe", "detect_format", "import_weights"],
        },
    )

__all__ = [
    "Imported",
    "describe",
    "detect_format",
    "export_dcp",
    "export_hf",
    "import_weights",
]
