"""What a time book says of each second, on made-up books."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from orchestrator.observe.time_spans import (
    ALIVE,
    BOOK,
    STATES,
    Life,
    TimeEntry,
    compact,
    entries_from,
    make_book,
    read_book,
)


def book(*entries: tuple, life: Life | None = None):
    return make_book([TimeEntry(*entry) for entry in entries], life)


PLAIN = (
    (100.0, "starting"),
    (103.0, "loading", None, 0),
    (105.0, "training", 0, 0),
    (115.0, "saving", 10, 0),
    (116.0, "training", 10, 0),
    (126.0, "evaluating", 20, 0),
    (128.0, "training", 20, 0),
    (130.0, "stopped", 22),
)


def test_every_second_is_in_one_state():
    found = book(*PLAIN)
    assert found.seconds == {"training": 22, "starting": 3, "loading": 2, "evaluating": 2, "saving": 1}
    assert found.total == found.counted == 30
    assert found.fraction == pytest.approx(22 / 30)
    assert list(found.legs) == [0]


def test_training_that_a_later_leg_repeats_is_lost():
    killed = (130.0, "waiting", 22, None, 129.9)
    found = book(*PLAIN[:-1], killed, (140.0, "starting"), (144.0, "training", 10, 1), (154.0, "stopped", 20))
    # Of the steps 11 to 22 all 12 seconds, and what was done of step 23.
    assert found.seconds["lost"] == pytest.approx(12)
    assert found.seconds["training"] == pytest.approx(10 + 10)
    assert found.seconds["waiting"] == pytest.approx(10)
    assert sum(found.seconds.values()) == pytest.approx(54)
    assert found.legs[1] == pytest.approx({"training": 10, "starting": 4, "waiting": 10})
    assert found.legs[0]["lost"] == pytest.approx(12)


def test_a_step_within_a_span_is_cut_in_proportion():
    found = book(
        (0.0, "training", 0, 0), (100.0, "waiting", 50, None, 100.0), (110.0, "training", 20, 1), (110.0, "stopped")
    )
    assert found.seconds == pytest.approx({"training": 40, "lost": 60, "waiting": 10})


def test_a_hang_is_waiting_and_not_training():
    found = book(
        (0.0, "training", 0, 0), (400.0, "waiting", 50, None, 100.0), (410.0, "training", 50, 1), (410.0, "stopped")
    )
    assert found.seconds == pytest.approx({"training": 100, "lost": 2, "waiting": 308})


def test_a_rewind_within_a_leg_loses_what_it_repeats():
    found = book(
        (0.0, "training", 0, 0), (30.0, "loading", 30, 0), (31.0, "training", 10, 0), (51.0, "stopped", 30, None, 51.0)
    )
    assert found.seconds == pytest.approx({"training": 30, "lost": 20, "loading": 1})


def test_twice_undone_is_lost_once():
    found = book(
        *((0.0, "training", 0, 0), (20.0, "waiting", 20, None, 20.0)),
        *((20.0, "training", 10, 1), (40.0, "waiting", 30, None, 40.0)),
        *((40.0, "training", 0, 2), (70.0, "stopped", 30)),
    )
    assert found.seconds == pytest.approx({"training": 30, "lost": 40})


def test_time_while_stopped_is_not_the_runs():
    found = book(*PLAIN, (1130.0, "starting"), (1131.0, "training", 22, 1), (1140.0, "stopped", 30))
    assert found.total == 1040
    assert found.counted == 40
    assert found.fraction == pytest.approx(31 / 40)


def test_the_last_sign_of_life_ends_the_book():
    life = Life(140.0, TimeEntry(128.0, "training", 30, 0, 139.5))
    found = book(*PLAIN[:-1], life=life)
    assert found.total == 40
    assert found.seconds["training"] == 32
    assert found.life == life
    assert book(*PLAIN, life=life).life is None, "the leg has ended by itself"
    assert book(*PLAIN[:-1], life=Life(120.0, life.entry)).total == 28, "of an earlier process"


def test_what_could_not_be_written_is_unknown():
    life = Life(200.0, TimeEntry(180.0, "training", 60, 0), missing=150.0)
    found = book(*PLAIN[:-1], life=life)
    assert found.seconds["unknown"] == 30
    assert found.seconds["training"] == 10 + 10 + 22 + 20


def test_starts_that_fail_belong_to_the_leg_that_follows():
    found = book((0.0, "starting"), (5.0, "waiting"), (8.0, "starting"), (10.0, "training", 0, 0), (20.0, "stopped", 5))
    assert found.legs == {0: pytest.approx({"training": 10, "starting": 7, "waiting": 3})}
    late = book(*PLAIN, (140.0, "starting"), (142.0, "waiting"))
    assert late.legs[1] == pytest.approx({"stopped": 10, "starting": 2})


def test_a_clock_that_is_set_back_makes_no_negative_span(tmp_path: Path):
    rows = [
        {"t": 100.0, "state": "starting"},
        {"t": 90.0, "state": "training", "step": 0},
        {"t": 110.0, "state": "stopped"},
    ]
    (tmp_path / BOOK).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_book(tmp_path).seconds == {"training": 10}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]\n",
        '{"t": 1e999, "state": "training"}\n',
        '{"t": "x"}\n{"state": "training"}\n',
        "\xff\n" * 3,
        "[" * 9999,
    ],
)
def test_what_is_no_book_is_empty(tmp_path: Path, text: str):
    (tmp_path / BOOK).write_bytes(text.encode("latin-1"))
    (tmp_path / ALIVE).write_bytes(text.encode("latin-1"))
    assert read_book(tmp_path).spans == ()
    assert read_book(tmp_path / "nowhere").fraction is None
    assert entries_from(text) == []


def _long(chance: random.Random, legs: int, saves: int) -> list[TimeEntry]:
    found, t, step = list[TimeEntry](), 1000.0, 0
    for leg in range(legs):
        found += [TimeEntry(t, "starting"), TimeEntry(t := t + 5, "training", step, leg)]
        for _ in range(saves):
            step += 10
            found.append(TimeEntry(t := t + chance.uniform(9, 11), chance.choice(["saving", "evaluating"]), step, leg))
            found.append(TimeEntry(t := t + chance.uniform(0.1, 2), "training", step, leg))
        found.append(TimeEntry(t := t + 3, "waiting", step + 3, stepped=t))
        t += 20
    return found


@pytest.mark.parametrize(("legs", "saves"), [(1, 3000), (40, 60), (700, 2)])
def test_a_long_book_travels_shortened_and_adds_up_to_the_same(legs: int, saves: int):
    entries = _long(random.Random(3), legs, saves)
    short = compact(entries)
    assert len(short) <= max(500, 4 * legs)
    whole, shortened = make_book(entries), make_book(entries_from([entry.to_dict() for entry in short]))
    for state in STATES:
        assert shortened.seconds.get(state, 0) == pytest.approx(whole.seconds.get(state, 0), rel=0.01, abs=0.5), state
    assert shortened.total == pytest.approx(whole.total)
    assert all(a.end == b.begin for a, b in itertools.pairwise(whole.spans))
    assert sum(whole.seconds.values()) == pytest.approx(whole.total)
