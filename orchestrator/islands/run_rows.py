"""Rows of metrics of a run with islands: one for each global step, of what all islands have reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.observe.history import finite_row

_PATIENCE_ROUNDS = 2  # what a lost island has not reported of a round is not waited for any longer


@dataclass
class _Sum:
    """Sums over sequences: of their targets, and of figures weighted by these."""

    sequences: float = 0.0
    targets: float = 0.0
    loss: float = 0.0
    norm: float = 0.0
    rate: float = 0.0

    def add(self, other: _Sum, part: float = 1.0) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + part * getattr(other, name))

    def mean(self, value: float) -> float:
        return value / self.targets if self.targets else math.nan


class RunRows:
    """Makes the rows of a run from the reports of its islands.

    The loss of a global step is the mean over its target tokens, whichever island had them. Where nobody waits there
    are no global steps: a row is then of the next so many sequences that were reported.

    Args:
        sequences: of a global step.
        seq_len: tokens of a sequence.
        rounds: whether islands go through global batches together.
        step: global steps that are recorded.
        seen: island and number of the leases that are.
        leg: which start of the run this is.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        sequences: int,
        seq_len: int,
        rounds: bool,
        step: int = 0,
        seen: Iterable[tuple[str, int]] = (),
        leg: int = 0,
        clock: Callable[[], float] = time.time,
    ):
        self._batch, self._seq_len, self._leg, self._clock = sequences, seq_len, leg, clock
        self._rounds, self._seen = rounds, set(seen)
        self._pending: dict[int, tuple[int, _Sum]] = {}  # by step: round, and what is reported of it
        self._ready = _Sum()
        self.step = step
        self._since = clock()

    def add(self, report: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Take a report. Returns the rows that are complete with it.

        Args:
            report: note of the hub of this kind.
        """
        key = (str(report["island"]), int(report["lease"]))
        if key in self._seen:
            return []  # an island that came back has trained it again, and to the same bits
        self._seen.add(key)
        lease_round, made = int(report["round"]), list[_Sum]()
        for index, at in enumerate(report["at"]):
            targets = float(report["targets"][index])
            figures = [_at(report[name], index) for name in ("losses", "norms", "rates")]
            one = _Sum(report["sequences"][index], targets, *(targets * figure for figure in figures))
            if self._rounds:
                self._pending.setdefault(at, (lease_round, _Sum()))[1].add(one)
            else:
                self._take(one, made)
        for at in sorted(self._pending):
            number, known = self._pending[at]
            if known.sequences < self._batch and lease_round < number + _PATIENCE_ROUNDS:
                break
            self._take(self._pending.pop(at)[1], made)
        return self._written(made)

    def _take(self, one: _Sum, made: list[_Sum]) -> None:
        """Add what belongs together; whole global batches go to `made`."""
        self._ready.add(one)
        while self._ready.sequences >= self._batch:
            part = self._batch / self._ready.sequences
            whole, self._ready = self._ready, _Sum()
            made.append(_Sum())
            made[-1].add(whole, part)
            if part < 1.0:
                self._ready.add(whole, 1.0 - part)

    def _written(self, sums: list[_Sum]) -> list[dict[str, Any]]:
        now = self._clock()
        seconds = (now - self._since) / len(sums) if sums else 0.0
        tokens, rows = self._batch * self._seq_len, []
        for one in sums:
            self.step += 1
            shared = {"tokens": self.step * tokens, "tokens_per_second": tokens / seconds if seconds else None}
            figures = {"loss": one.mean(one.loss), "grad_norm": one.mean(one.norm), "lr": one.mean(one.rate)}
            about = {"step_seconds": seconds, "mfu": None, "memory_bytes": None, "time": now, "leg": self._leg}
            rows.append(finite_row({"step": self.step, **figures, **shared, **about}))
        self._since = now if sums else self._since
        return rows


def _at(values: Any, index: int) -> float:
    value = values[index] if index < len(values) else None
    return math.nan if value is None else float(value)
