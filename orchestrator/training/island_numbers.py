"""The numbers of an island's steps: read from the devices where an offer or a report needs them, and not before."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from orchestrator.islands.island_messages import Lease, Report
from orchestrator.strategies.parallel_strategy import ParallelStrategy


class IslandNumbers:
    """Counts what an island has learned from, and tells what a lease has come to.

    Args:
        parallel: the strategy.
    """

    def __init__(self, parallel: ParallelStrategy):
        self._parallel = parallel
        self._unread: list[tuple[Tensor, bool]] = []  # target tokens of a step; whether it had rows at all
        self._learned, self._offered = 0, dict[int, int]()  # tokens in all, and up to the last offer of each fragment
        self._steps: list[tuple[Tensor, Tensor, float]] = []  # loss, norm and learning rate
        self._targets: list[int] = []
        self._since, self._waited, self._compiled = time.monotonic(), 0.0, 0.0
        self._compilations = parallel.compilations()

    def begin(self, waited: float) -> None:
        """Begin to count the seconds of a lease.

        Args:
            waited: seconds that the island has waited so far.
        """
        self._since, self._waited, self._compiled = time.monotonic(), waited, 0.0

    def heard(self, loss: Tensor, grad_norm: Tensor, targets: Tensor, lr: float, real: bool, waited: float) -> None:
        """Take the numbers of a step.

        Args:
            loss: of the step.
            grad_norm: of the step.
            targets: tokens that it has learned from.
            lr: its learning rate.
            real: it had rows; else `targets` is a divisor, and there were none.
            waited: seconds that the island has waited so far.
        """
        self._steps.append((loss, grad_norm, lr))
        self._unread.append((targets, real))
        if (now := self._parallel.compilations()) != self._compilations:
            # What the lease has taken so far says nothing about the island's speed.
            self._compilations, self._compiled = now, time.monotonic() - self._since - (waited - self._waited)

    def _read(self) -> None:
        counts = self._parallel.fetch([targets for targets, _ in self._unread])
        found = [round(count) if real else 0 for count, (_, real) in zip(counts, self._unread, strict=True)]
        self._unread.clear()
        self._targets += found
        self._learned += sum(found)

    def since_offer(self, fragment: int) -> int:
        """Return the tokens that were learned from since this was asked last for a fragment.

        Args:
            fragment: number of it.
        """
        self._read()
        before, self._offered[fragment] = self._offered.get(fragment, 0), self._learned
        return self._learned - before

    def report(self, lease: Lease, waited: float) -> Report | None:
        """Return what a lease has come to; None where its first steps were those of an earlier process.

        Args:
            lease: whose steps are done.
            waited: seconds that the island has waited so far.
        """
        self._read()
        length, steps, targets = len(lease.steps), self._steps, self._targets
        values = self._parallel.fetch([value for loss, norm, _ in steps for value in (loss, norm)])
        seconds, waits, compiled = time.monotonic() - self._since, waited - self._waited, self._compiled
        self._steps, self._targets = [], []
        self.begin(waited)
        if len(steps) != length:
            return None
        rates = tuple(rate for *_, rate in steps)
        losses, norms = _finite(values[::2]), _finite(values[1::2])
        return Report(lease.lease, losses, tuple(targets), norms, rates, seconds, waits, compiled)

    def plain(self) -> dict[str, Any]:
        """Return the state for JSON."""
        self._read()
        return {"learned": self._learned, "offered": sorted(map(list, self._offered.items()))}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Take over what `plain` gave.

        Args:
            plain: from a checkpoint.
        """
        self._learned = int(plain["learned"])
        self._offered = {int(at): int(count) for at, count in plain["offered"]}


def _finite(values: list[float]) -> tuple[float | None, ...]:
    return tuple(value if math.isfinite(value) else None for value in values)
