"""What the hub knows of one island: who it is, how fast, and what it was answered since its last save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.islands.boxes import Box
from orchestrator.islands.island_messages import Hello, Lease, LeaseStep, Welcome, read, write
from orchestrator.islands.ledger import Range, merged

_SHORTEST = 1e-6  # seconds of a lease that tell a speed
_SPEED_KEPT = 0.5  # of the measured speed so far, when a lease tells another one
Key = tuple[int, int, int]
"""Lease, fragment, and step of the lease of an offer."""


@dataclass
class Save:
    """A save of an island.

    Attributes:
        lease: with which the island goes on from it.
        versions: of the outer weights that it has then, for each fragment.
        path: of its checkpoint, as it sees it; empty: it is not known to be kept.
        step: inner steps of the island.
    """

    lease: int
    versions: list[int]
    path: str = ""
    step: int = 0


@dataclass
class MemberLog:
    """An island of the run.

    Attributes:
        name: of the island.
        incarnation: of its present start; empty: none.
        past: earlier ones.
        hellos: of its ranks.
        welcome: the answer to them, where it is decided.
        welcomed: whether it is one of the run's: tokens are given to it, or were.
        state: `away` (not there, tokens kept for it), `here`, `gone` (its tokens were given to others), `left`.
        because: why it is away or gone.
        seen_at: of the last sign of life.
        away_at: since when it is away.
        unit: sequences of its steps are a multiple of this.
        speed: sequences per second, measured; 0: not known.
        rows: sequences of its steps.
        next_lease: number of the lease that comes next.
        leases: those that were granted since its oldest save that is kept.
        booked: leases that are booked.
        followed: version of the outer weights that followed each offer.
        offered: offers that are complete, and merged or waiting to be.
        reached: of each open lease, the steps that are in a merged offer.
        base: versions of the outer weights with which it came, for each fragment.
        targets: of its last offer of each fragment.
        saves: by mark.
        place: of its devices, for people.
        trained: targets in all.
        phase: of its last sign of life.
        step: of its last sign of life.
    """

    name: str
    incarnation: str = ""
    past: set[str] = field(default_factory=set)
    hellos: dict[int, Hello] = field(default_factory=dict)
    welcome: Welcome | None = None
    welcomed: bool = False
    state: str = "away"
    because: str = ""
    seen_at: float = 0.0
    away_at: float = 0.0
    unit: int = 1
    speed: float = 0.0
    rows: int = 0
    next_lease: int = 0
    leases: dict[int, Lease] = field(default_factory=dict)
    booked: set[int] = field(default_factory=set)
    followed: dict[Key, int] = field(default_factory=dict)
    offered: set[Key] = field(default_factory=set)
    reached: dict[int, int] = field(default_factory=dict)
    base: list[int] = field(default_factory=list)
    targets: dict[int, int] = field(default_factory=dict)
    saves: dict[str, Save] = field(default_factory=dict)
    place: str = ""
    trained: int = 0
    phase: str = ""
    step: int = 0

    @property
    def counts(self) -> bool:
        """Whether tokens are given to it, or kept for it."""
        return self.welcomed and self.state in ("here", "away")

    def boxes(self, rank: int) -> list[Box]:
        """Return the parts that a rank holds, in the order of its hello.

        Args:
            rank: of the island.
        """
        hello = self.hellos[rank]
        shapes = dict(zip(hello.names, hello.shapes, strict=True))
        return [Box(one.name, shapes[one.name], one.start, one.stop) for one in hello.boxes]

    def owned(self, rank: int) -> list[Box]:
        """Return the parts that a rank sends.

        Args:
            rank: of the island.
        """
        marks = [one.owned for one in self.hellos[rank].boxes]
        return [box for box, owned in zip(self.boxes(rank), marks, strict=True) if owned]

    def out(self) -> list[Range]:
        """Return the sequences that are leased to it, and not booked."""
        return merged(one for number in self.open_leases() for one in rows_of(self.leases[number]))

    def open_leases(self) -> list[int]:
        """Return the numbers of its leases that are not booked."""
        return sorted(number for number in self.leases if number not in self.booked and self.leases[number].steps)

    def measured(self, sequences: int, seconds: float) -> None:
        """Take note of how fast a lease was.

        Args:
            sequences: of the lease.
            seconds: that it took, without waiting and compiling.
        """
        if seconds > _SHORTEST and sequences:
            speed = sequences / seconds
            self.speed = speed if not self.speed else _SPEED_KEPT * self.speed + (1 - _SPEED_KEPT) * speed

    def forget_before(self, mark: str) -> None:
        """Drop what an island that comes back does not need, which has a save under `mark`.

        Args:
            mark: of a save that is kept.
        """
        first = self.saves[mark].lease
        # Answers to offers of the lease before may still be under way at a save.
        self.saves = {name: one for name, one in self.saves.items() if one.lease >= first}
        self.leases = {n: lease for n, lease in self.leases.items() if n >= first - 1 or n not in self.booked}
        self.followed = {key: version for key, version in self.followed.items() if key[0] >= first - 2}
        self.offered = {key for key in self.offered if key[0] >= first - 2}
        self.booked = {number for number in self.booked if number in self.leases}
        self.reached = {number: step for number, step in self.reached.items() if number in self.leases}

    def forget_all(self) -> None:
        """Drop all that the island was answered: it begins anew. What it has saved may still serve another one."""
        self.leases, self.booked, self.followed, self.offered = {}, set(), {}, set()
        self.reached, self.targets = {}, {}
        self.saves = {mark: one for mark, one in self.saves.items() if one.path}
        self.welcomed, self.rows = False, 0

    def floor(self, fragment: int) -> int:
        """Return the oldest version of the outer weights that the island may come back to.

        Args:
            fragment: number of it.
        """
        kept = [one for one in self.saves.values() if one.path]
        return min((one.versions[fragment] for one in kept), default=self.base[fragment])

    def plain(self) -> dict[str, Any]:
        """Return what a hub that is started again needs, for JSON."""
        return {
            "name": self.name,
            "state": self.state,
            "because": self.because,
            "unit": self.unit,
            "speed": self.speed,
            "rows": self.rows,
            "next_lease": self.next_lease,
            "leases": [write(lease).decode() for _, lease in sorted(self.leases.items())],
            "booked": sorted(self.booked),
            "followed": [[*key, version] for key, version in sorted(self.followed.items())],
            "reached": sorted(map(list, self.reached.items())),
            "base": self.base,
            "targets": sorted(map(list, self.targets.items())),
            "saves": {mark: vars(one) for mark, one in self.saves.items()},
            "place": self.place,
            "trained": self.trained,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> MemberLog:
        """Read what `plain` gives.

        Args:
            plain: from a checkpoint.
        """
        log = cls(str(plain["name"]))
        for key in ("state", "because", "unit", "speed", "rows", "next_lease", "place", "trained"):
            setattr(log, key, type(getattr(log, key))(plain[key]))
        leases = [read(text.encode(), {"Lease": Lease}) for text in plain["leases"]]
        log.leases = {lease.lease: lease for lease in leases}
        log.booked = {int(number) for number in plain["booked"]}
        log.followed = {(int(a), int(b), int(c)): int(version) for a, b, c, version in plain["followed"]}
        # Offers that were waiting to be merged are not kept: they come again.
        log.offered = set(log.followed)
        log.reached = {int(number): int(step) for number, step in plain["reached"]}
        log.base = [int(version) for version in plain["base"]]
        log.targets = {int(fragment): int(count) for fragment, count in plain["targets"]}
        log.saves = {str(mark): Save(**one) for mark, one in plain["saves"].items()}
        log.welcomed = bool(log.leases or log.saves)
        return log


def rows_of(lease: Lease, after: int = 0) -> list[Range]:
    """Return the sequences of a lease, or of its steps behind the first `after`.

    Args:
        lease: of an island.
        after: steps that are left out.
    """
    return [one for step in lease.steps[after:] for one in step.rows]


def sequences_of(steps: Iterable[LeaseStep]) -> int:
    """Return the sequences of steps.

    Args:
        steps: of a lease.
    """
    return sum(step.sequences for step in steps)
