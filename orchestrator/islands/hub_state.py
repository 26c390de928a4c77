"""The state of a run with islands, as its checkpoint has it beside the islands' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class HubState:
    """What a hub that is started again needs.

    Attributes:
        tensors: outer weights (`model.NAME`, none where gradients are exchanged), and what else has the name `outer.`:
            momentum, what rounding left out, and encoded updates.
        plain: the rest, for JSON: `step`, `mark`, and by island under `saves` the save that belongs to it (`path`,
            `lease`, `step`); the others are the hub's own.
    """

    tensors: dict[str, np.ndarray[Any, Any]]
    plain: dict[str, Any]
