"""Kill the islands of runs at random, stop one for good, bring it back, let a third one join: what becomes of the runs?

    python -m scripts.island_campaign [KILLS [SEED]]

1. Rounds (int8, two fragments, overlap), where the others wait: a run whose islands are killed KILLS times, every
   second time within an exchange, ends with the same bits as one that nobody disturbed.
2. The same with decoupled islands: every sequence is trained once, by one island.
3. An island stops for good, comes back after its data was given away, and a third one joins, by rounds and decoupled.

Islands are forked with their imports made: a start takes a second or two.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from orchestrator.islands.island_messages import Terms
from tests.lab.islands import LabRun

ROUNDS = Terms(inner_steps=5, fragments=2, overlap_steps=2, exchange="int8", lr=0.7, momentum=0.9)
ALONE = Terms("decoupled", inner_steps=5, fragments=2, overlap_steps=2, exchange="int8")
WORDS = ("train.sample.tokens=0", "checkpoint.handover.enabled=false")
SIZES = {"a": (1, ()), "b": (2, ("layout.fsdp=2",)), "c": (1, ())}
SLOWER = 0.05


def start(run: LabRun, name: str, slower: float) -> None:
    """Start an island, from what it has saved."""
    size, words = SIZES[name]
    run.start(name, *words, size=size, slower=slower)


def make(folder: Path, terms: Terms, steps: int, **settings: float) -> LabRun:
    """Make a run of two islands that saves often."""
    chosen = {"patience_seconds": 1e6, "timeout_seconds": 3.0, **settings}
    shares = {"a": 1.0, "b": 1.0}
    return LabRun(folder, terms, (*WORDS, f"train.max_steps={steps}"), shares, chosen, save_every=10)


def undisturbed(folder: Path, terms: Terms, steps: int) -> dict[str, bytes]:
    """Return the outer weights of a run that nobody disturbs."""
    run = make(folder, terms, steps)
    start(run, "a", 0.0), start(run, "b", 0.0)
    run.finish(600)
    return {name: array.tobytes() for name, array in run.outer().items()}


def killed(run: LabRun, kills: int, chance: random.Random) -> Counter[str]:
    """Kill islands so often. Returns in what they were."""
    found: Counter[str] = Counter()
    start(run, "a", SLOWER), start(run, "b", SLOWER)
    begun = time.monotonic()
    for number in range(kills):
        name = chance.choice("ab")
        if number % 2:  # within an exchange: as soon as one is under way
            seen = len(run.notes("exchange"))
            _until(lambda seen=seen: len(run.notes("exchange")) > seen, 8)
            time.sleep(chance.uniform(0, 0.03))
        else:
            time.sleep(chance.uniform(0.2, 2.5))
        if not run.islands[name].alive:
            break  # the run is over
        run.islands[name].kill()
        found["within an exchange" if number % 2 else "at any time"] += 1
        start(run, name, SLOWER)
        print(f"\r{sum(found.values())} of {kills} kills, {time.monotonic() - begun:.0f} s", end="", flush=True)
    print()
    return found


def _until(there: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline:
        time.sleep(0.01)


def changing(folder: Path, terms: Terms) -> LabRun:
    """One island stops for good, comes back after its data was given away, and a third one joins."""
    run = make(folder, terms, 160, patience_seconds=2.0)
    start(run, "a", SLOWER), start(run, "b", SLOWER)
    _until(lambda: len(run.notes("saved")) > 1, 60)
    run.islands.pop("b").kill()
    _until(lambda: bool(run.notes("gone")), 60)
    start(run, "c", SLOWER)
    _until(lambda: len(run.notes("welcome")) > 2, 60)
    start(run, "b", SLOWER)
    run.finish(600)
    return run


def show(what: str, run: LabRun) -> bool:
    """Say what a run has come to. Returns whether it is as it should be."""
    ledger = run.ledger()
    booked = {name: sum(stop - start for start, stop in ranges) for name, ranges in ledger["booked"].items()}
    starts = Counter(note["start"] for note in run.notes("welcome"))
    print(f"{what}: ledger {ledger['problems'] or 'every sequence once'}, {booked}, starts {dict(starts)}")
    return not ledger["problems"] and sum(booked.values()) == ledger["total"]


def main(words: list[str]) -> int:
    """Run all of it. Returns 1 where something was lost or differs."""
    kills, seed = (int(word) for word in (*words, *("50", "0")[len(words) :]))
    chance, good = random.Random(seed), True
    with tempfile.TemporaryDirectory(prefix="islands-") as folder:
        steps = 40 + 8 * kills
        expected = undisturbed(Path(folder) / "undisturbed", ROUNDS, steps)
        for name, terms in (("rounds", ROUNDS), ("decoupled", ALONE)):
            run = make(Path(folder) / name, terms, steps)
            try:
                found = killed(run, kills, chance)
                run.finish(900)
                good &= show(f"{name}, killed {dict(found)}", run)
                if name == "rounds":
                    same = expected == {tensor: array.tobytes() for tensor, array in run.outer().items()}
                    print(f"  {'bitwise as' if same else 'OTHER WEIGHTS THAN'} undisturbed")
                    good &= same
            finally:
                run.close()
        for name, terms in (("rounds", ROUNDS), ("decoupled", ALONE)):
            run = changing(Path(folder) / f"{name}-changing", terms)
            try:
                good &= show(f"{name}: one stops, a third one joins, the first comes back", run)
            finally:
                run.close()
    print("good" if good else "NOT GOOD")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
