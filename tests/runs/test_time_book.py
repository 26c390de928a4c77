"""The time book of real runs that are killed, stopped and suspended: its seconds against those of a clock outside."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from orchestrator.observe.time_spans import Book, read_book
from tests.lab.killed_runs import attempt
from tests.lab.ranks import preload
from tests.lab.runs import TINY, small_config

SMALL_RUN = (
    *TINY,
    *("checkpoint.handover.enabled=false", "checkpoint.asynchronous=false", "train.eval_every=20"),
    *("checkpoint.every_steps=20", "train.max_steps=4000"),
)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    preload()


def adds_up(run_dir: Path, begun: float, ended: float) -> Book:
    """The book's seconds are those of a clock outside, to 1%, and no second is in two states."""
    book = read_book(run_dir)
    assert sum(book.seconds.values()) == pytest.approx(book.total)
    assert sum(sum(seconds.values()) for seconds in book.legs.values()) == pytest.approx(book.total)
    assert book.total == pytest.approx(ended - begun, rel=0.01)
    return book


def test_a_run_that_is_killed_and_goes_on(tmp_path: Path):
    config, run_dir = small_config(tmp_path, *SMALL_RUN), tmp_path / "run"
    begun = time.time()
    with attempt(config, run_dir, 2) as first:
        first.until_step(50)
        first.kill(0)
        killed = time.time()
        first.codes()
    time.sleep(2)
    again = time.time()
    with attempt(config, run_dir, 2) as second:
        second.until_step(90)
        second.signal(signal.SIGTERM)
        assert second.codes() == [143, 143]
    ended = time.time()
    book = adds_up(run_dir, begun, ended)
    assert book.seconds["waiting"] == pytest.approx(again - killed, abs=1.5), "a sign of life is a second old at most"
    assert book.seconds["lost"] > 0
    assert book.seconds["saving"] > 0
    assert book.seconds["evaluating"] > 0
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["goodput"]["fraction"] == pytest.approx(book.fraction, rel=0.02)  # it was written before the report
    for number, leg in enumerate(facts["legs"]):
        assert sum(leg["seconds"].values()) == pytest.approx(sum(book.legs[number].values()), rel=0.02)
