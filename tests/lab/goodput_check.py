"""Whether runs that were hurt again and again kept as much of their time as the planner expects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.observe.time_figures import TimeFigures, figures_of
from orchestrator.observe.time_spans import Book, read_book
from orchestrator.planner.estimate.goodput import restart_goodput


def measured_and_expected(run_dir: Path) -> tuple[float, float]:
    """The goodput of a run by its book, and by Daly's formula for its own failures, saves and restarts."""
    figures = figures_of(read_book(run_dir))
    assert figures is not None, "it has trained nothing"
    interval, stall, restart = figures.interval_seconds, figures.stall_seconds, figures.restart_seconds
    assert interval is not None, "it has saved nothing"
    assert stall is not None
    assert restart is not None, "it has not been killed, or never came back"
    assert figures.mtbf_seconds is not None
    return figures.goodput, figures.expected(restart_goodput(interval, stall, figures.mtbf_seconds, restart))


def of_a_campaign(books: Sequence[Book], delay: float) -> tuple[float, float]:
    """Return the goodput of all runs of a campaign, and by Daly's formula for their failures, saves and down time.

    The formula takes failures that come at any time, in restarts too; a campaign hurts one that trains. So the rate is
    that of the faults that stopped a run, per second in which it trained or saved, and the down time per fault, with
    the starts that failed, stands for the restart of the formula whose repetitions take as long. A save is written
    behind the run's back and is worth nothing before it is committed: what a failure loses for that is added.

    Args:
        books: of the runs.
        delay: mean seconds from the last step of a save to its commit.
    """
    found = [figures for book in books if (figures := figures_of(_nobody_stops(book))) is not None]
    failures, saves = sum(one.failures for one in found), sum(one.saves for one in found)
    assert failures, "no run was stopped by a fault"
    assert saves, "no run has saved"
    seconds, trained = sum(one.seconds for one in found), sum(_trained(one) for one in found)
    aside, kept = sum(one.aside_seconds for one in found), sum(one.training_seconds for one in found)
    stalled = sum(one.saves * (one.stall_seconds or 0.0) for one in found)
    up, down = (trained + stalled) / failures, (seconds - trained - stalled - aside) / failures
    interval, stall = trained / saves, stalled / saves
    restart = up * math.log1p(down / up) + max(0.0, delay - stall)
    expected = restart_goodput(interval, stall, up, restart)
    return kept / seconds, 1 / (1 / expected + aside / kept)


def _trained(figures: TimeFigures) -> float:
    return figures.steps * (figures.step_seconds or 0.0)


def _nobody_stops(book: Book) -> Book:
    """Workers whose launcher was killed save and stop: booked as a stop, but here it is a fault that stopped them."""
    last = len(book.spans) - 1
    spans = [
        replace(span, state="waiting") if span.state == "stopped" and number < last else span
        for number, span in enumerate(book.spans)
    ]
    return replace(book, spans=spans)
