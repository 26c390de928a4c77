"""Figures of a run's failures and of what they cost, from its time book: what a planner assumes, measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.observe.time_spans import Book, Span

_AWAY = ("waiting", "unknown")  # states after a leg that has failed
_SIGMAS = 1.96  # of a normal distribution, for 95%


@dataclass(frozen=True)
class TimeFigures:
    """What a run has measured. Means; None where there was nothing to measure.

    Attributes:
        seconds: of the run, without those in which it was stopped on purpose.
        failures: legs that ended by a failure.
        steps: optimizer steps completed, those included that were done again.
        step_seconds: of one.
        saves: after which the training went on.
        stall_seconds: that one of these stopped the training.
        interval_seconds: of training between two of these.
        restarts: failures after which the run trained again, without another failure in between.
        restart_seconds: from such a failure to the end of the first step: until it is noticed, and the next start.
        aside_seconds: in all, that neither steps nor saves nor failures explain: evaluations, and starts that followed
            on no failure.
        training_seconds: in all, of steps that were kept.
    """

    seconds: float
    failures: int
    steps: int
    step_seconds: float | None
    saves: int
    stall_seconds: float | None
    interval_seconds: float | None
    restarts: int
    restart_seconds: float | None
    aside_seconds: float
    training_seconds: float

    @property
    def goodput(self) -> float:
        """The share of the seconds that went into steps that were kept."""
        return self.training_seconds / self.seconds

    @property
    def mtbf_seconds(self) -> float | None:
        """Mean time between failures; None where nothing has failed."""
        return self.seconds / self.failures if self.failures else None

    def expected(self, kept: float) -> float:
        """Return the goodput that is to be expected of this run, with its evaluations and first starts.

        Args:
            kept: share of the time that is progress where there are only steps, saves and failures, as
                `planner.estimate.goodput.restart_goodput` gives it for interval, stall, mtbf and restart.
        """
        return 1 / (1 / kept + self.aside_seconds / self.training_seconds)


def figures_of(book: Book) -> TimeFigures | None:
    """Return what a run has measured; None where it has trained no step that was kept.

    Args:
        book: of the run.
    """
    spans = [span for span in book.spans if span.end > span.begin]
    trained = [span for span in spans if span.state in ("training", "lost")]
    kept, steps = book.seconds.get("training", 0.0), sum(span.steps for span in trained)
    if not kept or not steps:
        return None
    restarts = _restarts(spans)
    saves = [
        span
        for span, then in itertools.pairwise(spans)
        if span.state == "saving" and then.state in ("training", "lost", "evaluating")
    ]
    spent = sum(span.seconds.get(span.state, 0.0) for span in trained)
    evaluated = book.seconds.get("evaluating", 0.0)
    up = sum(book.seconds.get(state, 0.0) for state in ("starting", "loading", "compiling"))
    recovering = sum(seconds for seconds, _ in restarts) - sum(
        span.end - span.begin for span in spans if _is_away(span)
    )
    last_saves = book.seconds.get("saving", 0.0) - sum(span.end - span.begin for span in saves)
    found = [seconds for seconds, done in restarts if done]
    return TimeFigures(
        seconds=book.counted,
        failures=len(restarts),
        steps=steps,
        step_seconds=spent / steps,
        saves=len(saves),
        stall_seconds=_mean([span.end - span.begin for span in saves]),
        interval_seconds=spent / len(saves) if saves else None,
        restarts=len(found),
        restart_seconds=_mean(found),
        aside_seconds=evaluated + max(0.0, up - recovering) + max(0.0, last_saves),
        training_seconds=kept,
    )


def poisson_interval(count: int) -> tuple[float, float]:
    """Return the bounds between which the expectation lies with 95%, where `count` events were seen.

    Args:
        count: of events. The bounds are exact ones (Garwood) by the approximation of Wilson and Hilferty, which is off
            by less than 2% of the upper bound, and by less than 0.1 below.
    """
    low = count * (1 - 1 / (9 * count) - _SIGMAS / (3 * math.sqrt(count))) ** 3 if count else 0.0
    above = count + 1
    return max(0.0, low), above * (1 - 1 / (9 * above) + _SIGMAS / (3 * math.sqrt(above))) ** 3


def _is_away(span: Span) -> bool:
    return span.state in _AWAY


def _restarts(spans: Sequence[Span]) -> list[tuple[float, bool]]:
    """Return, for each failure, the seconds until the run trained again or failed again, and whether it trained."""
    found: list[tuple[float, bool]] = []
    since: float | None = None
    for span in spans:
        if since is not None and (_is_away(span) or span.state in ("training", "lost", "stopped")):
            found.append((span.begin - since, span.state in ("training", "lost")))
            since = None
        if _is_away(span):
            since = span.begin
    if since is not None:
        found.append((spans[-1].end - since, False))
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
