"""Islands of a few numbers, in virtual time, at a real hub: what it hands out, merges and answers is the product's.

Each island trains `weights -= rate * (weights - what its sequences want)` in fp32, whose result depends on the order of
everything. It keeps to the protocol as the product's islands do: saves at a mark, replays from there, overlaps.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.config.islands_schema import IslandsConfig
from orchestrator.islands.boxes import Box
from orchestrator.islands.codec import decode, encode
from orchestrator.islands.fragments import fragments
from orchestrator.islands.hub import Hub
from orchestrator.islands.hub_state import HubState
from orchestrator.islands.island_messages import (
    PROTOCOL,
    BoxOf,
    Bye,
    Hello,
    LeaseRequest,
    Offer,
    OuterGift,
    OuterRequest,
    Peer,
    Refused,
    Report,
    Saved,
    Terms,
    UpdateRequest,
)
from orchestrator.islands.outer import bits
from orchestrator.islands.part_frames import part_header
from orchestrator.islands.run_terms import RunTerms

SHAPES: dict[str, tuple[int, ...]] = {"embed": (6, 4), "layers.0.w": (4, 4), "layers.1.w": (4, 4), "norm": (4,)}
RATE = np.float32(0.1)
Life = Generator[Any, None, None]
_numbers = itertools.count()


def wanted(sequence: int, name: str) -> np.ndarray[Any, Any]:
    """Return what a sequence wants a tensor to be."""
    return np.random.default_rng([sequence, len(name)]).standard_normal(SHAPES[name]).astype(np.float32)


@dataclass
class Kept:
    """A save of an island."""

    mark: str
    lease: int
    weights: dict[str, np.ndarray[Any, Any]]
    anchors: dict[str, np.ndarray[Any, Any]]
    residuals: dict[str, np.ndarray[Any, Any]]
    versions: list[int]
    under_way: dict[int, tuple[int, int, int, dict[str, Any]]]
    steps: int


class Sim:
    """A hub and its islands.

    Args:
        terms: of the exchange.
        steps: of the run.
        batch: sequences of a global step.
        expected: names and shares of the islands that it begins with.
        settings: keys of the group `islands`.
        facts: further keys of `RunTerms`.
    """

    def __init__(
        self,
        terms: Terms,
        steps: int = 32,
        batch: int = 8,
        expected: Mapping[str, float | None] | None = None,
        state: HubState | None = None,
        repeat: list[Any] | None = None,
        settings: Mapping[str, Any] = {"patience_seconds": 50.0, "timeout_seconds": 20.0},
        **facts: Any,
    ):
        self.now, self.notes = 0.0, list[dict[str, Any]]()
        self.facts = RunTerms("run", steps, batch, expected or {"a": None, "b": None}, **facts)
        self.hub = Hub(
            terms, IslandsConfig(**settings), self.facts, state, lambda: self.now, self.notes.append, repeat or ()
        )
        self.lives: dict[str, tuple[SimIsland, Life, Any]] = {}
        self.mail: dict[tuple[Peer, int], Any] = {}
        self.stop_at: Callable[[], bool] = lambda: False
        self.disk: dict[str, Any] = {}

    def start(self, name: str, **options: Any) -> SimIsland:
        """Start an island."""
        island = SimIsland(self, name, **options)
        self.lives[name] = (island, island.life(), 0.0)
        return island

    def kill(self, name: str) -> SimIsland:
        """Kill an island; the hub hears nothing of it."""
        return self.lives.pop(name)[0]

    def run(self, seconds: float = 1e9) -> None:
        """Go on until nothing is left to do, or for so long."""
        end = self.now + seconds
        while self.now < end and not self.stop_at():
            moved = False
            for name in sorted(self.lives):
                if name in self.lives:
                    moved |= self._advance(name)
            if self.hub.finished:
                return
            if not moved:
                times = [wait for _, _, wait in self.lives.values() if isinstance(wait, float)]
                self.now = min([*times, self.now + 1.0])
                for island, _, _ in self.lives.values():
                    island.seen()
                self.hub.tick()
                self._deliver()
                assert self.now < 5e3, "nothing moves any more"

    def _advance(self, name: str) -> bool:
        island, life, wait = self.lives[name]
        if isinstance(wait, float) and wait > self.now:
            return False
        if callable(wait) and not wait():
            return False
        island.seen()
        try:
            wait = next(life)
        except StopIteration:
            del self.lives[name]
            return True
        self.lives[name] = (island, life, self.now + wait if isinstance(wait, float) else wait)
        return True

    def post(self, peer: Peer, number: int, request: Any, frames: Any = ()) -> None:
        """Send a request."""
        self.hub.handle(peer, number, request, frames)
        self._deliver()

    def _deliver(self) -> None:
        for peer, number, answer, frames in self.hub.answers:
            self.mail[peer, number] = (answer, frames)
        self.hub.answers.clear()


@dataclass
class SimIsland:
    """An island of a few numbers."""

    sim: Sim
    name: str
    ranks: int = 1
    speed: float = 8.0  # sequences per second
    unit: int = 1
    kept: Kept | None = None
    broken: Callable[[int], bool] = lambda step: False
    transfer: float = 0.0
    waited: float = 0.0
    busy: float = 0.0
    steps: int = 0
    seen_sequences: list[int] = field(default_factory=list)
    refused: Refused | None = None

    def __post_init__(self) -> None:
        self.incarnation = f"{self.name}-{next(_numbers)}"
        self.weights = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        self.anchors = copy.deepcopy(self.weights)
        self.residuals: dict[str, Any] = {}
        self.versions: list[int] = []
        self.under_way: dict[int, tuple[int, int, int, dict[str, Any]]] = {}
        self.saves: dict[str, Kept] = {}

    # --- to ask -----------------------------------------------------------------------------------------

    def seen(self) -> None:
        """Give a sign of life."""
        one = self.sim.hub.members.get(self.name)
        if one is not None and one.incarnation == self.incarnation:
            one.seen_at = self.sim.now

    def _ask(self, rank: int, request: Any, frames: Any = ()) -> Callable[[], bool]:
        peer, number = Peer(self.name, self.incarnation, rank), next(_numbers)
        self._last = (peer, number)
        self.sim.post(peer, number, request, frames)
        return lambda: (peer, number) in self.sim.mail

    def _answer(self) -> Any:
        answer, frames = self.sim.mail.pop(self._last)
        if isinstance(answer, Refused):
            self.refused = answer
            raise GeneratorExit
        return answer, frames

    def _box(self, name: str, rank: int) -> Box:
        rows = SHAPES[name][0]
        cut = [rows * r // self.ranks for r in range(self.ranks + 1)]
        rest = SHAPES[name][1:]
        return Box(name, SHAPES[name], (cut[rank], *(0 for _ in rest)), (cut[rank + 1], *rest))

    # --- its life ---------------------------------------------------------------------------------------

    def life(self) -> Life:
        """Train until the end."""
        try:
            yield from self._live()
        except GeneratorExit:
            return

    def _live(self) -> Life:
        terms = self.sim.hub.terms
        self.parts = fragments(SHAPES, terms.fragments)
        kept = self.kept
        answers = []
        for rank in range(self.ranks):
            boxes = [self._box(name, rank) for name in SHAPES]
            hello = Hello(
                PROTOCOL, "", self.name, self.incarnation, rank, self.ranks, "m", "d", self.sim.facts.sequences, 16,
                self.sim.facts.max_steps, 0, self.unit, tuple(SHAPES), tuple(SHAPES.values()),
                tuple(BoxOf(b.name, b.start, b.stop, True) for b in boxes),
                kept.lease if kept else None, kept.mark if kept else "",
            )  # fmt: skip
            answers.append(self._ask(rank, hello))
            if rank == 0:
                first = self._last
        yield lambda: all(ready() for ready in answers)
        self._last = first
        welcome, _ = self._answer()
        self.welcome = welcome
        yield from self._begin(welcome, kept)
        number = welcome.lease
        while True:
            yield self._waiting(self._ask(0, LeaseRequest(number)))
            lease, _ = self._answer()
            self._note_wait()
            if lease.save:
                self._save(lease.save, number)
            if not lease.steps and lease.versions:
                break
            yield from self._train(lease, terms)
            number += 1
        for fragment in list(self.under_way):
            yield from self._apply(fragment)
        for fragment in range(len(self.parts)):
            if terms.gradients:
                continue
            parts = []
            for rank in range(self.ranks):
                yield self._ask(rank, UpdateRequest(number, fragment, 0, self.versions[fragment]))
                answer, frames = self._answer()
                parts += zip(answer.parts, frames, strict=True)
            self._adopt(answer, parts, fragment, None)
        self._ask(0, Bye("finished"))

    def _begin(self, welcome: Any, kept: Kept | None) -> Life:
        self.versions = list(welcome.versions)
        if welcome.start == "give":
            for rank in range(self.ranks):
                parts = [self._box(name, rank) for name in SHAPES]
                frames = [encode(self.anchors[box.name][box.slices], box, "fp32") for box in parts]
                heads = tuple(part_header(box, frame) for box, frame in zip(parts, frames, strict=True))
                self._ask(rank, OuterGift(heads, True), frames)
        elif welcome.start in ("replay", "restore"):
            if welcome.start == "restore":
                kept = next(save for save in self.sim.disk.values() if save[0] == welcome.path)[1]
            assert kept is not None
            kept = copy.deepcopy(kept)
            self.weights, self.anchors, self.residuals = kept.weights, kept.anchors, kept.residuals
            self.versions, self.under_way, self.steps = kept.versions, kept.under_way, kept.steps
        elif welcome.start == "take":
            for fragment in range(len(self.parts)):
                for rank in range(self.ranks):
                    yield self._ask(rank, OuterRequest(fragment))
                    answer, frames = self._answer()
                    assert (answer.whole, answer.pieces) == (True, 1)
                    self.versions[fragment] = answer.version
                    for part, frame in zip(answer.parts, frames, strict=True):
                        box = Box(part.name, SHAPES[part.name], part.start, part.stop)
                        self.anchors[part.name][box.slices] = decode(frame, box, "fp32")
            self.weights = copy.deepcopy(self.anchors)

    def _train(self, lease: Any, terms: Terms) -> Life:
        begin, waited = self.sim.now, self.waited
        offers = {max(1, math.ceil(len(lease.steps) * (f + 1) / len(self.parts))): [] for f in range(len(self.parts))}
        for f in range(len(self.parts)):
            offers[max(1, math.ceil(len(lease.steps) * (f + 1) / len(self.parts)))].append(f)
        count = 0
        for index, step in enumerate(lease.steps, 1):
            for fragment, (_, _, due, _) in list(self.under_way.items()):
                if self.steps >= due:
                    yield from self._apply(fragment)
            rows = [row for start, stop in step.rows for row in range(start, stop)]
            assert len(rows) <= lease.rows
            cost = lease.rows / self.speed
            self.busy += cost
            yield float(cost)
            gradient = self._gradient(rows)
            self.seen_sequences += rows
            count += len(rows)
            if terms.gradients:
                yield from self._exchange_gradient(lease.lease, gradient, len(rows))
                self.steps += 1
                continue
            if rows:
                for name in SHAPES:
                    self.weights[name] = self.weights[name] - RATE * gradient[name]
            self.steps += 1
            if self.broken(self.steps):
                self.anchors["norm"][0] += np.float32(1)
            for fragment in offers.get(index, ()):
                if fragment in self.under_way:
                    yield from self._apply(fragment)
                yield from self._offer(lease.lease, fragment, index, count * 16)
                if not terms.overlap_steps:
                    yield from self._apply(fragment)
        sent = tuple(16 * step.sequences for step in lease.steps)
        seconds = self.sim.now - begin
        report = Report(lease.lease, (1.0,) * len(sent), sent, seconds=seconds, waited=self.waited - waited)
        self._ask(0, report)

    def _gradient(self, rows: list[int]) -> dict[str, Any]:
        if not rows:
            return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        mean = {name: np.mean([wanted(row, name) for row in rows], axis=0, dtype=np.float32) for name in SHAPES}
        return {name: self.weights[name] - mean[name] for name in SHAPES}

    def _exchange_gradient(self, lease: int, gradient: dict[str, Any], rows: int) -> Life:
        yield from self._send(lease, 0, 1, rows * 16, gradient)
        yield self._waiting(self._ask(0, UpdateRequest(lease, 0, 1, self.versions[0])))
        self._note_wait()
        total = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        answer, frames = self._answer()
        parts = list(zip(answer.parts, frames, strict=True))
        for rank in range(1, self.ranks):
            yield self._ask(rank, UpdateRequest(lease, 0, 1, self.versions[0]))
            more, frames = self._answer()
            parts += zip(more.parts, frames, strict=True)
        for part, frame in parts:
            box = Box(part.name, SHAPES[part.name], part.start, part.stop)
            total[part.name][box.slices] = decode(frame, box, "fp32")
        self.versions[0] = answer.version
        for name in SHAPES:
            self.weights[name] = self.weights[name] - RATE * total[name]

    def _offer(self, lease: int, fragment: int, index: int, targets: int) -> Life:
        delta = {name: self.anchors[name] - self.weights[name] for name in self.parts[fragment]}
        yield from self._send(lease, fragment, index, targets, delta)
        due = self.steps + self.sim.hub.terms.overlap_steps
        self.under_way[fragment] = (lease, index, due, delta)

    def _send(self, lease: int, fragment: int, index: int, targets: int, values: dict[str, Any]) -> Life:
        kind = self.sim.hub.terms.exchange
        for rank in range(self.ranks):
            boxes = [self._box(name, rank) for name in self.parts[fragment]]
            frames = []
            for box in boxes:
                full = values[box.name][box.slices] + self.residuals.get(f"{box.name}.{rank}", np.float32(0))
                frames.append(encode(full, box, kind))
                if kind != "fp32":
                    self.residuals[f"{box.name}.{rank}"] = full - decode(frames[-1], box, kind)
            heads = tuple(part_header(box, frame) for box, frame in zip(boxes, frames, strict=True))
            digest = sum(bits(self.anchors[box.name][box.slices]) for box in boxes) % (1 << 64)
            offer = Offer(lease, fragment, self.versions[fragment], targets, digest, index, heads)
            if self.transfer:
                yield float(self.transfer)
            yield self._ask(rank, offer, frames)
            self._answer()

    def _apply(self, fragment: int) -> Life:
        lease, index, _, delta = self.under_way[fragment]
        parts = []
        for rank in range(self.ranks):
            yield self._waiting(self._ask(rank, UpdateRequest(lease, fragment, index, self.versions[fragment])))
            self._note_wait()
            answer, frames = self._answer()
            parts += zip(answer.parts, frames, strict=True)
        del self.under_way[fragment]
        self._adopt(answer, parts, fragment, delta)

    def _adopt(self, answer: Any, parts: Any, fragment: int, delta: dict[str, Any] | None) -> None:
        before = {name: self.anchors[name].copy() for name in self.parts[fragment]}
        for part, frame in parts:
            box = Box(part.name, SHAPES[part.name], part.start, part.stop)
            self.anchors[part.name][box.slices] += decode(frame, box, self.sim.hub.terms.exchange)
        self.versions[fragment] = answer.version
        for name in self.parts[fragment]:
            if delta is None:
                self.weights[name] = self.anchors[name].copy()
            else:  # the steps since the offer stay on top of the new weights
                since = self.weights[name] - (before[name] - delta[name])
                self.weights[name] = self.anchors[name] + (since if self.sim.hub.terms.overlap_steps else 0 * since)

    def _save(self, mark: str, lease: int) -> None:
        state = (self.weights, self.anchors, self.residuals, self.versions, self.under_way)
        kept = Kept(mark, lease, *copy.deepcopy(state), self.steps)
        path = f"{self.name}/{mark}"
        self.saves[mark] = kept
        self.sim.disk[f"{self.name}/{mark}"] = (path, kept)
        self._ask(0, Saved(mark, lease, path, self.steps))

    def newest(self) -> Kept | None:
        """Return its newest save."""
        return max(self.saves.values(), key=lambda one: one.lease, default=None)

    def _waiting(self, ready: Callable[[], bool]) -> Callable[[], bool]:
        self._since = self.sim.now
        return ready

    def _note_wait(self) -> None:
        self.waited += self.sim.now - self._since
