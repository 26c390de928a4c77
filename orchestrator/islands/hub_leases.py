"""The leases of a run: what each island trains on next, and what has become of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.config.islands_schema import IslandsConfig
from orchestrator.islands.island_messages import Lease, LeaseStep, Report, Terms
from orchestrator.islands.lease_planning import better_rows, divide_rows, own_length, own_steps, round_steps
from orchestrator.islands.ledger import Ledger, Range, count, without
from orchestrator.islands.member_log import MemberLog, Save, rows_of, sequences_of
from orchestrator.islands.refusal import refuse
from orchestrator.islands.run_terms import RunTerms

_AHEAD = 2  # rounds that are handed out and not merged


class HubLeases:
    """Hands out the sequences of a run.

    Args:
        terms: of the exchange.
        settings: further settings of the group `islands`.
        facts: of the run.
        members: the islands, by name; the hub's own table.
        note: records.
        repeat: notes of a run whose leases are made again.

    Attributes:
        ledger: which sequences are in the pool, and booked to whom.
        open: rounds that are handed out, and not merged: by round, the lease of each island.
        left: fragments of these rounds that are not merged.
        mark: of the save that is asked for; empty: none.
        joining: islands that wait until no round is open.
        probing: islands that measure the reference batch at their next lease.
        wants_save: an island that joins needs a save of another one.
    """

    def __init__(
        self,
        terms: Terms,
        settings: IslandsConfig,
        facts: RunTerms,
        members: dict[str, MemberLog],
        note: Callable[[dict[str, Any]], object],
        repeat: Sequence[Mapping[str, Any]] = (),
    ):
        self.terms, self._settings, self._facts, self._members, self._note = terms, settings, facts, members, note
        self.ledger = Ledger(facts.max_steps * facts.sequences)
        self.open: dict[int, dict[str, int]] = {}
        self.left: dict[int, set[int]] = {}
        self.mark = ""
        self.joining: set[str] = set()
        self.probing: set[str] = set()
        self.wants_save = False
        self._round, self._rows = 0, dict[str, int]()
        self._began = False
        self._crossed: dict[str, int] = {}
        self._recorded = {(one["island"], one["lease"]): one for one in repeat if one.get("kind") == "lease"}

    @property
    def issued(self) -> int:
        """Sequences that are leased or booked."""
        return self.ledger.total - self.ledger.left

    @property
    def quiet(self) -> bool:
        """Whether no round is open."""
        return not self.open

    def crossed(self, what: str, every: int) -> bool:
        """Return whether another multiple of so many global steps was handed out since this was asked last.

        Args:
            what: is asked for.
            every: global steps.
        """
        number = self.issued // (every * self._facts.sequences)
        before, self._crossed[what] = self._crossed.get(what, 0), number
        return number > before

    def leader(self) -> str | None:
        """Return the island that evaluates and speaks for the run: of those present the first one of the run."""
        present = [name for name, one in self._members.items() if one.welcomed and one.state == "here"]
        order = list(self._facts.expected)
        return min(present, key=lambda name: (order.index(name) if name in order else len(order), name), default=None)

    def begin_without_all(self) -> None:
        """Begin although not all islands that were expected have come."""
        self._began = True

    def present_changed(self) -> None:
        """Take note that an island came or went: shares are divided anew."""
        self._rows = {}

    # --- to hand out ------------------------------------------------------------------------------------

    def lease(self, one: MemberLog, number: int, versions: Sequence[int]) -> Lease | None:
        """Return a lease of an island; None: it has to wait.

        Args:
            one: the island.
            number: of the lease.
            versions: of the outer weights now.
        """
        if number in one.leases:
            return one.leases[number]
        if number != one.next_lease:
            raise refuse("this lease is not the island's next one", got=number, allowed=one.next_lease)
        if self.ledger.finished:
            return Lease(number, self._round, 0, (), tuple(versions))
        if recorded := self._recorded.get((one.name, number)):
            self._repeat(one, recorded)
        elif self.terms.algorithm == "decoupled":
            if self.ledger.left:
                self._grant_own(one)
        elif self._may_plan():
            self._plan_round()
        return one.leases.get(number)

    def _may_plan(self) -> bool:
        if not self._began:
            there = {name for name, one in self._members.items() if one.welcomed}
            if self._facts.expected.keys() - there:
                return False
            self._began = True
        return not self.joining and len(self.open) < _AHEAD and self.ledger.left > 0

    def _plan_round(self) -> None:
        """Hand out the next H global batches to all islands together."""
        takers = {name: one for name, one in self._members.items() if one.counts}
        rows = self._divided(takers)
        batch = self._facts.sequences
        begun = self.issued
        ranges = self.ledger.take(self._length() * batch)
        plans = round_steps(ranges, begun, batch, rows, self._facts.max_steps - 1)
        if not self.terms.gradients:  # there each step of a round is exchanged, by all
            plans = {name: [step for step in steps if step.rows] for name, steps in plans.items()}
        number, self._round = self._round, self._round + 1
        self.open[number] = {}
        self.left[number] = set(range(max(1, self.terms.fragments)))
        for name, steps in plans.items():
            if steps:
                self.open[number][name] = takers[name].next_lease
                self._grant(takers[name], number, rows[name], steps)

    def grant_saves(self) -> None:
        """Let all islands save before anything else is handed out: by a lease without steps."""
        for one in self._members.values():
            if one.counts and self.mark and one.next_lease - 1 not in one.open_leases():
                self._grant(one, self._round, 0, [])

    def _length(self) -> int:
        return 1 if self.terms.gradients else self.terms.inner_steps

    def _divided(self, takers: Mapping[str, MemberLog]) -> dict[str, int]:
        """Return the sequences of a step for each island."""
        units = {name: one.unit for name, one in takers.items()}
        given = {name: self._facts.expected.get(name) for name in takers}
        if self._rows.keys() != takers.keys():
            known = [share for share in given.values() if share is not None]
            speeds = {name: one.speed for name, one in takers.items()}
            if known:  # what has none gets as much as the others on average
                shares = {name: share or sum(known) / len(known) for name, share in given.items()}
            elif all(speeds.values()):
                shares = speeds
            else:
                shares = dict.fromkeys(takers, 1.0)
            self._rows = divide_rows(self._facts.sequences, shares, units)
            self._note({"kind": "shares", "rows": dict(self._rows), "round": self._round})
        elif not any(given.values()) and self._round & (self._round - 1) == 0:
            # In rounds 1, 2, 4, 8 and so on: other shapes may have to be compiled.
            new = better_rows(self._rows, {name: one.speed for name, one in takers.items()}, units)
            if new is not None:
                self._rows = new
                self._note({"kind": "shares", "rows": dict(new), "round": self._round})
        return self._rows

    def _grant_own(self, one: MemberLog) -> None:
        """Hand out sequences to one island, which goes at its own pace."""
        here = {name: each for name, each in self._members.items() if each.counts}
        if not one.rows:
            one.rows = self._divided(here)[one.name]
        speeds = [each.speed for each in here.values()]
        given = [self._facts.expected.get(name) for name in here]
        speed = one.speed
        if all(given):  # shares that the user has given stand for speeds
            speeds = [share or 0.0 for share in given]
            speed = self._facts.expected[one.name] or 0.0
        steps = own_length(speed, speeds, one.rows, self.terms.inner_steps, self.ledger.left)
        begun = self.issued
        ranges = self.ledger.take(steps * one.rows)
        plan = own_steps(ranges, begun, one.rows, self._facts.sequences, self._facts.max_steps - 1)
        self._grant(one, self._round, one.rows, plan)
        self._round += 1

    def _repeat(self, one: MemberLog, recorded: Mapping[str, Any]) -> None:
        """Hand out what a recorded run did."""
        steps = [LeaseStep(at, tuple((a, b) for a, b in rows)) for at, rows in recorded["steps"]]
        wanted = [row for step in steps for row in step.rows]
        pool, missing = without(self.ledger.pool, wanted)
        if missing:
            raise refuse(
                "the recorded schedule does not fit: sequences of it are not to be had",
                got=missing[:3],
                fix="repeat it with the same islands, from the same beginning",
            )
        self.ledger.pool = pool
        number = int(recorded["round"])
        if self.terms.algorithm != "decoupled":
            self.open.setdefault(number, {})[one.name] = one.next_lease
            self.left.setdefault(number, set(range(max(1, self.terms.fragments))))
        self._grant(one, number, int(recorded["rows"]), steps)

    def _grant(self, one: MemberLog, round_number: int, rows: int, steps: Sequence[LeaseStep]) -> None:
        padded = -(-max([rows, *(step.sequences for step in steps)]) // one.unit) * one.unit
        leads = one.name == self.leader()
        every = self._facts.eval_every
        mark = "" if self.mark in one.saves else self.mark
        lease = Lease(
            one.next_lease,
            round_number,
            padded,
            tuple(steps),
            save=mark,
            evaluate=bool(leads and every and self.crossed("evaluate", every)),
            probe=one.name in self.probing,
        )
        self.probing.discard(one.name)
        if mark:
            self.note_save(one, mark, lease.lease)
        one.leases[lease.lease] = lease
        one.next_lease += 1
        plan = [[step.at, [list(row) for row in step.rows]] for step in steps]
        about = {"kind": "lease", "island": one.name, "lease": lease.lease, "round": round_number}
        self._note({**about, "rows": rows, "steps": plan})

    # --- what becomes of it -----------------------------------------------------------------------------

    def note_save(self, one: MemberLog, mark: str, lease: int) -> None:
        """Take note that an island will save before a lease.

        Args:
            one: the island.
            mark: of the save.
            lease: with which it goes on from it.
        """
        versions = list(one.base)
        for (number, fragment, _), version in one.followed.items():
            # What followed the last lease is not applied yet, where islands go on meanwhile.
            if number <= lease - (2 if self.terms.overlap_steps else 1):
                versions[fragment] = max(versions[fragment], version)
        one.saves[mark] = Save(lease, versions)

    def book(self, one: MemberLog, number: int) -> None:
        """Book a lease to its island.

        Args:
            one: the island.
            number: of the lease.
        """
        if number not in one.booked:
            one.booked.add(number)
            self.ledger.book(one.name, rows_of(one.leases[number]))

    def merged(self, round_number: int, fragment: int) -> None:
        """Take note that all islands of a round have exchanged a fragment.

        Args:
            round_number: of the round.
            fragment: number of it.
        """
        self.left[round_number].discard(fragment)
        if not self.left[round_number]:
            del self.left[round_number], self.open[round_number]

    def reported(self, one: MemberLog, report: Report) -> None:
        """Take note of what an island says of a lease.

        Args:
            one: the island.
            report: of it.
        """
        lease = one.leases[report.lease]
        one.measured(sequences_of(lease.steps), report.seconds - report.waited - report.compiled)
        self._note(
            {
                "kind": "report",
                "island": one.name,
                "at": [step.at for step in lease.steps],
                "sequences": [step.sequences for step in lease.steps],
                "round": lease.round,
                **vars(report),
            }
        )

    def give_up(self, one: MemberLog) -> int:
        """Put what an island has not trained back into the pool, and forget what it was answered.

        Args:
            one: the island.

        Returns:
            Sequences that others train.
        """
        back = list[Range]()
        for number in one.open_leases():
            lease, reached = one.leases[number], one.reached.get(number, 0)
            # What reached the outer weights, if only in some fragments, is not trained by another one, too.
            self.ledger.book(one.name, rows_of(replace(lease, steps=lease.steps[:reached])))
            back += rows_of(lease, reached)
        self.ledger.give_back(back)
        for number in list(self.open):
            self.open[number].pop(one.name, None)
            if not self.open[number]:
                del self.open[number], self.left[number]
        one.forget_all()
        self.joining.discard(one.name)
        self.present_changed()
        return count(back)

    def roll_back(self) -> None:
        """Take the run back to the saves of its islands, all of one step."""
        for one in self._members.values():
            first = max((save.lease for save in one.saves.values()), default=0)
            for number in [number for number in one.leases if number >= first]:
                rows = rows_of(one.leases.pop(number))
                if number in one.booked:
                    self.ledger.unbook(one.name, rows)
                else:
                    self.ledger.give_back(rows)
            one.next_lease = first
            one.booked = {number for number in one.booked if number < first}
            one.followed = {key: version for key, version in one.followed.items() if key[0] < first}
            one.offered, one.reached = set(one.followed), {}
        self.open, self.left = {}, {}

    # --- state ------------------------------------------------------------------------------------------

    def plain(self) -> dict[str, Any]:
        """Return the state for JSON."""
        return {
            "ledger": self.ledger.plain(),
            "open": [[number, sorted(leases.items())] for number, leases in sorted(self.open.items())],
            "left": [[number, sorted(left)] for number, left in sorted(self.left.items())],
            "round": self._round,
            "rows": self._rows,
            "began": self._began,
            "crossed": self._crossed,
        }

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Take over what `plain` gave.

        Args:
            plain: from a checkpoint.
        """
        total = self.ledger.total
        self.ledger = Ledger.from_plain(plain["ledger"])
        if total > self.ledger.total:  # a longer run
            self.ledger.give_back([(self.ledger.total, total)])
            self.ledger.total = total
        self.open = {int(number): {str(name): int(lease) for name, lease in leases} for number, leases in plain["open"]}
        self.left = {int(number): {int(one) for one in left} for number, left in plain["left"]}
        self._round, self._began = int(plain["round"]), bool(plain["began"])
        self._rows = {str(name): int(rows) for name, rows in plain["rows"].items()}
        self._crossed = {str(name): int(number) for name, number in plain["crossed"].items()}
