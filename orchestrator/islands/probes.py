"""The handover check of islands: what the outer weights give for the reference batch, on each one that comes."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.checkpoint.reference import TOLERANCES, tolerance
from orchestrator.islands.island_messages import Score
from orchestrator.islands.refusal import refuse

_KEPT = 8  # versions whose results are kept


@dataclass(frozen=True)
class ProbeVerdict:
    """Two islands that have measured the same weights.

    Attributes:
        island: that came.
        other: that had measured before.
        loss: relative difference of the losses.
        grad_norm: the same of the norms of the gradients.
        agrees: both are within the tolerance that is declared for their precisions.
    """

    island: str
    other: str
    loss: float
    grad_norm: float
    agrees: bool


class Probes:
    """What islands have measured, by version of the outer weights."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], tuple[str, Score]] = {}

    def check(self, score: Score) -> None:
        """See that a score can be compared: two numbers, and the precision by its name. One without numbers can be.

        Args:
            score: of an island.
        """
        precision = score.names[2] if len(score.names) == 3 else ""
        if len(score.values) == 2 and (precision, precision) not in TOLERANCES:
            known = ", ".join(sorted({name for pair in TOLERANCES for name in pair}))
            raise refuse("a score of the reference batch is of no known precision", got=precision, allowed=known)

    def heard(self, island: str, score: Score) -> ProbeVerdict | None:
        """Compare what an island has measured with what another one has, with the same weights.

        Args:
            island: its name.
            score: loss and norm of the gradients; the third name is the precision.

        Returns:
            None where there is nothing to compare.
        """
        before = self._found.setdefault(score.versions, (island, score))
        while len(self._found) > _KEPT:
            del self._found[next(iter(self._found))]
        other, first = before
        if other == island or len(score.values) != 2 or len(first.values) != 2:
            return None
        allowed = tolerance(first.names[2], score.names[2])
        loss, norm = (abs(a - b) / max(abs(b), 1e-30) for a, b in zip(score.values, first.values, strict=True))
        return ProbeVerdict(island, other, loss, norm, loss <= allowed.loss and norm <= allowed.grad_norm)
