"""What every second of a run went into, computed from the entries of its time book.

An entry is a change of state: from `t` on the run is in `state`. Between two entries lies a span. Two things are known
only later, and computed here: training is `lost` where a later entry goes on from a smaller step, and what follows on
the last completed step of a leg that failed is a part of a step, which is lost too, and then waiting for somebody to
notice. `runs.time_book` writes entries, docs/goodput.md explains the states.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

BOOK, ALIVE = "time_book.jsonl", "time_book.alive"
STATES = (
    *("training", "starting", "compiling", "loading", "evaluating", "saving"),
    *("lost", "waiting", "stopped", "unknown"),
)
"""All states: `training` is what counts, and `stopped` is no part of the run's time."""
CLOSING = ("waiting", "stopped")
"""States between two legs."""
CARRIED = 500
"""Entries that travel in a checkpoint at most."""


@dataclass(frozen=True)
class TimeEntry:
    """A change of state.

    Attributes:
        t: seconds since the epoch.
        state: from then on.
        step: optimizer steps completed; None where the writer does not know.
        leg: which start of the run it is of; None between legs and where the writer does not know.
        stepped: when the last step was completed; of an entry that ends a leg.
        within: seconds of other states within the span that follows, of entries that were put together.
    """

    t: float
    state: str
    step: int | None = None
    leg: int | None = None
    stepped: float | None = None
    within: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data, without what is not known."""
        found: dict[str, Any] = {"t": round(self.t, 3), "state": self.state}
        found |= {key: value for key in ("step", "leg") if (value := getattr(self, key)) is not None}
        found |= {} if self.stepped is None else {"stepped": round(self.stepped, 3)}
        return found | ({"within": {key: round(value, 3) for key, value in self.within.items()}} if self.within else {})

    @staticmethod
    def from_data(data: Any) -> TimeEntry | None:
        """Return the entry of JSON data; None where that is none.

        Args:
            data: of a file, which nobody trusts.
        """
        if not isinstance(data, Mapping) or data.get("state") not in STATES or not _is_time(data.get("t")):
            return None
        step, leg = (value if type(value := data.get(key)) is int and value >= 0 else None for key in ("step", "leg"))
        stepped, within = data.get("stepped"), data.get("within")
        inner = within if isinstance(within, Mapping) else {}
        return TimeEntry(
            float(data["t"]),
            str(data["state"]),
            step,
            leg,
            float(stepped) if _is_time(stepped) and stepped is not None else None,
            {key: float(value) for key, value in inner.items() if key in STATES and _is_time(value)},
        )


@dataclass(frozen=True)
class Life:
    """The last sign of life of the process that keeps the book.

    Attributes:
        t: when.
        entry: the state it was in.
        missing: when the first state began that could not be written into the book; None where nothing waits.
    """

    t: float
    entry: TimeEntry
    missing: float | None = None


@dataclass(frozen=True)
class Span:
    """A time in one state.

    Attributes:
        state: one of `STATES`.
        begin: seconds since the epoch.
        end: of the same clock.
        leg: that it belongs to; the time between two legs belongs to the later one.
        within: seconds of other states in it.
        steps: that were completed in it.
    """

    state: str
    begin: float
    end: float
    leg: int = 0
    within: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by state, which add up to its length."""
        own = max(0.0, self.end - self.begin - sum(self.within.values()))
        return _sums(self.within, {self.state: own})


@dataclass(frozen=True)
class Book:
    """The spans of a run, without gaps.

    Attributes:
        spans: by time.
        life: the last sign of life, where the process that gave it did not end the leg itself.
    """

    spans: Sequence[Span] = ()
    life: Life | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by state, the states in the order of `STATES`; those that never were are left out."""
        return _total(self.spans)

    @property
    def total(self) -> float:
        """Seconds from the first start to the last sign of life, whatever happened in them."""
        return self.spans[-1].end - self.spans[0].begin if self.spans else 0.0

    @property
    def counted(self) -> float:
        """Seconds of the run: all but those in which it was stopped on purpose."""
        return self.total - self.seconds.get("stopped", 0.0)

    @property
    def fraction(self) -> float | None:
        """Goodput: the share of the run's seconds that went into steps that were kept; None for an empty book."""
        return self.seconds.get("training", 0.0) / self.counted if self.counted > 0 else None

    @property
    def legs(self) -> dict[int, dict[str, float]]:
        """Seconds by state of each leg, with the time since the leg before it."""
        numbers = sorted({span.leg for span in self.spans})
        return {number: _total(span for span in self.spans if span.leg == number) for number in numbers}

    @property
    def state(self) -> str | None:
        """The last known state; None for an empty book."""
        return self.spans[-1].state if self.spans else None

    def facts(self) -> dict[str, Any]:
        """Return what run.json says of the whole run."""
        fraction = self.fraction
        return {
            "fraction": None if fraction is None else round(fraction, 4),
            "total_seconds": round(self.counted, 3),
            "seconds": rounded(self.seconds),
        }


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return seconds by state to the millisecond.

    Args:
        seconds: by state.
    """
    return {state: round(value, 3) for state, value in seconds.items()}


def read_book(run_dir: Path) -> Book:
    """Read the time book of a run as far as it goes; empty where there is none.

    Args:
        run_dir: the run's directory.
    """
    return make_book(read_entries(run_dir), read_life(run_dir))


def read_entries(run_dir: Path) -> list[TimeEntry]:
    """Return the entries of a run's time book, by rising time; lines that were cut are left out.

    Args:
        run_dir: the run's directory.
    """
    path, found = run_dir / BOOK, list[TimeEntry]()
    try:
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
    except OSError:
        lines = []
    for line in lines:
        try:
            entry = TimeEntry.from_data(json.loads(line))
        except (ValueError, RecursionError):
            continue
        if entry is not None:
            found.append(entry)
    return in_order(found)


def entries_from(data: Any) -> list[TimeEntry]:
    """Return the entries of a list of JSON data; what is none is left out.

    Args:
        data: parsed JSON.
    """
    items = data if isinstance(data, list) else []
    return in_order([entry for item in items if (entry := TimeEntry.from_data(item)) is not None])


def in_order(entries: Iterable[TimeEntry]) -> list[TimeEntry]:
    """Return entries in the order in which they were written, none of them earlier than the one before.

    Args:
        entries: as they were written, by several processes whose clocks need not agree.
    """
    found: list[TimeEntry] = []
    for entry in entries:
        before = found[-1].t if found else entry.t
        found.append(entry if entry.t >= before else replace(entry, t=before))
    return found


def read_life(run_dir: Path) -> Life | None:
    """Return the last sign of life; None where there is none.

    Args:
        run_dir: the run's directory.
    """
    try:
        data = json.loads((run_dir / ALIVE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    entry = TimeEntry.from_data(data.get("entry")) if isinstance(data, Mapping) else None
    if entry is None or not _is_time(data.get("t")):
        return None
    missing = data.get("missing")
    return Life(float(data["t"]), entry, float(missing) if missing is not None and _is_time(missing) else None)


def with_life(entries: Sequence[TimeEntry], life: Life | None) -> list[TimeEntry]:
    """Return entries with what the last sign of life adds: states that could not be written are unknown.

    Args:
        entries: of the book.
        life: the last sign of life; it is left out where the book goes on after it.
    """
    found = list(entries)
    if not is_open(found, life) or life is None:
        return found
    if life.missing is not None:
        found += [TimeEntry(life.missing, "unknown", leg=life.entry.leg), life.entry]
    return in_order(found)


def is_open(entries: Sequence[TimeEntry], life: Life | None) -> bool:
    """Return whether the last leg was not ended in the book, but is known to have lived on.

    Args:
        entries: of the book.
        life: the last sign of life.
    """
    return life is not None and bool(entries) and entries[-1].state not in CLOSING and life.t >= entries[-1].t


def make_book(entries: Sequence[TimeEntry], life: Life | None = None) -> Book:
    """Return the spans of a run. The last one ends with the last sign of life.

    Args:
        entries: by rising time.
        life: the last sign of life; None where the last entry ends the book.
    """
    known = with_life(entries, life)
    if not known:
        return Book()
    alive = life if is_open(entries, life) else None
    end = max(known[-1].t, alive.t if alive else 0.0)
    spans = _Booking()
    for entry, then in itertools.pairwise([*known, TimeEntry(end, "stopped", alive.entry.step if alive else None)]):
        spans.add(entry, then)
    return Book(spans.with_legs(), alive)


@dataclass
class _Piece:
    """A span whose training can still be undone."""

    span: Span
    first: int  # steps completed when it began
    last: int  # and when it ended
    leg: int | None


class _Booking:
    """Makes spans of entries, one after the other."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []
        self._top = 0
        # Steps and seconds of training, lost or not, in all (None) and by leg.
        self._steps: defaultdict[int | None, int] = defaultdict(int)
        self._seconds: defaultdict[int | None, float] = defaultdict(float)

    def add(self, entry: TimeEntry, then: TimeEntry) -> None:
        """Add the span between two entries."""
        if entry.step is not None and entry.step < self._top:
            self._undo(entry.step)
        first = entry.step if entry.step is not None else self._top
        last = max(first, then.step if then.step is not None else first)
        end = then.t
        if entry.state == "training" and then.state == "waiting" and then.stepped is not None:
            end = min(then.t, max(entry.t, then.stepped))
        self._put(Span(entry.state, entry.t, end, within=entry.within), first, last, entry.leg)
        if end < then.t:
            self._put_rest(end, then.t, last, entry.leg)
        if entry.state == "training":
            self._top = last

    def _put(self, span: Span, first: int, last: int, leg: int | None) -> None:
        if span.end <= span.begin:
            return
        self._pieces.append(_Piece(span, first, last, leg))
        if span.state == "training" and last > first:
            for key in {None, leg}:
                self._steps[key] += last - first
                self._seconds[key] += span.seconds.get("training", 0.0)

    def _put_rest(self, begin: float, end: float, step: int, leg: int | None) -> None:
        """Book what follows on the last step of a leg that failed: a part of a step, then nobody had noticed yet."""
        known = leg if self._steps[leg] else None
        each = self._seconds[known] / self._steps[known] if self._steps[known] else math.inf
        cut = min(end, begin + each)
        self._put(Span("lost", begin, cut), step, step, leg)
        self._put(Span("waiting", cut, end), step, step, leg)

    def _undo(self, step: int) -> None:
        """Book training beyond `step` as lost."""
        # Steps rise along what is still training, so what is undone lies at the end.
        begin = len(self._pieces)
        while begin and not (self._pieces[begin - 1].span.state == "training" and self._pieces[begin - 1].last <= step):
            begin -= 1
        kept = self._pieces[:begin]
        for piece in self._pieces[begin:]:
            span = piece.span
            if span.state != "training":
                kept.append(piece)
                continue
            share = max(0.0, (step - piece.first) / (piece.last - piece.first)) if piece.last > piece.first else 0.0
            cut = span.begin + share * (span.end - span.begin)
            parts = [(part, {key: value * part for key, value in span.within.items()}) for part in (share, 1 - share)]
            if share > 0:
                before = replace(span, end=cut, within=parts[0][1])
                kept.append(_Piece(before, piece.first, step, piece.leg))
            after = replace(span, state="lost", begin=cut, within=parts[1][1])
            kept.append(_Piece(after, max(step, piece.first), piece.last, piece.leg))
        self._pieces, self._top = kept, step

    def with_legs(self) -> tuple[Span, ...]:
        """Return the spans; what lies between legs belongs to the later one."""
        numbers = [piece.leg for piece in self._pieces if piece.leg is not None]
        later = max(numbers, default=-1) + 1
        found: list[Span] = []
        for piece in reversed(self._pieces):
            later = piece.leg if piece.leg is not None else later
            trained = piece.span.state in ("training", "lost")
            found.append(replace(piece.span, leg=later, steps=piece.last - piece.first if trained else 0))
        return tuple(reversed(found))


def compact(entries: Sequence[TimeEntry], limit: int = CARRIED) -> list[TimeEntry]:
    """Return fewer entries whose seconds add up to the same: short stays in another state are put into `within`.

    Args:
        entries: by rising time.
        limit: number of them that is wanted. There are more where a run has so many legs.
    """
    found = list(entries)
    shortest = (found[-1].t - found[0].t) / limit if found else 0.0
    while len(found) > limit and shortest > 0:
        shorter = _merged(found, shortest)
        if len(shorter) == len(found) and shortest > found[-1].t - found[0].t:
            break
        found, shortest = shorter, shortest * 2
    return found


def _merged(entries: Sequence[TimeEntry], shortest: float) -> list[TimeEntry]:
    found: list[TimeEntry] = []
    index = 0
    while index < len(entries):
        entry = entries[index]
        ahead = entries[index + 1 : index + 4]
        if len(ahead) == 3 and found and _is_stay(found[-1], entry, ahead[0]) and ahead[0].t - entry.t < shortest:
            # found[-1] goes on at ahead[0]: the stay between them and what that one holds become a part of it.
            stay = Span(entry.state, entry.t, ahead[0].t, within=entry.within).seconds
            found[-1] = replace(found[-1], within=_sums(found[-1].within, stay, ahead[0].within))
            index += 2
            continue
        found.append(entry)
        index += 1
    return found


def _is_stay(before: TimeEntry, entry: TimeEntry, after: TimeEntry) -> bool:
    return (
        before.state == after.state == "training"
        and entry.state not in CLOSING
        and before.leg == entry.leg == after.leg
        and (before.step or 0) <= (entry.step or 0) == (after.step or 0)
    )


def _total(spans: Iterable[Span]) -> dict[str, float]:
    sums = _sums(*(span.seconds for span in spans))
    return {state: sums[state] for state in STATES if sums.get(state, 0.0) > 0}


def _sums(*parts: Mapping[str, float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in parts:
        for state, seconds in part.items():
            sums[state] = sums.get(state, 0.0) + seconds
    return sums


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
