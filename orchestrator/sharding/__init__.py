"""How tensors are divided over devices, independent of any framework.

Mesh axes and their degrees (`layout`), the logical axes of a model (`axes`), and the strict rules that map one to the
other (`rules`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.sharding.axes import LOGICAL_AXES, MESH_AXES, ParameterAxes
    from orchestrator.sharding.layout import Layout, resolve_layout
    from orchestrator.sharding.parts import Parts, WholeParts
    from orchestrator.sharding.rules import RULES, Placement, place
    from orchestrator.sharding.shard import Shard
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "sharding.axes": ["LOGICAL_AXES", "MESH_AXES", "ParameterAxes"],
            "sharding.layout": ["Layout", "resolve_layout"],
            "sharding.parts": ["Parts", "WholeParts"],
            "sharding.rules": ["RULES", "Placement", "place"],
            "sharding.shard": ["Shard"],
        },
    )

__all__ = [
    "LOGICAL_AXES",
    "MESH_AXES",
    "RULES",
    "Layout",
    "ParameterAxes",
    "Parts",
    "Placement",
    "Shard",
    "WholeParts",
    "place",
    "resolve_layout",
]
