"""What one rank of an island exchanges with the hub: its own parts of the weights, and nothing of the other ranks'.

The outer weights (anchors) are kept in fp32 on the host. An offer is what the local weights have moved away from them;
the update that follows is added to the anchors, as the hub adds it to its own: both have the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from orchestrator import stopping
from orchestrator.config.schema import RunConfig
from orchestrator.distributed import standing
from orchestrator.errors import RunFailedError
from orchestrator.islands.boxes import Box
from orchestrator.islands.codec import decode, encode
from orchestrator.islands.fragments import fragments
from orchestrator.islands.island_messages import (
    BoxOf,
    Offer,
    OuterGift,
    OuterRequest,
    PartHeader,
    Terms,
    Update,
    UpdateRequest,
)
from orchestrator.islands.link import Link
from orchestrator.islands.outer import bits
from orchestrator.islands.part_frames import part_header
from orchestrator.models.protocol import ShardableModel
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.adapter_state import saved_shards
from orchestrator.training.island_guess import EagerGuess
from orchestrator.training.restore import ISLAND

Array: TypeAlias = "np.ndarray[Any, Any]"
Key: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...]]
_PIECE_ELEMENTS = 4 << 20
_MESSAGE_BYTES = 16 << 20
_POLL_SECONDS = 0.25
_THREADS = 8


class LeavingError(Exception):
    """The island was asked to stop while it waited for the hub.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"asked to stop by signal {number}")
        self.number = number


@dataclass
class UnderWay:
    """An offer whose update is not applied yet.

    Attributes:
        lease: in which it was made.
        step: of the lease.
        due: inner steps of the island after which the update is applied.
        targets: that it counts.
        sent: what was to be sent, before it was rounded, by part; of the parts that this rank owns.
        begun: local weights as they were when it was made, by part.
        update: version, and what is to be added, part by part.
    """

    lease: int
    step: int
    due: int
    targets: int
    sent: dict[Key, Array] = field(default_factory=dict)
    begun: dict[Key, Array] = field(default_factory=dict)
    update: Future[tuple[int, list[tuple[Box, Array]]]] | None = None


class IslandExchange:
    """Exchanges one rank's parts.

    Args:
        parallel: the strategy.
        model: placed, with weights.
        config: of the run.
        link: to the hub.

    Attributes:
        names: of the tensors that are exchanged, in the order of the model, on all ranks alike.
        shapes: of these.
        versions: of the anchors, for each fragment.
        under_way: offers whose updates are not applied, by fragment.
        waited: seconds that this rank has waited for updates.
    """

    def __init__(self, parallel: ParallelStrategy, model: ShardableModel, config: RunConfig, link: Link):
        self._parallel, self._model, self._config, self._link = parallel, model, config, link
        placed = {f"model.{name}": tuple(one.shape) for name, one in parallel.placements[model].items()}
        kept = saved_shards([_nothing(name, shape) for name, shape in placed.items()], config)
        self.names = tuple(shard.name.removeprefix("model.") for shard in kept)
        self.shapes = tuple(shard.shape for shard in kept)
        self._boxes: dict[Key, Box] = {}
        self._owned: set[Key] = set()
        for shard in self._weights():
            key = _key(shard)
            self._boxes[key] = Box(shard.name.removeprefix("model."), tuple(shard.shape), *key[1:])
            if shard.owned:
                self._owned.add(key)
        self._terms = Terms()
        self._fragments: tuple[tuple[str, ...], ...] = ()
        self.versions: list[int] = []
        self._anchors: dict[Key, Array] = {}
        self._residuals: dict[Key, Array] = {}
        self._pieces: dict[tuple[type, int], int] = {}
        self.under_way: dict[int, UnderWay] = {}
        self.waited = 0.0
        self._pool: ThreadPoolExecutor
        self._eager: EagerGuess[Key] = EagerGuess(self._terms)

    def wait(self, future: Future[Any], count: bool = True) -> Any:
        """Return what the hub answers, on all ranks or on none: whoever it waits for may have been stopped, too.

        Args:
            future: of the answer.
            count: the seconds are those of waiting for an exchange.

        Raises:
            LeavingError: a rank was asked to stop while one had no answer.
        """
        begin = time.monotonic()
        try:
            while True:
                futures.wait([future], _POLL_SECONDS)
                standing.mark()
                if not self._parallel.any_raised(not future.done()):
                    return future.result()
                if number := self._parallel.start_vote(stopping.requested()).result():
                    raise LeavingError(number)
        finally:
            self.waited += (time.monotonic() - begin) * count

    def _weights(self, names: Iterable[str] | None = None) -> list[Shard]:
        wanted = {f"model.{name}" for name in (self.names if names is None else names)}
        return self._parallel.weight_shards(self._model, wanted)

    def boxes(self) -> tuple[BoxOf, ...]:
        """Return what this rank holds."""
        return tuple(BoxOf(box.name, box.start, box.stop, key in self._owned) for key, box in self._boxes.items())

    # --- beginning --------------------------------------------------------------------------------------

    def begin(self, terms: Terms, versions: Sequence[int]) -> None:
        """Take the terms of the run, and the local weights for the outer ones.

        Args:
            terms: of the hub.
            versions: of the outer weights.
        """
        self._terms, self.versions = terms, list(versions)
        self._fragments = fragments(dict(zip(self.names, self.shapes, strict=True)), terms.fragments)
        self._eager = EagerGuess(terms)
        if self._feedback:  # of all parts, as a checkpoint holds whole tensors
            self._residuals = {key: np.zeros(self._boxes[key].dims, dtype=np.float32) for key in self._owned}
        # A fragment waits for its update in its thread.
        self._pool = ThreadPoolExecutor(min(self.count, _THREADS), thread_name_prefix="island-exchange")
        self._pieces.clear()
        if not terms.gradients:
            self._anchors = {_key(shard): _copied(shard.data) for shard in self._weights()}

    def give(self) -> None:
        """Send the weights, which the hub does not have."""
        owned = [(key, self._boxes[key]) for key in self._boxes if key in self._owned]
        parts = [(piece, self._anchors[key][piece.within(box)]) for key, box in owned for piece in _pieces(box)]
        sent = [self._link.ask(OuterGift((), last=True))] if not parts else []
        for group, last in _grouped(parts):
            frames = [encode(values, box, "fp32") for box, values in group]
            heads = tuple(part_header(box, frame) for (box, _), frame in zip(group, frames, strict=True))
            sent.append(self._link.ask(OuterGift(heads, last), frames))
        for future in sent:
            future.result()

    def take(self) -> None:
        """Fetch the outer weights, and train on from them."""
        for fragment in range(len(self._fragments)):
            self.versions[fragment], parts = self._fetch(OuterRequest(fragment), "fp32")
            for box, values in parts:
                self._part(box)[...] = values
        self._adopt({key: self._anchors[key] for key in self._anchors})

    # --- weights ----------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Fragments of the model."""
        return len(self._fragments)

    def offer(self, fragment: int, lease: int, step: int, targets: int, due: int, share: float = 1.0) -> None:
        """Bring what the local weights have moved away from the anchors. Sent beside the training.

        Args:
            fragment: number of it.
            lease: in which the island is.
            step: of the lease.
            targets: tokens that count.
            due: inner steps of the island after which the update is applied.
            share: of a step's sequences that is this island's.
        """
        moved, begun = dict[Key, Array](), dict[Key, Array]()
        for shard in self._weights(self._fragments[fragment]):
            key = _key(shard)
            if key not in begun:
                # What goes on training changes the weights while they are under way.
                begun[key] = (_copied if self._terms.overlap_steps else _seen)(shard.data)
                if key in self._owned:
                    moved[key] = self._anchors[key] - begun[key]
                    if key in self._residuals:
                        moved[key] += self._residuals[key]
        if self._terms.eager:
            guessed = self._eager.guess({key: self._anchors[key] - local for key, local in begun.items()}, share)
            begun = {key: self._anchors[key] + update for key, update in guessed.items()}
            self._adopt(begun)
        under_way = UnderWay(lease, step, due, targets, moved, begun if self._terms.overlap_steps else {})
        self.under_way[fragment] = under_way
        self.send(fragment)

    def send(self, fragment: int) -> None:
        """Send the offer that is under way, also one that was under way when it was saved.

        Args:
            fragment: number of it.
        """
        one, names = self.under_way[fragment], set(self._fragments[fragment])
        digest = sum(bits(self._anchors[key]) for key in self._owned if self._boxes[key].name in names) % (1 << 64)
        about = Offer(one.lease, fragment, self.versions[fragment], one.targets, digest, one.step, ())
        one.update = self._pool.submit(self._exchange, about, one.sent)

    def _exchange(self, about: Offer, sent: Mapping[Key, Array]) -> tuple[int, list[tuple[Box, Array]]]:
        """Send an offer, and fetch what follows it; by the thread that does this."""
        residuals = self._bring(about, sent)
        request = UpdateRequest(about.lease, about.fragment, about.step, about.version)
        version, parts = self._fetch(request, self._terms.exchange)
        for key, values in residuals.items():
            self._residuals[key] = values
        return version, parts

    def _bring(self, about: Offer, sent: Mapping[Key, Array]) -> dict[Key, Array]:
        """Send an offer's parts. Returns what rounding has left out of them."""
        kind, residuals, feedback = self._terms.exchange, dict[Key, Array](), self._feedback
        parts, futures = [], []
        for key, values in sent.items():
            if feedback:
                residuals[key] = np.empty_like(values)
            parts += [(piece, values[piece.within(self._boxes[key])], key) for piece in _pieces(self._boxes[key])]
        group: list[tuple[PartHeader, bytes | memoryview]] = []
        for box, values, key in parts:
            frame = encode(values, box, kind)
            if feedback:
                residuals[key][box.within(self._boxes[key])] = values - decode(frame, box, kind)
            group.append((part_header(box, frame), frame))
            if sum(len(payload) for _, payload in group) >= _MESSAGE_BYTES:
                futures.append(self._ask_offer(about, group))
                group = []
        if group or not futures:
            futures.append(self._ask_offer(about, group))
        for future in futures:
            future.result()
        return residuals

    @property
    def _feedback(self) -> bool:
        terms = self._terms
        return terms.error_feedback and terms.exchange != "fp32" and not terms.gradients

    def _ask_offer(self, about: Offer, group: Sequence[tuple[PartHeader, bytes | memoryview]]) -> Future[Any]:
        heads = tuple(head for head, _ in group)
        return self._link.ask(replace(about, parts=heads), [frame for _, frame in group])

    def _fetch(self, request: UpdateRequest | OuterRequest, kind: str) -> tuple[int, list[tuple[Box, Array]]]:
        """Fetch all pieces of an update. Returns its version, and its parts in order."""
        # As many pieces as the last time are asked for at once: the hub makes the next one while one is under way.
        expected = self._pieces.get((type(request), request.fragment), 1)
        asked = [self._link.ask(replace(request, piece=piece)) for piece in range(expected)]
        first, frames = asked[0].result()
        assert isinstance(first, Update)
        asked += [self._link.ask(replace(request, piece=piece)) for piece in range(expected, first.pieces)]
        self._pieces[type(request), request.fragment] = first.pieces
        rest = asked[1 : first.pieces]
        shapes = dict(zip(self.names, self.shapes, strict=True))
        parts: list[tuple[Box, Array]] = []
        for answer, payloads in [(first, frames), *(future.result() for future in rest)]:
            assert isinstance(answer, Update)
            for head, payload in zip(answer.parts, payloads, strict=True):
                box = Box(head.name, shapes[head.name], head.start, head.stop)
                parts.append((box, decode(payload, box, kind)))
        return first.version, parts

    def apply(self, fragment: int, leaves: bool = True) -> None:
        """Wait for the update of the offer that is under way, and take it over.

        Args:
            fragment: number of it.
            leaves: a request to stop ends the waiting.

        Raises:
            LeavingError: a rank was asked to stop meanwhile; the offer stays under way.
        """
        one, begin = self.under_way[fragment], time.monotonic()
        assert one.update is not None
        if leaves:
            version, parts = self.wait(one.update)
        else:
            version, parts = one.update.result()
            self.waited += time.monotonic() - begin
        del self.under_way[fragment]
        names = set(self._fragments[fragment])
        mine = [key for key in self._anchors if self._boxes[key].name in names]
        before = {key: self._anchors[key].copy() for key in mine} if self._terms.eager else {}
        self._add(fragment, version, parts)
        changed = {key: self._anchors[key] for key in mine}
        if not self._terms.overlap_steps:
            self._adopt(changed)
            return
        if self._terms.eager:
            self._eager.came({key: anchor - before[key] for key, anchor in changed.items()})
        local = {_key(shard): _copied(shard.data) for shard in self._weights(names)}
        mix = self._terms.overlap_mix
        for key, anchor in changed.items():
            if mix is None:  # the steps since the offer stay, on top of the new outer weights
                changed[key] = anchor + (local[key] - one.begun[key])
            else:
                changed[key] = local[key] * np.float32(mix) + anchor * np.float32(1 - mix)
        self._adopt(changed)

    def _add(self, fragment: int, version: int, parts: Iterable[tuple[Box, Array]]) -> None:
        for box, values in parts:
            mine = self._part(box)
            np.add(mine, values, out=mine)
        self.versions[fragment] = version

    def finish(self, lease: int) -> None:
        """Take over the last updates of the run: then the weights are the outer ones.

        Args:
            lease: number of the lease that said that there are no more.
        """
        if self._terms.gradients:
            return
        for fragment in sorted(self.under_way):
            self.apply(fragment, leaves=False)
        for fragment in range(self.count):
            request = UpdateRequest(lease, fragment, 0, self.versions[fragment])
            version, parts = self._fetch(request, self._terms.exchange)
            self._add(fragment, version, parts)
        self._adopt(dict(self._anchors))

    def _part(self, box: Box) -> Array:
        """Return the part of an anchor that is a box, to be written into."""
        for key, mine in self._boxes.items():
            if mine.name == box.name and _within(mine, box):
                return self._anchors[key][box.within(mine)]
        raise RunFailedError("the hub sent what this process does not have", got=f"{box.name}, {box.start}")

    def _adopt(self, values: Mapping[Key, Array]) -> None:
        shards = self._weights({self._boxes[key].name for key in values})
        with torch.no_grad():
            for shard in shards:
                shard.data.copy_(torch.from_numpy(np.ascontiguousarray(values[_key(shard)])))
        self._parallel.adopt(self._model, None, shards)

    def with_outer(self, action: Callable[[], Any]) -> Any:
        """Do something with the outer weights in place of the local ones.

        Args:
            action: what is done.
        """
        local = {_key(shard): _copied(shard.data) for shard in self._weights()}
        self._adopt(self._anchors)
        try:
            return action()
        finally:
            self._adopt(local)

    # --- gradients --------------------------------------------------------------------------------------

    def gradients(self, lease: int, targets: int) -> None:
        """Make the gradients the mean of all islands', weighted by tokens.

        Args:
            lease: of the step.
            targets: tokens that are in the gradients of this island.

        Raises:
            LeavingError: a rank was asked to stop meanwhile.
        """
        shards = self._parallel.gradient_shards(self._model)
        keys = [(shard.name.removeprefix("gradient."), *_key(shard)[1:]) for shard in shards]
        owned = [(key, shard) for key, shard in zip(keys, shards, strict=True) if shard.owned]
        sent = {(f"model.{key[0]}", key[1], key[2]): _copied(shard.data) for key, shard in owned}
        about = Offer(lease, 0, self.versions[0], targets, 0, 1, ())
        version, parts = self.wait(self._pool.submit(self._exchange, about, sent))
        found: dict[str, list[tuple[Box, Array]]] = {}
        for box, values in parts:
            found.setdefault(box.name, []).append((box, values))
        with torch.no_grad():
            for key, shard in zip(keys, shards, strict=True):
                mine = Box(key[0], tuple(shard.shape), key[1], key[2])
                for box, values in found.get(key[0], ()):
                    if _within(mine, box):
                        shard.data[box.within(mine)] = torch.from_numpy(values.copy()).to(shard.data)
        self._parallel.adopt_gradients(self._model, shards)
        self.versions[0] = version

    # --- state ------------------------------------------------------------------------------------------

    def shards(self) -> list[Shard]:
        """Return the island's own tensors, as its checkpoints hold them."""
        found = [self._shard("anchor", key, value) for key, value in self._anchors.items()]
        found += [self._shard("residual", key, value) for key, value in self._residuals.items()]
        for one in self.under_way.values():
            found += [self._shard("offer", key, value) for key, value in one.sent.items()]
            found += [self._shard("begun", key, value) for key, value in one.begun.items()]
        for kind, parts in self._eager.kept.items():
            found += [self._shard(kind, key, value) for key, value in parts.items()]
        return found

    def _shard(self, kind: str, key: Key, value: Array) -> Shard:
        box = self._boxes[key]
        data = torch.from_numpy(value.reshape(box.dims))
        return Shard(f"{ISLAND}{kind}.{box.name}", box.shape, box.slices, data, key in self._owned)

    def plain(self) -> dict[str, Any]:
        """Return the rest of the state, for JSON."""
        under_way = [[at, one.lease, one.step, one.due, one.targets] for at, one in sorted(self.under_way.items())]
        return {"versions": list(self.versions), "under_way": under_way}  # written later, by a thread

    def empty_state(self, plain: Mapping[str, Any], stored: Iterable[str]) -> list[Shard]:
        """Make room for what a checkpoint holds of the island, and return it to be filled.

        Args:
            plain: of `plain`, from there.
            stored: names of its tensors.
        """
        kinds = {name.removeprefix(ISLAND).partition(".")[0] for name in stored if name.startswith(ISLAND)}
        self.versions = [int(version) for version in plain["versions"]]
        self.under_way = {}
        for at, lease, step, due, targets in plain["under_way"]:
            self.under_way[int(at)] = UnderWay(int(lease), int(step), int(due), int(targets))
        if "residual" in kinds:
            self._residuals = {key: self._room(key) for key in self._owned}
        for fragment, one in self.under_way.items():
            names = set(self._fragments[fragment])
            one.sent = {key: self._room(key) for key in self._owned if self._boxes[key].name in names}
            if "begun" in kinds:
                one.begun = {key: self._room(key) for key in self._boxes if self._boxes[key].name in names}
        for kind, parts in self._eager.kept.items():
            names = {name.removeprefix(f"{ISLAND}{kind}.") for name in stored if name.startswith(f"{ISLAND}{kind}.")}
            parts.update({key: self._room(key) for key, box in self._boxes.items() if box.name in names})
        return self.shards()

    def _room(self, key: Key) -> Array:
        return np.empty(self._boxes[key].dims, dtype=np.float32)


def _key(shard: Shard) -> Key:
    return shard.name, tuple(part.start for part in shard.slices), tuple(part.stop for part in shard.slices)


def _copied(data: torch.Tensor) -> Array:
    return _seen(data).copy()


def _seen(data: torch.Tensor) -> Array:
    """Return a tensor's numbers where they lie, if they do as fp32 in the host's memory."""
    return np.ascontiguousarray(data.detach().to("cpu", torch.float32).numpy())


def _nothing(name: str, shape: tuple[int, ...]) -> Shard:
    return Shard(name, shape, (), torch.empty(0))


def _within(outer: Box, inner: Box) -> bool:
    pairs = zip(outer.start, inner.start, inner.stop, outer.stop, strict=True)
    return all(a <= b and c <= d for a, b, c, d in pairs)


def _pieces(box: Box) -> list[Box]:
    return [piece for piece in box.pieces(_PIECE_ELEMENTS) if piece.size]


def _grouped(parts: Sequence[tuple[Box, Array]]) -> Iterable[tuple[list[tuple[Box, Array]], bool]]:
    """Divide parts into messages of about equal size; with the last one it is said that it is."""
    group: list[tuple[Box, Array]] = []
    size = 0
    for box, values in parts:
        if group and size + 4 * box.size > _MESSAGE_BYTES:
            yield group, False
            group, size = [], 0
        group.append((box, values))
        size += 4 * box.size
    if group:
        yield group, True
