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
from tests.lab.fault_kinds import KINDS, Scene, Stood
from tests.lab.forked_product import preload_all
from tests.lab.healing_run import STEPS, HealingRun, Lost, NeedsPerson, small_disk
from tests.lab.namespaces import Loopback, NoNamespaces
from tests.lab.store import S3Store, reachable, serve
from tests.lab.tensors import read_all

_DISK_MEGABYTES = 8
_FAULTS_OF_A_RUN = 8
_LAST_STEPS = 30  # of a run, in which no fault is begun


@dataclass
class Fault:
    """A fault that was done.

    Attributes:
        kind: one of `KINDS`.
        run: number of the run.
        step: the last one before it.
        seconds: from the fault to the first step after it.
        beyond: the same without the start that is in it and the declared time-out.
        start: which start that was.
        redone: steps that were trained a second time.
    """

    kind: str
    run: int
    step: int
    seconds: float
    beyond: float
    start: str
    redone: int


@dataclass
class Tally:
    """What has happened so far.

    Attributes:
        starts: median seconds of a start, of `workers` and of `all`.
        faults: all that were done.
        runs: that came to their end, with run.json's goodput of each.
        needs_person: what was said where a run did not go on by itself.
        lost: what was lost.
        different: runs whose final weights are not those of the reference.
        left_out: kinds that this machine does not permit, with the reason.
    """

    starts: dict[str, float] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    needs_person: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {**asdict(self), "kinds": {kind: self.row(kind) for kind in KINDS}}

    def row(self, kind: str) -> dict[str, Any]:
        """Return number, median and largest of a kind's seconds, and what is promised."""
        found = [fault for fault in self.faults if fault.kind == kind and fault.start != "ended"]
        seconds, beyond = sorted(fault.seconds for fault in found), sorted(fault.beyond for fault in found)
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
        tally.starts = _starts(folder / "starts")
        waiting = _deck(faults, kinds, chance)
        number = 0
        while any(waiting.values()):
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
        _wait_for_steps(run, scene.chance.randint(3, 9))
        if run.code == 0:
            break
        kind, step = waiting.pop(), run.reached()
        stood = KINDS[kind].act(scene)
        if stood.start == "ended":
            waiting.append(kind)
            break
        done += 1
        beyond = stood.seconds - _start_in(stood, tally) - KINDS[kind].noticed
        tally.faults.append(Fault(kind, number, step, stood.seconds, beyond, stood.start, stood.redone))
        run.check_commits()
        report(tally)
    run.hurry()
    run.wait(lambda: False)


def _start_in(stood: Stood, tally: Tally) -> float:
    return {"twice": 2 * tally.starts["workers"], **tally.starts}.get(stood.start, 0.0)


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


def _starts(place: Path) -> dict[str, float]:
    """Measure starts, of everything and of the workers alone: a run is asked to stop, and started again."""
    run = HealingRun(place)
    run.start()
    seconds: dict[str, list[float]] = {"all": [], "workers": []}
    try:
        for number in range(3):
            _wait_for_steps(run, 4)
            run.signal(signal.SIGTERM, run.pid)
            run.wait(lambda number=number: run.starts > number + 1)  # type: ignore[misc]
            line = run.wait(lambda: next((one for one in run.lines() if one[1] > run.started_at), None))  # type: ignore[misc]
            seconds["all"].append(line[1] - run.started_at)
            seconds["workers"].append(line[1] - run.worker(0)[1])
        return {name: sorted(found)[1] for name, found in seconds.items()}
    finally:
        run.end()


def _compare(run: HealingRun, wanted: dict[str, torch.Tensor], about: str, tally: Tally) -> None:
    newest = run.check_commits()
    found = _tensors(run)
    names = [name for name in wanted if name not in found or not torch.equal(found[name], wanted[name])]
    if newest != run.last_step or names or found.keys() != wanted.keys():
        tally.different.append(f"{about}: step {newest}, {', '.join(names[:3])}")
    facts = run.facts()
    kept = ("goodput", "restarts", "attempts", "status")
    tally.runs.append({"run": about, "starts": run.starts, **{key: facts.get(key) for key in kept}})


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
