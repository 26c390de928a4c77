"""What a run shows: metrics, progress and throughput.

Metrics files, TensorBoard and W&B, the progress bar, tokens per second and MFU. None of it can end a training run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.observe.bar import Bar
    from orchestrator.observe.gemm import measure_gemm_flops
    from orchestrator.observe.history import History
    from orchestrator.observe.metrics import Metrics
    from orchestrator.observe.progress import Progress
    from orchestrator.observe.sink import Channel, SideChannels
    from orchestrator.observe.throughput import mfu, peak_flops
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "observe.bar": ["Bar"],
            "observe.gemm": ["measure_gemm_flops"],
            "observe.history": ["History"],
            "observe.metrics": ["Metrics"],
            "observe.progress": ["Progress"],
            "observe.sink": ["Channel", "SideChannels"],
            "observe.throughput": ["mfu", "peak_flops"],
        },
    )

__all__ = [
    "Bar",
    "Channel",
    "History",
    "Metrics",
    "Progress",
    "SideChannels",
    "measure_gemm_flops",
    "mfu",
    "peak_flops",
]
