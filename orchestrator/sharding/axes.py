"""Names of axes: logical ones on parameters, mesh ones on devices.

A model names the dims of its parameters by *logical* axes and knows nothing of devices. A layout gives
*mesh* axes their degrees. `sharding.rules` maps the first to the second.
"""

from __future__ import annotations

from typing import Final

# Outermost first: neighbours in the last axis are neighbours on the fastest links.
MESH_AXES: Final = ("replicate", "pipeline", "fsdp", "expert", "context", "tensor")

LOGICAL_AXES: Final = {
    "vocab": "rows of the embedding and of the output head",
    "embed": "the residual stream's width",
    "heads": "query heads x head_dim",
    "kv_heads": "key/value heads x head_dim",
    "head_dim": "one head's width (QK-norm)",
    "latent": "what latent attention makes queries, or keys and values, of",
    "mlp": "the feed-forward's inner width",
    "rank": "an adapter's inner width",
    "positions": "rows of a learned position table",
    "norm": "a normalisation's scale or shift",
    "experts": "experts of a mixture, each with matrices of its own",
    "choices": "experts that a router chooses among, or gates: rows of a router",
    "balance": "experts' offsets that balance their load; no gradient",
}

# For each parameter: the logical axis of each dim, in the order of its shape.
ParameterAxes = dict[str, tuple[str, ...]]
