"""Keep the time book of a run: what state it is in from when on, by one short line for each change.

Two files lie in the run directory: `time_book.jsonl`, to which the process that speaks and the launcher append, and
`time_book.alive`, which that process overwrites in place each second, so that a kill is booked to a second. The book is
a side channel: a disk that is full never ends a run, and what could not be written is later `unknown`.

    note_start(run_dir)                 # the launcher, at each start of the run's processes
    with keep(run_dir, leg) as book:    # in the process that speaks: follows `distributed.standing`
        book.ends_as = "stopped"
    note_end(run_dir, "waiting")        # the launcher, where that process was killed

`observe.time_spans.read_book` says what became of every second.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator import stopping
from orchestrator.distributed import standing
from orchestrator.errors import STOPPED
from orchestrator.observe.sink import Appended, Channel
from orchestrator.observe.time_spans import (
    ALIVE,
    BOOK,
    CLOSING,
    Book,
    Life,
    TimeEntry,
    compact,
    in_order,
    is_open,
    make_book,
    read_entries,
    read_life,
    rounded,
    with_life,
)
from orchestrator.runs.messages import warn

BEAT_SECONDS = 1.0
_STATES = {standing.ENDING: "saving"}  # most of it is the wait for the last save
_RECORD_BYTES = 256  # of a sign of life: always as many, so that it goes over the last one


class TimeBook:
    """The book of one leg, kept by the process that speaks.

    Args:
        run_dir: the run's directory; None for a process that keeps no book: it may be told everything all the same.
        leg: which start of the run this is.

    Attributes:
        step: optimizer steps completed.
        state: the present one.
        ends_as: the state that follows on the leg: `stopped` where it did what was asked of it, else `waiting`.
    """

    def __init__(self, run_dir: Path | None = None, leg: int = 0):
        self._run_dir, self._leg = run_dir, leg
        self.step: int | None = None
        self.state, self.ends_as = "starting", "waiting"
        self._stepped: float | None = None
        self._wall, self._ticks = time.time(), time.monotonic()
        self._lock = threading.RLock()
        self._entries: list[TimeEntry] = []
        self._channel: Channel[TimeEntry] | None = None
        self._waits: list[TimeEntry] = []
        self._closed = threading.Event()
        if run_dir is not None:
            if not (entries := read_entries(run_dir)) or entries[-1].state != "starting":
                note_start(run_dir, process_began())
                entries = read_entries(run_dir)
            self._entries = entries
            self._file = Appended(run_dir / BOOK)
            self._channel = Channel(BOOK, self._write, warn, unit="entries")

    def enter(self, state: str, step: int | None = None) -> None:
        """Change the state.

        Args:
            state: one of `observe.time_spans.STATES`.
            step: optimizer steps completed; a smaller number than before means that the training beyond it is lost.
        """
        with self._lock:
            again = step is not None and self.step is not None and step < self.step
            if self._closed.is_set() or (state == self.state and not again):
                return
            self.state, self.step = state, step if step is not None else self.step
            self._put(TimeEntry(self._now(), state, self.step, self._leg))

    def follow(self) -> None:
        """Take over state and steps from where this process stands (`distributed.standing`)."""
        standing.here.moved.append(self._moved)
        standing.here.heard.append(self._completed)

    def leave(self) -> None:
        """End `follow`."""
        for listeners, ours in ((standing.here.moved, self._moved), (standing.here.heard, self._completed)):
            with contextlib.suppress(ValueError):
                listeners.remove(ours)

    def _moved(self) -> None:
        phase = standing.here.phase
        # Before a checkpoint is restored the number of steps says nothing.
        step = None if phase in (standing.STARTING, standing.LOADING) else standing.here.step
        self.enter(_STATES.get(phase, phase), step)

    def _completed(self) -> None:
        """Note that a step is completed: of each step, so that it must cost nothing."""
        step, before = standing.here.step, self.step
        self._stepped = time.monotonic()
        if before is not None and step < before:
            self.enter(self.state, step)
        self.step = step

    def close(self) -> None:
        """End the leg. Later calls change nothing."""
        with self._lock:
            if self._closed.is_set():
                return
            stepped = None if self._stepped is None else self._wall + self._stepped - self._ticks
            self._put(TimeEntry(self._now(), self.ends_as, self.step, stepped=stepped))
            self._closed.set()
            if self._channel is not None:
                self._channel.close()

    def book(self) -> Book:
        """Return what became of every second of the run until now."""
        with self._lock:
            known = in_order(self._entries)
            return make_book(known, None if self._closed.is_set() else self._life())

    def carried(self) -> list[dict[str, Any]]:
        """Return the entries that travel in a checkpoint, as JSON data; fewer and longer ones of a long run."""
        with self._lock:
            self._entries = compact(self._entries)
            return [entry.to_dict() for entry in self._entries]

    def beat(self) -> None:
        """Write a sign of life; a disk that is full, or a directory that is gone, is no error."""
        if self._run_dir is None:
            return
        with self._lock, contextlib.suppress(OSError):
            if not self._closed.is_set():
                _write_life(self._run_dir, self._life())

    def keep_beating(self) -> None:
        """Write signs of life until the book is closed."""
        while not self._closed.wait(BEAT_SECONDS):
            self.beat()
            if self._waits and self._channel is not None:
                self._channel.retry()

    def _life(self) -> Life:
        stepped = None if self._stepped is None else self._wall + self._stepped - self._ticks
        last = self._entries[-1] if self._entries else TimeEntry(self._now(), self.state)
        entry = TimeEntry(last.t, self.state, self.step, self._leg, stepped)
        return Life(self._now(), entry, self._waits[0].t if self._waits else None)

    def _put(self, entry: TimeEntry) -> None:
        if self._channel is not None:
            self._entries.append(entry)
            self._waits.append(entry)
            self._channel.put([entry])

    def _write(self, entries: Sequence[TimeEntry]) -> None:
        self._file.append(b"".join(_line(entry) for entry in entries), newline_before=True)
        self._waits = [entry for entry in self._waits if entry not in entries]

    def _now(self) -> float:
        # By the clock that nobody sets, so that no span is negative.
        return self._wall + time.monotonic() - self._ticks


@contextlib.contextmanager
def keep(run_dir: Path | None, leg: int) -> Iterator[TimeBook]:
    """Keep the book of a leg until the end of the block.

    Args:
        run_dir: the run's directory; None for a process that keeps no book.
        leg: which start of the run this is.
    """
    book, thread = TimeBook(run_dir, leg), None
    if run_dir is not None:
        thread = threading.Thread(target=book.keep_beating, name="time book", daemon=True)
        thread.start()
        book.follow()
    try:
        yield book
    except stopping.Stopped as stop:
        book.ends_as = "stopped" if stop.exit_code in STOPPED else "waiting"
        raise
    finally:
        book.leave()
        book.close()
        if thread is not None:
            thread.join(BEAT_SECONDS)


def note_start(run_dir: Path, began: float | None = None, carried: Sequence[TimeEntry] = ()) -> None:
    """Book that the processes of a run are started; a leg that was killed before is ended first.

    Args:
        run_dir: the run's directory.
        began: when, in seconds since the epoch; None: now.
        carried: entries that came with the checkpoint that it goes on from; those that are newer than what the run
            directory has are taken over.
    """
    entries = read_entries(run_dir)
    last = entries[-1].t if entries else 0.0
    newer = [entry for entry in carried if entry.t > last]  # the run went on elsewhere
    added = sorted([*_ending(entries, read_life(run_dir), "waiting", None), *newer], key=lambda entry: entry.t)
    if newer and added[-1].state not in CLOSING:
        # What it did there beyond that checkpoint nobody here knows.
        added.append(TimeEntry(added[-1].t, "unknown"))
    added.append(TimeEntry(time.time() if began is None else began, "starting"))
    _append(run_dir, in_order([*entries[-1:], *added])[len(entries[-1:]) :])


def note_end(run_dir: Path, state: str) -> None:
    """End the last leg in the book, if the process that keeps it was killed before it could.

    Args:
        run_dir: the run's directory.
        state: `waiting` after a failure, `stopped` where that was asked for.
    """
    _append(run_dir, _ending(read_entries(run_dir), read_life(run_dir), state, time.time()))


def _ending(entries: Sequence[TimeEntry], life: Life | None, state: str, now: float | None) -> list[TimeEntry]:
    """Return the entries that end the last leg: with its last sign of life; without one, now or with its last entry."""
    if not entries or entries[-1].state in CLOSING:
        return []
    if life is None or not is_open(entries, life):
        return [TimeEntry(entries[-1].t if now is None else now, state)]
    known = with_life(entries, life)[len(entries) :]
    return [*known, TimeEntry(life.t, state, life.entry.step, stepped=life.entry.stepped)]


def booked(facts: dict[str, Any], book: Book) -> dict[str, Any]:
    """Return the facts of run.json with `goodput` of the run and `seconds` by state of each leg.

    Args:
        facts: of the run, with its `legs`.
        book: of the run.
    """
    if not book.spans:
        return facts
    by_leg = book.legs
    legs = [
        {**leg, "seconds": rounded(by_leg[number])} if (number := leg.get("leg", index)) in by_leg else leg
        for index, leg in enumerate(facts.get("legs", ()))
    ]
    return {**facts, "goodput": book.facts(), "legs": legs}


def process_began() -> float:
    """Return when this process was started, in seconds since the epoch; now, where the system does not tell."""
    now = time.time()
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        # Field 22 of stat: clock ticks since the system's start; the name in field 2 may hold anything.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return now - max(0.0, age)
    return now


def _append(run_dir: Path, entries: Sequence[TimeEntry]) -> None:
    if entries:
        with contextlib.suppress(OSError):
            Appended(run_dir / BOOK).append(b"".join(_line(entry) for entry in entries), newline_before=True)


def _line(entry: TimeEntry) -> bytes:
    return json.dumps(entry.to_dict()).encode() + b"\n"


def _write_life(run_dir: Path, life: Life) -> None:
    data = {"t": round(life.t, 3), "entry": life.entry.to_dict()}
    data |= {} if life.missing is None else {"missing": round(life.missing, 3)}
    text = json.dumps(data).encode().ljust(_RECORD_BYTES - 1) + b"\n"
    # Opened each time, so that other hosts see it; written at one go over the last one, which takes no room.
    file = os.open(run_dir / ALIVE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.pwrite(file, text, 0)
    finally:
        os.close(file)
