"""The decoder language model and its layers, written for one device.

No collective and no vendor: parameters carry logical axis names, by which strategies shard them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.models.decoder import Decoder
    from orchestrator.models.feed_forward import SwiGLU
    from orchestrator.models.head import LMHead
    from orchestrator.models.init import draw_slice
    from orchestrator.models.loss import chunked_cross_entropy
    from orchestrator.models.norms import RMSNorm
    from orchestrator.models.protocol import ShardableModel, check_model
    from orchestrator.models.remat import apply_remat
    from orchestrator.models.rope import Rope
    from orchestrator.models.shapes import parameter_shapes
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "models.decoder": ["Decoder"],
            "models.feed_forward": ["SwiGLU"],
            "models.head": ["LMHead"],
            "models.init": ["draw_slice"],
            "models.loss": ["chunked_cross_entropy"],
            "models.norms": ["RMSNorm"],
            "models.protocol": ["ShardableModel", "check_model"],
            "models.remat": ["apply_remat"],
            "models.rope": ["Rope"],
            "models.shapes": ["parameter_shapes"],
        },
    )

__all__ = [
    "Decoder",
    "LMHead",
    "RMSNorm",
    "Rope",
    "ShardableModel",
    "SwiGLU",
    "apply_remat",
    "check_model",
    "chunked_cross_entropy",
    "draw_slice",
    "parameter_shapes",
]
