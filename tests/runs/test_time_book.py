"""The time book of real runs that are killed, stopped and suspended: its seconds against those of a clock outside."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from orchestrator.checkpoint.run_checkpoints import committed, step_of
from orchestrator.observe.time_spans import BOOK, Book, read_book, read_life
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
        first.kill()  # both, as the launcher ends those that are left: one that waits in the store would stay
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


def test_a_hang_is_booked_as_waiting(tmp_path: Path):
    config, run_dir = small_config(tmp_path, *SMALL_RUN, "hardware.timeout_seconds=5"), tmp_path / "run"
    begun = time.time()
    with attempt(config, run_dir, 2) as first:
        first.until_step(30)
        first.signal(signal.SIGSTOP, 1)
        suspended = time.time()
        first.processes[0].join(60)
        assert first.processes[0].exitcode, "rank 0 gives up"
    again = time.time()
    with attempt(config, run_dir, 2) as second:
        second.until_step(60)
        second.signal(signal.SIGTERM)
        assert second.codes() == [143, 143]
    book = adds_up(run_dir, begun, time.time())
    assert again - suspended > 5
    assert book.seconds["waiting"] == pytest.approx(again - suspended, abs=1.5)
    assert book.legs[0].get("training", 0) + book.legs[0].get("lost", 0) < suspended - begun


def test_stops_failing_stores_and_a_book_that_cannot_be_written(tmp_path: Path):
    config, run_dir = small_config(tmp_path, *SMALL_RUN), tmp_path / "run"
    checkpoints, aside, book_path = run_dir / "checkpoints", tmp_path / "aside", run_dir / BOOK
    begun = time.time()
    with attempt(config, run_dir, pause=0.01) as leg:
        leg.until_step(25)
        leg.signal(signal.SIGTERM)
        assert leg.codes() == [143]
    stopped = time.time()
    time.sleep(2)
    stopped = time.time() - stopped
    with attempt(config, run_dir, pause=0.01) as leg:  # its saves fail
        leg.until_step(30)
        checkpoints.rename(aside)
        checkpoints.write_text("no folder")
        # A sign of life is a second old at most, in which the run may have saved once more.
        leg.until_step(max(90, 3 * step_of(committed(aside)[0])))
        leg.kill()
        leg.codes()
    checkpoints.unlink()
    aside.rename(checkpoints)
    with attempt(config, run_dir, pause=0.01) as leg:  # what it does cannot be written down
        leg.until_step(45)
        kept = book_path.read_bytes()
        book_path.unlink()
        book_path.mkdir()
        life = read_life(run_dir)
        # Until a sign of life that comes after evaluations and saves which the book did not take.
        leg.until_step(life.entry.step + 60)
        leg.kill()
        leg.codes()
    book_path.rmdir()
    book_path.write_bytes(kept)
    with attempt(config, run_dir, pause=0.01) as leg:
        leg.until_step(100)
        leg.signal(signal.SIGTERM)
        assert leg.codes() == [143]
    book = adds_up(run_dir, begun, time.time())
    assert book.seconds["stopped"] == pytest.approx(stopped, abs=0.5)
    assert book.counted == pytest.approx(book.total - stopped, abs=0.5)
    assert book.legs[1]["lost"] > book.legs[1].get("training", 0), "of the leg whose saves failed little was kept"
    assert 0 < book.seconds["unknown"] < sum(book.legs[2].values())
