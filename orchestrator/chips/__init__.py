"""The catalogue of accelerators, as data.

Peak rates, memory, links and prices stand in `chips.yaml`, each with its source or `unknown`. The planner and the
throughput figures read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.chips.catalogue import Catalogue
    from orchestrator.chips.chip import Chip, Figure
    from orchestrator.chips.load import load_catalogue
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "chips.catalogue": ["Catalogue"],
            "chips.chip": ["Chip", "Figure"],
            "chips.load": ["load_catalogue"],
        },
    )

__all__ = [
    "Catalogue",
    "Chip",
    "Figure",
    "load_catalogue",
]
