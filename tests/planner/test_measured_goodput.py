"""Goodput of real runs that are killed at random, against the planner's formula for their own figures."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import pytest

from orchestrator.observe.time_figures import figures_of, poisson_interval
from orchestrator.observe.time_spans import TimeEntry, make_book
from orchestrator.planner.estimate.goodput import restart_goodput
from tests.lab.goodput_check import measured_and_expected
from tests.lab.killed_runs import attempt
from tests.lab.ranks import preload
from tests.lab.runs import TINY, small_config
from tests.lab.slow import slow

KILLED = (
    *TINY,
    *(
        "checkpoint.handover.enabled=false",
        "train.eval_every=40",
        "checkpoint.every_steps=20",
        "train.max_steps=100000",
    ),
)


def kill_again_and_again(folder: Path, kills: int, mean_seconds: float, pause: float) -> Path:
    """Kill a run at exponential times after each start; the times are quantiles, so that few of them have the mean."""
    preload()
    config, run_dir, chance = small_config(folder, *KILLED), folder / "run", random.Random(7)
    times = [-mean_seconds * math.log(1 - (number + 0.5) / kills) for number in range(kills)]
    chance.shuffle(times)
    for seconds in times:
        with attempt(config, run_dir, pause=pause) as started:
            time.sleep(seconds)
            started.kill()
            started.codes()
        time.sleep(0.5)
    with attempt(config, run_dir, pause=pause) as last:
        last.until_step(1)
        time.sleep(mean_seconds / 2)
        last.signal(15)
        assert last.codes() == [143]
    return run_dir


@slow
@pytest.mark.parametrize(("kills", "mean_seconds"), [(6, 12.0), (30, 8.0)])
def test_measured_and_expected_goodput_agree(tmp_path: Path, kills: int, mean_seconds: float):
    run_dir = kill_again_and_again(tmp_path, kills, mean_seconds, pause=0.03)
    measured, expected = measured_and_expected(run_dir)
    assert measured == pytest.approx(expected, rel=0.1)


def test_the_formula_on_made_up_failures():
    """Three thousand failures of a simulated run, whose saves, restarts and failures are what the formula assumes."""
    chance, entries, t, saved, leg = random.Random(1), list[TimeEntry](), 0.0, 0, 0
    mtbf, interval, stall, restart = 100.0, 20.0, 1.0, 10.0
    fails = chance.expovariate(1 / mtbf)
    while leg < 3_000:
        entries.append(TimeEntry(t, "starting"))
        begin, step = t + restart, saved
        while begin > fails:  # it fails in the start
            entries += [TimeEntry(fails, "waiting"), TimeEntry(fails, "starting")]
            begin, fails = fails + restart, fails + chance.expovariate(1 / mtbf)
        entries.append(TimeEntry(begin, "training", step, leg))
        while fails > begin + interval + stall:
            step += 20
            entries += [TimeEntry(begin + interval, "saving", step, leg)]
            begin, saved = begin + interval + stall, step
            entries += [TimeEntry(begin, "training", step, leg)]
        done = min(interval, fails - begin)
        entries.append(TimeEntry(fails, "waiting", step + int(done), stepped=begin + int(done)))
        t, fails, leg = fails, fails + chance.expovariate(1 / mtbf), leg + 1
    book = make_book(entries)
    kept = restart_goodput(interval, stall, mtbf, restart)
    assert book.fraction == pytest.approx(kept, rel=0.02)


def test_figures_of_a_book():
    book = make_book(
        [
            *(TimeEntry(0, "starting"), TimeEntry(10, "compiling", 0, 0), TimeEntry(20, "training", 1, 0)),
            *(TimeEntry(60, "saving", 41, 0), TimeEntry(62, "training", 41, 0), TimeEntry(82, "saving", 61, 0)),
            *(TimeEntry(86, "training", 61, 0), TimeEntry(100, "waiting", 74, stepped=99.5)),
            *(TimeEntry(105, "starting"), TimeEntry(110, "loading", None, 1), TimeEntry(120, "training", 61, 1)),
            *(TimeEntry(140, "evaluating", 81, 1), TimeEntry(150, "training", 81, 1), TimeEntry(160, "stopped", 91)),
        ]
    )
    figures = figures_of(book)
    assert figures is not None
    assert (figures.failures, figures.restarts, figures.saves) == (1, 1, 2)
    assert figures.restart_seconds == pytest.approx(20.5, abs=0.6)
    assert figures.stall_seconds == 3
    assert figures.step_seconds == pytest.approx(1.0, rel=0.02)
    assert figures.aside_seconds == pytest.approx(10 + 20)
    assert figures.mtbf_seconds == 160
    assert figures_of(make_book([TimeEntry(0, "starting"), TimeEntry(3, "stopped")])) is None


@pytest.mark.parametrize(
    ("count", "low", "high"), [(0, 0, 3.69), (1, 0.025, 5.57), (4, 1.09, 10.24), (10, 4.80, 18.39), (100, 81.4, 121.6)]
)
def test_bounds_of_a_count(count: int, low: float, high: float):
    """Garwood's exact ones (Biometrika 28, 1936), as tables have them."""
    assert poisson_interval(count) == (pytest.approx(low, abs=0.1), pytest.approx(high, rel=0.02))
