"""The ledger of a run's data: which sequences are still to be trained, who has them, and who has trained them.

Positions are sequences of the one training stream, from 0 on. Each is in the pool, leased, or booked, and at the end
every one is booked to exactly one island.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.errors import CheckpointError

Range = tuple[int, int]
"""Positions: the first one, and the one behind the last."""


class Ledger:
    """The sequences of a run.

    Args:
        total: sequences of the whole run.

    Attributes:
        total: sequences of the whole run.
        pool: ranges that nobody has, in order.
        booked: by island, the ranges that it has trained, in order.
    """

    def __init__(self, total: int):
        self.total = total
        self.pool: list[Range] = [(0, total)] if total else []
        self.booked: dict[str, list[Range]] = {}

    @property
    def left(self) -> int:
        """Sequences in the pool."""
        return count(self.pool)

    @property
    def done(self) -> int:
        """Sequences that are booked."""
        return sum(map(count, self.booked.values()))

    @property
    def finished(self) -> bool:
        """Whether every sequence is booked."""
        return self.done == self.total

    def take(self, sequences: int) -> list[Range]:
        """Take the first sequences out of the pool; fewer where it has no more.

        Args:
            sequences: how many.
        """
        taken, self.pool = split(self.pool, sequences)
        return taken

    def give_back(self, ranges: Iterable[Range]) -> None:
        """Put sequences back into the pool.

        Args:
            ranges: that were taken, and not booked.
        """
        self.pool = merged([*self.pool, *ranges])

    def book(self, island: str, ranges: Iterable[Range]) -> None:
        """Book sequences to an island.

        Args:
            island: its name.
            ranges: that were taken.
        """
        self.booked[island] = merged([*self.booked.get(island, ()), *ranges])

    def unbook(self, island: str, ranges: Iterable[Range]) -> None:
        """Put sequences back into the pool that were booked.

        Args:
            island: that had trained them.
            ranges: booked to it.
        """
        back = list(ranges)
        self.booked[island], _ = without(self.booked.get(island, ()), back)
        self.give_back(back)

    def plain(self) -> dict[str, Any]:
        """Return the ledger for JSON."""
        return {
            "total": self.total,
            "pool": [list(one) for one in self.pool],
            "booked": {name: [list(one) for one in ranges] for name, ranges in sorted(self.booked.items())},
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Ledger:
        """Read what `plain` gives.

        Args:
            plain: from a checkpoint.

        Raises:
            CheckpointError: it is no ledger.
        """
        ledger = cls(0)
        try:
            ledger.total = int(plain["total"])
            ledger.pool = merged([(int(a), int(b)) for a, b in plain["pool"]])
            ledger.booked = {str(n): merged([(int(a), int(b)) for a, b in r]) for n, r in plain["booked"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError("the ledger of the islands cannot be read", got=repr(error)[:100]) from error
        return ledger


def audit(ledger: Ledger, out: Iterable[Range] = ()) -> list[str]:
    """Return what is wrong with a ledger: sequences that are counted twice, or not at all. Empty: nothing.

    Args:
        ledger: of a run.
        out: ranges that are leased.
    """
    owned = [(start, stop, "the pool") for start, stop in ledger.pool]
    owned += [(start, stop, name) for name, ranges in ledger.booked.items() for start, stop in ranges]
    owned += [(start, stop, "a lease") for start, stop in out]
    problems, end, before = list[str](), 0, "the beginning"
    for start, stop, name in sorted(owned):
        if start > end:
            problems.append(f"sequences {end} to {start - 1} are nowhere")
        if start < end:
            problems.append(f"sequences {start} to {min(end, stop) - 1} are both of {before} and of {name}")
        if stop > end:
            end, before = stop, name
    if end < ledger.total:
        problems.append(f"sequences {end} to {ledger.total - 1} are nowhere")
    if end > ledger.total:
        problems.append(f"sequences {ledger.total} to {end - 1} are behind the end")
    return problems


def count(ranges: Iterable[Range]) -> int:
    """Return the number of sequences in ranges.

    Args:
        ranges: that do not overlap.
    """
    return sum(stop - start for start, stop in ranges)


def split(ranges: Sequence[Range], sequences: int) -> tuple[list[Range], list[Range]]:
    """Divide ranges into those of the first sequences, and those of the others.

    Args:
        ranges: in the order in which they are taken.
        sequences: of the first part.
    """
    first, rest = list[Range](), list[Range]()
    for start, stop in ranges:
        cut = min(stop, start + max(0, sequences))
        if cut > start:
            first.append((start, cut))
        if stop > cut:
            rest.append((cut, stop))
        sequences -= cut - start
    return first, rest


def without(pool: Iterable[Range], ranges: Iterable[Range]) -> tuple[list[Range], list[Range]]:
    """Return ranges without others, and those of the others that are not in them.

    Args:
        pool: that they are taken from.
        ranges: each within one of the pool.
    """
    rest, missing = list(pool), list[Range]()
    for start, stop in ranges:
        for at, (first, last) in enumerate(rest):
            if first <= start and stop <= last:
                rest[at : at + 1] = [one for one in ((first, start), (stop, last)) if one[1] > one[0]]
                break
        else:
            missing.append((start, stop))
    return rest, missing


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges in order, with those joined that follow upon each other. Overlaps stay as they are.

    Args:
        ranges: in any order.
    """
    found = list[Range]()
    for start, stop in sorted(one for one in ranges if one[1] > one[0]):
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found
