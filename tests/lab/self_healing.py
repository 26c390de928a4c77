"""The campaign of faults: runs that heal themselves are hurt in many ways, and nobody helps.

Counted are runs that need a person, commits that are lost, weights that differ from those of a run that nobody hurt,
and for each kind of fault how long the run stood still beyond a start, which is measured in the same session.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.checkpoint.storage import children, is_remote, read_bounded
from orchestrator.observe.time_spans import Book, read_book
from tests.lab.fault_kinds import KINDS, Scene
from tests.lab.forked_product import preload_all
from tests.lab.goodput_check import of_a_campaign
from tests.lab.healing_run import STEPS, HealingRun, Lost, NeedsPerson, small_disk
from tests.lab.namespaces import Loopback, NoNamespaces
from tests.lab.store import S3Store, reachable, serve
from tests.lab.tensors import read_all

_DISK_MEGABYTES = 8
_FAULTS_OF_A_RUN = 12
_LAST_STEPS = 30  # of a run, in which no fault is begun
_MEAN_STEPS, _MOST_STEPS = 12, 60  # between faults: exponential times, which the planner takes too
_MEASURED_EVERY = 100  # faults: starts are measured before them, of the same load
_STARTS = 2  # that are measured each time


@dataclass
class Fault:
    """A fault that was done.

    Attributes:
        kind: one of `KINDS`.
        run: number of the run.
        step: the last one before it.
        seconds: from the fault to the first step after it.
        start: which start that was.
        redone: steps that were trained a second time.
    """

    kind: str
    run: int
    step: int
    seconds: float
    start: str
    redone: int


@dataclass
class Tally:
    """What has happened so far.

    Attributes:
        starts: seconds of starts: of the `workers`, of the launcher and all (`all`), by an agent (`torchrun`).
        faults: all that were done.
        runs: that came to their end, with run.json's goodput of each.
        books: of these runs.
        clocks: seconds of these runs by the campaign's own clock.
        delays: seconds from the last step of a save to its commit.
        needs_person: what was said where a run did not go on by itself.
        lost: what was lost.
        different: runs whose final weights are not those of the reference.
        left_out: kinds that this machine does not permit, with the reason.
    """

    starts: dict[str, list[float]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    books: list[Book] = field(default_factory=list)
    clocks: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    needs_person: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        names = ("starts", "runs", "needs_person", "lost", "different", "left_out")
        return {
            **{name: getattr(self, name) for name in names},
            "faults": [{**asdict(fault), "beyond": self.beyond(fault)} for fault in self.faults],
            "kinds": {kind: self.row(kind) for kind in KINDS},
            "beyond_bound": self.beyond_bound(),
            "books_off": self.books_off(),
            "goodput": dict(zip(("measured", "expected"), self.goodput() or (None, None), strict=True)),
        }

    def start(self, name: str) -> float:
        """Return the median seconds of a start; 0 of what is none."""
        if name == "twice":
            return 2 * self.start("workers")
        return statistics.median(self.starts[name]) if name in self.starts else 0.0

    def beyond(self, fault: Fault) -> float:
        """Return a fault's seconds without the start that is in them and the declared time-out."""
        return fault.seconds - self.start(fault.start) - KINDS[fault.kind].noticed

    def beyond_bound(self) -> list[str]:
        """Return the kinds whose median is beyond what is promised."""
        rows = {kind: self.row(kind) for kind in KINDS}
        return [
            f"{kind}: {row['beyond']:.1f} s, at most {row['bound']:.1f} s are promised"
            for kind, row in rows.items()
            if row["faults"] and row["bound"] is not None and row["beyond"] > row["bound"]
        ]

    def books_off(self) -> float:
        """Return by which part the time of a run's book differs from the campaign's clock, at worst."""
        return max(
            (
                abs(sum(book.seconds.values()) - clock) / clock
                for book, clock in zip(self.books, self.clocks, strict=True)
            ),
            default=0.0,
        )

    def goodput(self) -> tuple[float, float] | None:
        """Return the goodput of all runs, measured and as the planner expects it; None where none was stopped."""
        if not self.delays:
            return None
        return of_a_campaign(self.books, statistics.fmean(self.delays))

    def row(self, kind: str) -> dict[str, Any]:
        """Return number, median and largest of a kind's seconds, and what is promised."""
        found = [fault for fault in self.faults if fault.kind == kind and fault.start != "ended"]
        seconds, beyond = sorted(fault.seconds for fault in found), sorted(self.beyond(fault) for fault in found)
        middle = len(found) // 2
        return {
            "faults": len(found),
            "seconds": seconds[middle] if found else None,
            "most": seconds[-1] if found else None,
            "beyond": beyond[middle] if found else None,
            "most_beyond": beyond[-1] if found else None,
            "bound": KINDS[kind].bound,
            "redone": sum(fault.redone for fault in found) / len(found) if found else None,
        }

    def lines(self) -> list[str]:
        """Return a table for a terminal."""
        head = (
            f"{'kind':34} {'faults':>6} {'seconds':>8} {'most':>7} {'beyond':>7} {'most':>7} {'bound':>6} {'redone':>7}"
        )
        found = [head]
        for kind in KINDS:
            row = self.row(kind)
            figures = [row[name] for name in ("seconds", "most", "beyond", "most_beyond", "bound", "redone")]
            texts = ["-" if figure is None else f"{figure:.1f}" for figure in figures]
            cells = zip(texts, (8, 7, 7, 7, 6, 7), strict=True)
            found.append(f"{kind:34} {row['faults']:6} " + " ".join(f"{text:>{width}}" for text, width in cells))
        return found


def campaign(
    folder: Path,
    faults: int,
    seed: int,
    report: Callable[[Tally], object],
    kinds: tuple[str, ...] = tuple(KINDS),
    steps: int = STEPS,
) -> Tally:
    """Do so many faults to as many runs as that takes.

    Args:
        folder: for the runs.
        faults: number of them, of all kinds in turn.
        seed: of what is done when; the machine's timing is its own.
        report: told after each fault.
        kinds: that are done.
        steps: of a run.
    """
    preload_all()
    chance, tally = random.Random(seed), Tally()
    with _store() as (environment, store):
        wanted = _reference(folder / "reference", steps)
        waiting = _deck(faults, kinds, chance)
        number, measured = 0, 0
        while any(waiting.values()):
            if len(tally.faults) >= measured * _MEASURED_EVERY:
                _measure_starts(folder / f"starts-{measured}", kinds, tally)
                measured += 1
            setting = max(waiting, key=lambda name: len(waiting[name]))
            number += 1
            about = f"run {number} ({setting})"
            place = folder / f"run-{number}"
            with contextlib.ExitStack() as opened:
                try:
                    scene = _scene(place, setting, chance, environment, store, opened, steps)
                except (NoNamespaces, PermissionError) as reason:
                    tally.left_out |= {kind: str(reason) for kind in waiting[setting]}
                    waiting[setting].clear()
                    continue
                try:
                    _hurt(scene, waiting[setting], number, tally, report)
                    _compare(scene.run, wanted, about, tally)
                except NeedsPerson as problem:
                    tally.needs_person.append(f"{about}: {problem}")
                except Lost as problem:
                    tally.lost.append(f"{about}: {problem}")
                report(tally)
            if not (tally.needs_person or tally.lost or tally.different):
                shutil.rmtree(place)
    return tally


def _deck(faults: int, kinds: tuple[str, ...], chance: random.Random) -> dict[str, list[str]]:
    deck = (list(kinds) * math.ceil(faults / len(kinds)))[:faults]
    chance.shuffle(deck)
    waiting: dict[str, list[str]] = {"local": [], "store": [], "torchrun": []}
    for kind in deck:
        waiting[KINDS[kind].setting].append(kind)
    return waiting


def _scene(
    place: Path,
    setting: str,
    chance: random.Random,
    environment: dict[str, str],
    store: Connection,
    opened: contextlib.ExitStack,
    steps: int,
) -> Scene:
    if setting == "store":
        run = HealingRun(place, environment=environment, checkpoints=f"s3://bucket/{place.name}", steps=steps)
        scene = Scene(run, chance, store=store)
    elif setting == "torchrun":
        scene = Scene(HealingRun(place, "torchrun", steps=steps), chance)
    else:
        disk = opened.enter_context(small_disk(place / "disk", _DISK_MEGABYTES))
        network = Loopback()
        opened.callback(network.close)
        run = HealingRun(place, environment=network.variables, enter=network.enter, checkpoints=str(disk), steps=steps)
        scene = Scene(run, chance, disk, network)
    opened.callback(scene.run.end)
    return scene


def _hurt(scene: Scene, waiting: list[str], number: int, tally: Tally, report: Callable[[Tally], object]) -> None:
    """Do the next faults to a run, until it has had enough of them or nears its end; then let it end."""
    run = scene.run
    run.start()
    done = 0
    while waiting and done < _FAULTS_OF_A_RUN and run.reached() < run.last_step - _LAST_STEPS:
        _wait_for_steps(run, min(_MOST_STEPS, 1 + int(scene.chance.expovariate(1 / _MEAN_STEPS))))
        if run.code == 0:
            break
        kind, step = waiting.pop(), run.reached()
        stood = KINDS[kind].act(scene)
        if stood.start == "ended":
            waiting.append(kind)
            break
        done += 1
        tally.faults.append(Fault(kind, number, step, stood.seconds, stood.start, stood.redone))
        run.check_commits()
        report(tally)
    run.hurry()
    run.wait(lambda: False)


def _wait_for_steps(run: HealingRun, steps: int) -> None:
    """Wait until the present workers have completed so many more steps."""
    before = time.monotonic()

    def enough() -> bool:
        present = run.worker(0)[0]
        return len([line for line in run.lines() if line[1] > before and line[2] == present]) >= steps

    run.wait(enough)


def _reference(place: Path, steps: int) -> dict[str, torch.Tensor]:
    """Return the weights of a run that nobody disturbs."""
    run = HealingRun(place, steps=steps)
    run.hurry()
    run.start()
    try:
        run.wait(lambda: False)
        return _tensors(run)
    finally:
        run.end()


def _measure_starts(place: Path, kinds: tuple[str, ...], tally: Tally) -> None:
    """Measure starts by launcher and agent: a run is asked to stop, started again, and goes on from its checkpoint."""
    agents = any(KINDS[kind].setting == "torchrun" for kind in kinds)
    for engine in ("launcher", *(["torchrun"] if agents else [])):
        run = HealingRun(place / engine, engine)
        run.start()
        try:
            for _ in range(_STARTS):
                whole, workers = _start_again(run)
                named = {"all": whole, "workers": workers} if engine == "launcher" else {"torchrun": whole}
                for name, seconds in named.items():
                    tally.starts.setdefault(name, []).append(seconds)
        finally:
            run.end()


def _start_again(run: HealingRun) -> tuple[float, float]:
    """Return seconds from the command, and from the start of a worker, to its first step."""
    _wait_for_steps(run, 4)
    starts = run.starts
    run.signal(signal.SIGTERM, run.pid)
    run.wait(lambda: run.starts > starts)
    line = run.wait(lambda: next((one for one in run.lines() if one[1] > run.started_at), None))
    return line[1] - run.started_at, line[1] - run.worker(0)[1]


def _compare(run: HealingRun, wanted: dict[str, torch.Tensor], about: str, tally: Tally) -> None:
    newest = run.check_commits()
    found = _tensors(run)
    names = [name for name in wanted if name not in found or not torch.equal(found[name], wanted[name])]
    if newest != run.last_step or names or found.keys() != wanted.keys():
        tally.different.append(f"{about}: step {newest}, {', '.join(names[:3])}")
    facts = run.facts()
    kept = ("goodput", "restarts", "attempts", "status")
    book, clock = read_book(run.run_dir), run.lived[1] - run.lived[0]
    booked = {
        "clock_seconds": clock,
        "booked_seconds": sum(book.seconds.values()),
        "before_book": book.spans[0].begin - run.lived[0],
        "after_book": run.lived[1] - book.spans[-1].end,
    }
    tally.runs.append({"run": about, "starts": run.starts, **booked, **{key: facts.get(key) for key in kept}})
    tally.books.append(book)
    tally.clocks.append(clock)
    tally.delays += run.delays


def _tensors(run: HealingRun) -> dict[str, torch.Tensor]:
    newest = committed(run.kept)[0]
    if not is_remote(newest):
        return read_all(newest)
    with tempfile.TemporaryDirectory() as folder:
        for path in children(newest):
            (Path(folder) / path.name).write_bytes(read_bounded(path, 1 << 30))
        return read_all(Path(folder))


@contextlib.contextmanager
def _store() -> Iterator[tuple[dict[str, str], Connection]]:
    """Serve objects from a process of its own: what is forked here must not have its threads."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    url = ours.recv()
    described = S3Store()
    described.url = url
    try:
        with reachable(described):
            yield described.environment, ours
    finally:
        process.kill()
        process.join()


def _serve(commands: Connection) -> None:
    with serve("s3") as store:
        commands.send(store.url)
        while True:
            text = commands.recv()
            store.faults.clear()
            if text == "hold":
                store.fail(".", status=503, hold_seconds=4.0)
            elif text != "well":
                store.fail(".", status=int(text))
            commands.send(text)
