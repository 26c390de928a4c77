"""What islands have brought, when it is merged, and the updates that they get for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.config.islands_schema import IslandsConfig
from orchestrator.islands.boxes import Box
from orchestrator.islands.codec import decode, encode
from orchestrator.islands.hub_leases import HubLeases
from orchestrator.islands.island_messages import (
    Offer,
    OuterGift,
    OuterRequest,
    PartHeader,
    Terms,
    Update,
    UpdateRequest,
)
from orchestrator.islands.member_log import Key, MemberLog
from orchestrator.islands.outer_weights import Contribution, OuterWeights
from orchestrator.islands.part_frames import part_header
from orchestrator.islands.refusal import refuse

PIECE_ELEMENTS = 4 << 20
"""Of a part on the way."""
_PIECE_BYTES = 16 << 20  # of an answer, about
Parts = list[tuple[int, Box]]


class HubMerges:
    """Merges what islands bring, and answers with updates.

    Args:
        terms: of the exchange.
        settings: further settings of the group `islands`.
        members: the islands, by name; the hub's own table.
        leases: of the run.
        note: records.
        repeat: notes of a run whose merges are made again.
    """

    def __init__(
        self,
        terms: Terms,
        settings: IslandsConfig,
        members: dict[str, MemberLog],
        leases: HubLeases,
        note: Callable[[dict[str, Any]], object],
        repeat: Sequence[Mapping[str, Any]] = (),
    ):
        self.terms, self._settings, self._members, self._leases, self._note = terms, settings, members, leases, note
        self._outer: OuterWeights | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._coming: dict[tuple[str, Key], Contribution] = {}
        self._complete: dict[int, dict[tuple[str, Key], Contribution]] = {}
        self._first_at: dict[int, float] = {}
        self._pins: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        self._pinned: dict[str, tuple[int, ...]] = {}
        self._gifts: dict[str, set[int]] = {}
        self._recorded = {
            (int(one["fragment"]), int(one["version"])): {(c["island"], c["lease"], c["step"]) for c in one["given"]}
            for one in repeat
            if one.get("kind") == "exchange"
        }

    def set_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take note of the tensors that are exchanged.

        Args:
            shapes: by name, in the order of the model.
        """
        self._shapes, self._outer = dict(shapes), OuterWeights(self.terms, shapes)

    @property
    def outer(self) -> OuterWeights:
        """The outer weights; there as soon as the model is known."""
        assert self._outer is not None, "no island has come yet"
        return self._outer

    @property
    def versions(self) -> list[int]:
        """Merges of each fragment so far."""
        return list(self._outer.versions) if self._outer else [0] * max(1, self.terms.fragments)

    @property
    def retained_bytes(self) -> int:
        """Bytes of updates that are kept."""
        return self._outer.retained_bytes if self._outer else 0

    # --- offers -----------------------------------------------------------------------------------------

    def offer(self, one: MemberLog, rank: int, offer: Offer, frames: Sequence[Any]) -> str | None:
        """Take what a rank brings.

        Args:
            one: its island.
            rank: of the island.
            offer: what it is.
            frames: its parts.

        Returns:
            What is wrong with the island's weights; None: nothing.
        """
        key = (offer.lease, offer.fragment, offer.step)
        if key in one.offered:
            return None  # said again by an island that came back, or whose answer was lost
        lease = one.leases.get(offer.lease)
        if lease is None or not 0 <= offer.fragment < len(self.outer.fragments):
            raise refuse("an offer is of no lease of this island", got=f"{one.name}: {key}")
        if offer.targets < 0:
            raise refuse("an offer cannot have so few targets", got=offer.targets, allowed="0 or more")
        if not 0 < offer.step <= len(lease.steps) or not 0 <= offer.version <= self.versions[offer.fragment]:
            raise refuse("an offer is of no step or version that there was", got=f"{one.name}: {key}")
        before = [v for (_, fragment, _), v in one.followed.items() if fragment == offer.fragment]
        if offer.version < max(before, default=0):
            raise refuse("an offer is not relative to what followed the one before", offer.version, max(before))
        if len(frames) != len(offer.parts):
            raise refuse("an offer has another number of parts than frames", got=len(frames), allowed=len(offer.parts))
        coming = self._coming.get((one.name, key))
        if coming is None:
            coming = self.outer.collect(one.name, *key, offer.version, offer.targets)
            self._coming[one.name, key] = coming
        owned = self._owned(one, rank)
        for part, frame in zip(offer.parts, frames, strict=True):
            self._take(coming, part, frame, owned)
        coming.digests[rank] = offer.digest
        wanted = [r for r in one.hellos if self._has_part(one, r, offer.fragment)]
        if coming.missing or any(r not in coming.digests for r in wanted):
            return None
        del self._coming[one.name, key]
        if wrong := self._wrong(coming):
            return wrong
        one.offered.add(key)
        self._complete.setdefault(offer.fragment, {})[one.name, key] = coming
        return None

    def _take(self, coming: Contribution, part: PartHeader, frame: Any, owned: Mapping[str, list[Box]]) -> None:
        shape = self._shapes.get(part.name)
        if shape is None or part.name not in coming.arrays or not len(part.start) == len(part.stop) == len(shape):
            raise refuse("a part is of no tensor of the fragment", got=part.name)
        box = Box(part.name, shape, part.start, part.stop)
        if not any(_contains(mine, box) for mine in owned.get(part.name, ())):
            raise refuse("a part is not one that this rank has", got=f"{part.name} {part.start} to {part.stop}")
        seen = coming.seen.setdefault(part.name, [])
        if box in seen:
            return
        if any(_overlap(one, box) for one in seen):  # elements would be counted twice, and others not at all
            raise refuse("parts of an offer overlap", got=f"{part.name} {part.start} to {part.stop}")
        values = decode(frame, box, self.terms.exchange)
        if values.size and not (math.isfinite(values.min()) and math.isfinite(values.max())):
            coming.infinite = part.name
        if box.dims == shape:
            coming.arrays[part.name] = values  # all of it: not copied
        else:
            coming.arrays[part.name][box.slices] = values
        seen.append(box)
        coming.missing -= box.size
        coming.nbytes += len(frame)

    def _wrong(self, coming: Contribution) -> str | None:
        if coming.infinite:
            return f"what the island '{coming.island}' has learned is not finite: {coming.infinite}"
        if self.terms.gradients:
            return None
        known = self.outer.digest(coming.fragment, coming.version)
        if known is not None and known != coming.digest:
            where = f"fragment {coming.fragment} at version {coming.version}"
            return f"the outer weights of the island '{coming.island}' are not those of the others: {where}"
        return None

    def _owned(self, one: MemberLog, rank: int) -> dict[str, list[Box]]:
        found: dict[str, list[Box]] = {}
        for box in one.owned(rank):
            found.setdefault(box.name, []).append(box)
        return found

    def _has_part(self, one: MemberLog, rank: int, fragment: int) -> bool:
        names = set(self.outer.fragments[fragment])
        return any(box.name in names and box.size for box in one.owned(rank))

    def give_up(self, one: MemberLog) -> None:
        """Drop what an island has brought that is not merged.

        Args:
            one: the island.
        """
        self._coming = {key: coming for key, coming in self._coming.items() if key[0] != one.name}
        for fragment, complete in self._complete.items():
            self._complete[fragment] = {key: each for key, each in complete.items() if key[0] != one.name}

    # --- merges -----------------------------------------------------------------------------------------

    def merge_ready(self, now: float) -> bool:
        """Merge what can be. Returns whether anything was.

        Args:
            now: by the hub's clock.
        """
        decoupled, done = self.terms.algorithm == "decoupled", False
        for fragment in list(self._complete):
            while given := (self._ready_alone if decoupled else self._ready_round)(fragment, now):
                self._merge(fragment, given)
                done = True
        return done

    def _ready_round(self, fragment: int, now: float) -> list[Contribution]:
        """Return what the islands of the oldest round that has not merged the fragment have brought, if all have."""
        number = min((one for one, left in self._leases.left.items() if fragment in left), default=None)
        if number is None:
            return []
        members, complete = self._leases.open[number], self._complete.get(fragment, {})
        found = {name: each for (name, key), each in complete.items() if members.get(name) == key[0]}
        return [found[name] for name in sorted(members)] if found.keys() == members.keys() else []

    def _ready_alone(self, fragment: int, now: float) -> list[Contribution]:
        """Return what has come, if it is not to wait for more."""
        complete = self._complete.get(fragment, {})
        if not complete:
            self._first_at.pop(fragment, None)
            return []
        ordered = [complete[key] for key in sorted(complete)]
        if self._recorded:
            wanted = self._recorded.get((fragment, self.versions[fragment] + 1))
            if wanted is not None:
                found = [one for one in ordered if (one.island, one.lease, one.step) in wanted]
                return found if len(found) == len(wanted) else []
        since = self._first_at.setdefault(fragment, now)
        here = {name for name, one in self._members.items() if one.welcomed and one.state == "here"}
        if not here <= {one.island for one in ordered} and now - since < self._settings.grace_seconds:
            return []
        return ordered

    def _merge(self, fragment: int, given: Sequence[Contribution]) -> None:
        weights = [float(one.targets) for one in given]
        part, missed = 1.0, [self.versions[fragment] - one.version for one in given]
        if self.terms.algorithm == "decoupled":
            stale = self._settings.stale_weight
            for one in given:
                self._members[one.island].targets[fragment] = one.targets
            whole = sum(each.targets.get(fragment, 0) for each in self._members.values() if each.counts)
            part = min(1.0, sum(weights) / whole) if whole else 1.0
            weights = [weight * stale**age for weight, age in zip(weights, missed, strict=True)]
        if not sum(weights):
            weights = [1.0] * len(given)
        version = self.outer.merge(fragment, list(zip(weights, given, strict=True)), part)
        for one in given:
            self._merged(one, version)
        about = {"kind": "exchange", "fragment": fragment, "version": version, "part": part}
        entries = [
            {
                "island": one.island,
                "lease": one.lease,
                "step": one.step,
                "targets": one.targets,
                "version": one.version,
                "digest": f"{one.digest:016x}",
                "bytes": one.nbytes,
                "missed": age,
            }
            for one, age in zip(given, missed, strict=True)
        ]
        digest = None if self.terms.gradients else self.outer.digest(fragment, version)
        self._note({**about, "given": entries, "digest": None if digest is None else f"{digest:016x}"})

    def _merged(self, one: Contribution, version: int) -> None:
        member, key = self._members[one.island], (one.lease, one.fragment, one.step)
        del self._complete[one.fragment][one.island, key]
        self._first_at.pop(one.fragment, None)
        member.followed[key] = version
        member.reached[one.lease] = max(one.step, member.reached.get(one.lease, 0))
        lease = member.leases[one.lease]
        if one.fragment == len(self.outer.fragments) - 1:
            member.trained += one.targets
            if one.step == len(lease.steps):
                self._leases.book(member, one.lease)
        if one.fragment in self._leases.left.get(lease.round, ()):
            followed = {(name, key[:2]) for name, each in self._members.items() for key in each.followed}
            members = self._leases.open[lease.round].items()
            if all((name, (number, one.fragment)) in followed for name, number in members):
                self._leases.merged(lease.round, one.fragment)

    # --- answers ----------------------------------------------------------------------------------------

    def update(
        self, one: MemberLog, rank: int, request: UpdateRequest
    ) -> tuple[Update, list[bytes | memoryview]] | None:
        """Return a piece of the updates that follow an offer; None: it is not merged yet.

        Args:
            one: the island.
            rank: of the island.
            request: of it.
        """
        fragment = request.fragment
        if not 0 <= fragment < len(self.outer.fragments):
            raise refuse("there is no such fragment", got=fragment)
        to = one.followed.get((request.lease, fragment, request.step))
        if to is None:
            if not self._leases.ledger.finished or request.lease in one.leases:
                return None
            to = self.versions[fragment]
        if not self.outer.has_updates(fragment, request.have, to):
            raise refuse(
                "the hub does not have the updates any more that this island needs",
                got=f"version {request.have} of fragment {fragment}; it needs {to}",
                fix="start the island again: it takes the outer weights; or set a larger islands.retained_mib",
            )
        versions = range(request.have + 1, to + 1)
        parts = [(version, box) for version in versions for box in self._held(one, rank, fragment)]
        pieces = list(_pieces(parts))
        chosen = pieces[request.piece] if 0 <= request.piece < len(pieces) else []
        frames = [self.outer.part_of(fragment, version, box) for version, box in chosen]
        headers = [part_header(box, frame, at) for (at, box), frame in zip(chosen, frames, strict=True)]
        return Update(fragment, to, len(pieces), tuple(headers)), frames

    def outer_part(self, one: MemberLog, rank: int, request: OuterRequest) -> tuple[Update, list[bytes | memoryview]]:
        """Return a piece of the outer weights, as they were when the island was welcomed.

        Args:
            one: the island.
            rank: of the island.
            request: of it.
        """
        if one.name not in self._pins or not 0 <= request.fragment < len(self.outer.fragments):
            raise refuse("the outer weights are not kept for this island", got=f"{one.name}, {request.fragment}")
        pinned = self._pins[one.name]
        version = self._pinned[one.name][request.fragment]
        parts = [(version, box) for box in self._held(one, rank, request.fragment)]
        pieces = list(_pieces(parts))
        chosen = pieces[request.piece] if 0 <= request.piece < len(pieces) else []
        frames = [encode(pinned[box.name][box.slices], box, "fp32") for _, box in chosen]
        headers = [part_header(box, frame, version) for (_, box), frame in zip(chosen, frames, strict=True)]
        return Update(request.fragment, version, len(pieces), tuple(headers), whole=True), frames

    def _held(self, one: MemberLog, rank: int, fragment: int) -> list[Box]:
        names = set(self.outer.fragments[fragment])
        boxes = [box for box in one.boxes(rank) if box.name in names and box.size]
        return [piece for box in boxes for piece in box.pieces(PIECE_ELEMENTS)]

    def pin(self, name: str) -> tuple[int, ...]:
        """Keep the outer weights as they are now for an island that takes them. Returns their versions.

        Args:
            name: of the island.
        """
        # Merges make new arrays; so this is no copy.
        self._pins[name], self._pinned[name] = dict(self.outer.weights), tuple(self.versions)
        return self._pinned[name]

    def gift(self, one: MemberLog, rank: int, gift: OuterGift, frames: Sequence[Any]) -> None:
        """Take a part of the initial weights.

        Args:
            one: the island.
            rank: of the island.
            gift: what it is.
            frames: its parts.
        """
        if not self.outer.needed:
            return
        if len(frames) != len(gift.parts):
            raise refuse("a message has another number of parts than frames", got=len(frames), allowed=len(gift.parts))
        owned = self._owned(one, rank)
        for part, frame in zip(gift.parts, frames, strict=True):
            shape = self._shapes.get(part.name, ())
            box = Box(part.name, shape, part.start, part.stop)
            mine = owned.get(part.name, ()) if len(part.start) == len(part.stop) == len(shape) else ()
            if not any(_contains(each, box) for each in mine):
                raise refuse("a part is not one that this rank has", got=f"{part.name} {part.start} to {part.stop}")
            self.outer.give(box, decode(frame, box, "fp32"))
        done = self._gifts.setdefault(one.incarnation, set())
        if gift.last:
            done.add(rank)
        if done >= one.hellos.keys():
            self.outer.given()

    def trim(self) -> None:
        """Forget updates that no island comes back to."""
        if self._outer is None:
            return
        counted = [one for one in self._members.values() if one.welcomed and one.base]
        floors = [
            min((one.floor(at) for one in counted), default=version) for at, version in enumerate(self._outer.versions)
        ]
        self._outer.trim(floors)

    # --- state ------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outer weights and what belongs to them, by name."""
        return self._outer.tensors() if self._outer else {}

    def plain(self) -> dict[str, Any]:
        """Return the rest of the state for JSON."""
        return {"outer": self._outer.plain()} if self._outer else {}

    def restore(self, tensors: Mapping[str, np.ndarray[Any, Any]], plain: Mapping[str, Any]) -> None:
        """Take over what `tensors` and `plain` gave; the model is known.

        Args:
            tensors: by name.
            plain: from a checkpoint.
        """
        if not plain:
            return
        self.outer.restore(tensors, plain["outer"])
        saves = [save for one in self._members.values() for save in one.saves.values() if save.path]
        if self.terms.gradients:
            # Each step is exchanged, so the islands' saves are the state of the run; what came after is trained again.
            self._leases.roll_back()
            self.outer.roll_back(max((save.versions for save in saves), default=[0]))


def _pieces(parts: Parts) -> Iterator[Parts]:
    """Divide parts into answers of about equal size, in order."""
    piece: Parts = []
    size = 0
    for version, box in parts:
        if piece and size + 4 * box.size > _PIECE_BYTES:
            yield piece
            piece, size = [], 0
        piece.append((version, box))
        size += 4 * box.size
    if piece:
        yield piece


def _overlap(one: Box, other: Box) -> bool:
    pairs = zip(one.start, one.stop, other.start, other.stop, strict=True)
    return all(max(a, c) < min(b, d) for a, b, c, d in pairs)


def _contains(outer: Box, inner: Box) -> bool:
    pairs = zip(outer.start, inner.start, inner.stop, outer.stop, strict=True)
    return all(a <= b < c <= d or (b == c == 0 == a) for a, b, c, d in pairs)
