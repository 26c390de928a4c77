"""Kinds of faults that a run heals by itself: each is done to a `HealingRun`, and says how long the run stood still."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tests.lab.healing_run import RANKS, TIMEOUT_SECONDS, HealingRun, fill
from tests.lab.namespaces import Loopback

_AFTERWARDS = 4  # steps that show that a run goes on
_OUTAGE_SECONDS = 2.5


@dataclass
class Scene:
    """A run, and what around it can be made to fail.

    Attributes:
        run: the run.
        chance: of this campaign.
        disk: where its checkpoints are, if that is a small file system.
        network: over which its ranks speak, if that can be cut.
        store: takes the commands of a server of objects (`tests.lab.self_healing`), if its checkpoints are in one.
    """

    run: HealingRun
    chance: random.Random
    disk: Path | None = None
    network: Loopback | None = None
    store: Connection | None = None

    def victim(self) -> int:
        return self.run.worker(self.chance.randrange(RANKS))[0]


@dataclass(frozen=True)
class Stood:
    """How long a run stood still.

    Attributes:
        seconds: from the fault to the first step after it.
        start: which start is in them: of the `workers`, of the launcher and all (`all`), of the agent or its workers
            with their rendezvous (`torchrun`), or none.
        redone: steps that were trained a second time.
    """

    seconds: float
    start: str
    redone: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        act: does it and waits until the run goes on.
        setting: of runs that it can be done to.
        bound: seconds beyond the start and the declared time-out that it may cost at most; None where none is promised.
        noticed: seconds that are declared for noticing it.
    """

    act: Callable[[Scene], Stood]
    setting: str = "local"
    bound: float | None = None
    noticed: float = 0.0
    note: str = field(default="", compare=False)


def kill_rank(scene: Scene) -> Stood:
    """SIGKILL one rank."""
    return _until_restarted(scene, lambda: scene.run.signal(signal.SIGKILL, scene.victim()), "workers")


def kill_launcher(scene: Scene) -> Stood:
    """SIGKILL the launcher, or torchrun's agent; its engine gives the command again."""
    return _until_restarted(scene, lambda: scene.run.signal(signal.SIGKILL, scene.run.pid), "all")


def hang(scene: Scene) -> Stood:
    """SIGSTOP one rank, for ever."""
    return _until_restarted(scene, lambda: scene.run.signal(signal.SIGSTOP, scene.victim()), "workers")


def cut_network(scene: Scene) -> Stood:
    """Nothing passes between the ranks, for longer than the declared time-out."""
    network = scene.network
    assert network

    def cut() -> None:
        network.cut()

    def mend() -> None:
        if time.monotonic() - begin > TIMEOUT_SECONDS + 1.0:
            network.mend()

    begin = time.monotonic()
    try:
        return _until_restarted(scene, cut, "workers", mend)
    finally:
        network.mend()


def slow_rank(scene: Scene) -> Stood:
    """A rank that is suspended most of the time, for some seconds."""
    victim, run = scene.victim(), scene.run

    def slowed() -> None:
        end = time.monotonic() + _OUTAGE_SECONDS
        while time.monotonic() < end:
            for number, seconds in ((signal.SIGSTOP, 0.2), (signal.SIGCONT, 0.04)):
                run.signal(number, victim)
                time.sleep(seconds)

    return _through(scene, slowed)


def full_disk(scene: Scene) -> Stood:
    """No room for checkpoints, for some seconds."""
    assert scene.disk
    filler = fill(scene.disk)

    def wait() -> None:
        scene.run.wait(lambda: time.monotonic() - begin > _OUTAGE_SECONDS)
        filler.unlink()

    begin = time.monotonic()
    return _through(scene, wait)


def store_fails(scene: Scene) -> Stood:
    """A store that refuses, cuts connections, or does not answer, for some seconds."""
    how = scene.chance.choice(["503", "0", "hold"])

    def wait() -> None:
        _tell(scene, how)
        begin = time.monotonic()
        scene.run.wait(lambda: time.monotonic() - begin > _OUTAGE_SECONDS)
        _tell(scene, "well")

    return _through(scene, wait)


def kill_while_the_store_fails(scene: Scene) -> Stood:
    """Two at once: a rank is killed when the store refuses everything, and the restart finds it so."""
    begin = time.monotonic()
    mended = [False]

    def act() -> None:
        _tell(scene, "503")
        scene.run.signal(signal.SIGKILL, scene.victim())

    def mend() -> None:
        if not mended[0] and time.monotonic() - begin > _OUTAGE_SECONDS:
            mended[0] = True
            _tell(scene, "well")

    try:
        return _until_restarted(scene, act, "workers", mend)
    finally:
        _tell(scene, "well")


def two_at_once(scene: Scene) -> Stood:
    """Both ranks; one is suspended and the other killed; the launcher and a rank; a full disk and a rank."""
    run, (first, second) = scene.run, scene.run.workers()
    pair = scene.chance.choice(["both", "stopped and killed", "launcher and rank", "launcher and stopped", "disk"])
    if pair == "disk":
        assert scene.disk
        filler = fill(scene.disk)
        try:
            return _until_restarted(scene, lambda: run.signal(signal.SIGKILL, second), "workers")
        finally:
            filler.unlink()

    def act() -> None:
        if pair == "stopped and killed":
            run.signal(signal.SIGSTOP, first)
        if pair == "launcher and stopped":
            run.signal(signal.SIGSTOP, second)
        if pair.startswith("launcher"):
            run.signal(signal.SIGKILL, run.pid)
        if pair != "launcher and stopped":
            run.signal(signal.SIGKILL, *([first, second] if pair == "both" else [second]))

    return _until_restarted(scene, act, "all" if pair.startswith("launcher") else "workers")


def in_the_restart(scene: Scene) -> Stood:
    """Kill a rank, and another one as soon as its successor is being started."""
    run, old = scene.run, scene.run.workers()
    begin, before = time.monotonic(), run.reached()
    run.signal(signal.SIGKILL, scene.victim())
    run.wait(lambda: any(pid not in old for pid in run.workers()))
    time.sleep(scene.chance.uniform(0.0, 1.0))
    second = next((pid for pid in run.workers() if pid not in old), 0)
    stood = _until_restarted(scene, lambda: run.signal(signal.SIGKILL, second), "workers")
    start = "ended" if stood.start == "ended" else "twice"
    return Stood(time.monotonic() - begin, start, max(0, before - run.check_commits()))


KINDS = {
    "kill a rank": Kind(kill_rank, bound=5.0),
    "kill the launcher": Kind(kill_launcher, bound=5.0),
    "hang (SIGSTOP)": Kind(hang, bound=5.0, noticed=TIMEOUT_SECONDS),
    "cut the network": Kind(cut_network, bound=5.0, noticed=TIMEOUT_SECONDS),
    "slow rank": Kind(slow_rank),
    "full disk": Kind(full_disk),
    "two at once": Kind(two_at_once),
    "in the restart": Kind(in_the_restart),
    "store errors": Kind(store_fails, "store"),
    "store errors, and a rank killed": Kind(kill_while_the_store_fails, "store"),
    "kill the agent (torchrun)": Kind(kill_launcher, "torchrun", bound=5.0),
    "kill a rank (torchrun)": Kind(kill_rank, "torchrun", bound=5.0),
}


def _tell(scene: Scene, text: str) -> None:
    assert scene.store
    scene.store.send(text)
    scene.store.recv()


def _until_restarted(
    scene: Scene, act: Callable[[], object], start: str, meanwhile: Callable[[], object] = lambda: None
) -> Stood:
    """Act, and wait for a step of a process that was not there before."""
    run, old, before = scene.run, set(scene.run.workers()), scene.run.reached()
    begin = time.monotonic()
    act()

    def first() -> tuple[int, float, int] | None:
        meanwhile()
        return next((line for line in run.lines() if line[1] > begin and line[2] not in old), None)

    line = run.wait(first)
    if not line:  # it has come to its end before it could be hurt
        return Stood(0.0, "ended")
    # What the agent starts is a whole program, which meets the others and plans, whichever of them was killed.
    start = "torchrun" if run.engine == "torchrun" else start
    return Stood(line[1] - begin, start, max(0, before - line[0] + 1))


def _through(scene: Scene, act: Callable[[], object]) -> Stood:
    """Act, and wait for some steps after it; what is lost is the time beyond what these steps take."""
    run, old = scene.run, set(scene.run.workers())
    usual, begin, before = _step_seconds(run), time.monotonic(), run.reached()
    act()
    over, reached = time.monotonic(), run.reached()
    run.wait(lambda: run.reached() >= reached + _AFTERWARDS)
    lines = [line for line in run.lines() if line[1] > begin]
    last = next((line for line in lines if line[1] > over), lines[-1] if lines else (before, over, 0))
    restarted = any(line[2] not in old for line in lines)
    return Stood(max(0.0, last[1] - begin - usual * (last[0] - before)), "restarted" if restarted else "none")


def _step_seconds(run: HealingRun) -> float:
    times = [time for _, time, _ in run.lines()[-8:]]
    steps = sorted(after - before for before, after in itertools.pairwise(times))
    return steps[len(steps) // 2] if steps else 0.0
