"""What an island goes on from until the hub has answered: the update that will probably come (eager updates).

Kale and others, Eager Updates for Overlapped Communication and Computation in DiLoCo (arXiv 2502.12996): the islands'
mean of the time before, in which an island's own part is replaced by what it offers now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from orchestrator.islands.island_messages import Terms

K = TypeVar("K")
Array = np.ndarray[Any, Any]
MOVED, UPDATE = "moved", "update"
"""Kinds of what is kept: what was offered last, and the update that came for it."""


class EagerGuess(Generic[K]):
    """Guesses updates, part by part.

    Args:
        terms: of the exchange.

    Attributes:
        kept: by kind and part, fp32.
    """

    def __init__(self, terms: Terms):
        ahead = terms.momentum if terms.nesterov else 0.0
        # Of a step of the outer optimizer; what its momentum was before is in the last update.
        self._factor = np.float32(-terms.lr * (1 + ahead))
        self.kept: dict[str, dict[K, Array]] = {MOVED: {}, UPDATE: {}}

    def guess(self, moved: Mapping[K, Array], share: float) -> dict[K, Array]:
        """Return the updates that will probably follow an offer.

        Args:
            moved: what is offered: outer weights minus local ones, by part.
            share: of a step's sequences that is this island's.
        """
        found: dict[K, Array] = {}
        for key, now in moved.items():
            if key in self.kept[UPDATE] and key in self.kept[MOVED]:
                changed = (now - self.kept[MOVED][key]) * np.float32(share)
                found[key] = self.kept[UPDATE][key] + self._factor * changed
            else:  # the others are taken to have moved alike
                found[key] = self._factor * now
            self.kept[MOVED][key] = now
        return found

    def came(self, updates: Mapping[K, Array]) -> None:
        """Take note of what has come.

        Args:
            updates: by part.
        """
        self.kept[UPDATE].update(updates)
