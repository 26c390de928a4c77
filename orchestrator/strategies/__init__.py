"""Everything that spans several devices, behind one interface.

The interface (`parallel_strategy`) is implemented on DTensor and FSDP2 (`dtensor`) and on torch_xla SPMD (`xla`).
Model, optimizer, data and checkpoints never ask which one runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.strategies.dtensor import DTensorStrategy
    from orchestrator.strategies.parallel_strategy import Batch, ParallelStrategy
    from orchestrator.strategies.xla import XlaStrategy
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "strategies.dtensor": ["DTensorStrategy"],
            "strategies.parallel_strategy": ["Batch", "ParallelStrategy"],
            "strategies.xla": ["XlaStrategy"],
        },
    )

__all__ = [
    "Batch",
    "DTensorStrategy",
    "ParallelStrategy",
    "XlaStrategy",
]
