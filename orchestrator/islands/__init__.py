"""Islands: sets of devices that train one model together and exchange rarely.

No torch, but where checkpoints are written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.islands.boxes import Box
    from orchestrator.islands.island_messages import Terms
else:
    __getattr__, __dir__ = lazy_exports(__name__, {"islands.boxes": ["Box"], "islands.island_messages": ["Terms"]})

__all__ = ["Box", "Terms"]
