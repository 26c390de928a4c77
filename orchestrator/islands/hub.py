"""The hub of a run with islands: it hands out the data, merges what islands have learned, and lets them come back.

It is a state machine without sockets, files or threads of its own: requests go in, answers come out, and the clock is
given. An island is a deterministic function of its own save and of the answers here, which are logged until its next
save: one that was killed asks the same again, is answered alike, and gets to the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.config.islands_schema import IslandsConfig
from orchestrator.islands.admission import Admission
from orchestrator.islands.hub_leases import HubLeases
from orchestrator.islands.hub_merges import HubMerges
from orchestrator.islands.hub_state import HubState
from orchestrator.islands.island_messages import (
    Answer,
    Beating,
    Bye,
    Hello,
    LeaseRequest,
    MessageError,
    Offer,
    OuterGift,
    OuterRequest,
    Peer,
    Refused,
    Report,
    Request,
    Saved,
    Score,
    Taken,
    Terms,
    UpdateRequest,
)
from orchestrator.islands.ledger import Ledger
from orchestrator.islands.member_log import MemberLog
from orchestrator.islands.probes import Probes
from orchestrator.islands.refusal import RefusedError, refuse
from orchestrator.islands.run_terms import RunTerms

Frames = Sequence[Any]
Answered = tuple[Answer, list[bytes | memoryview]]
Note = Callable[[dict[str, Any]], object]
_LONGEST = 1e9  # seconds of a lease
_LONGEST_MARK = 256


class Hub:
    """The hub of a run.

    Args:
        terms: of the exchange.
        settings: further settings of the group `islands`.
        facts: of the run.
        state: of an earlier hub of the run; None: the run begins.
        clock: seconds, from any point on.
        note: called with what is worth being recorded: exchanges, reports, islands that come and go.
        repeat: recorded notes of a run whose leases and merges are to be made again.

    Attributes:
        answers: to be sent: peer, number of the request, answer and its frames.
        members: the islands, by name.
        stop: the signal by which the run was asked to stop; 0: none.
    """

    def __init__(
        self,
        terms: Terms,
        settings: IslandsConfig,
        facts: RunTerms,
        state: HubState | None = None,
        clock: Callable[[], float] = time.monotonic,
        note: Note = lambda about: None,
        repeat: Sequence[Mapping[str, Any]] = (),
    ):
        self.terms, self.settings, self.facts, self._clock = terms, settings, facts, clock
        self.answers: list[tuple[Peer, int, Answer, list[bytes | memoryview]]] = []
        self.members: dict[str, MemberLog] = {}
        self.stop, self._began, self._note = 0, clock(), note
        self._waiting: dict[tuple[Peer, str], tuple[int, Request]] = {}
        self._probes = Probes()
        self._out: set[str] = set()  # islands whose weights were wrong
        self._leases = HubLeases(terms, settings, facts, self.members, self.note, repeat)
        self._merges = HubMerges(terms, settings, self.members, self._leases, self.note, repeat)
        self._admission = Admission(terms, facts, self.members, self._leases, self._merges, self.note)
        self._mark: str | None = None
        self._marks = 0
        if state is not None:
            self._restore(state)

    # --- what the process around it asks ------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """Which sequences are in the pool, and booked to whom."""
        return self._leases.ledger

    @property
    def step(self) -> int:
        """Global steps that are booked."""
        return int(self._leases.ledger.done // self.facts.sequences)

    @property
    def versions(self) -> tuple[int, ...]:
        """Merges of each fragment so far."""
        return tuple(self._merges.versions)

    @property
    def ended(self) -> bool:
        """Whether every sequence is booked."""
        return self._leases.ledger.finished

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do: all is booked and every island has left, or the run was stopped."""
        states = {one.state for one in self.members.values() if one.welcomed}
        if self.stop:
            return "here" not in states
        # Who is away comes back for the last weights, or is given up when its time is over.
        return bool(self.members) and self.ended and not states & {"here", "away"}

    @property
    def save_ready(self) -> bool:
        """Whether all islands have saved what was asked for: then `capture` gives the hub's part."""
        if self._mark is None:
            return False
        present = [one for one in self.members.values() if one.welcomed and one.state == "here"]
        return bool(present) and all(self._mark in one.saves and one.saves[self._mark].path for one in present)

    def capture(self) -> HubState:
        """Return the state of the run as it is now: the saves of the islands, and all that has been answered since."""
        mark, self._mark = self._mark, None
        self._leases.mark = ""
        members = [one for one in self.members.values() if one.saves or one.leases]
        saved = {one.name: one.saves[name] for one in members if (name := self._newest(one, mark)) is not None}
        plain = {
            "terms": vars(self.terms),
            "run": self.facts.run,
            "mark": mark or "",
            "step": self.step,
            "members": [one.plain() for one in members],
            "saves": {name: vars(save) for name, save in sorted(saved.items())},
            "leases": self._leases.plain(),
            "merges": self._merges.plain(),
            "out": sorted(self._out),
            "marks": self._marks,
            "model": self._admission.plain(),
        }
        return HubState(self._merges.tensors(), plain)

    def kept(self, state: HubState) -> None:
        """Forget what nobody needs who comes back, as this state is kept.

        Args:
            state: of `capture`, that has been written.
        """
        mark = state.plain["mark"]
        for one in self.members.values():
            if mark in one.saves and one.saves[mark].path:  # who was lost before it had saved goes on from an older one
                one.forget_before(mark)
        self._merges.trim()

    def request_save(self) -> None:
        """Ask all islands to save at their next lease."""
        if self._mark is None and any(one.state == "here" for one in self.members.values()):
            self._marks += 1
            self._mark = self._leases.mark = f"{self.step}.{self._marks}"

    def request_stop(self, signal: int) -> None:
        """Ask all islands to save, and leave.

        Args:
            signal: the number of it.
        """
        self.stop = signal

    def lost(self, island: str, why: str) -> None:
        """Take note that an island is not there any more.

        Args:
            island: its name.
            why: in a sentence.
        """
        one = self.members.get(island)
        if one is not None and one.state == "here":
            one.state, one.because, one.away_at = "away", why, self._clock()
            self._leases.present_changed()
            self.note({"kind": "away", "island": island, "because": why})
        self._advance()

    def give_up(self, island: str, why: str) -> None:
        """Give the data of an island to the others: it does not come back, or begins anew.

        Args:
            island: its name.
            why: in a sentence.
        """
        one = self.members.get(island)
        if one is not None and one.state != "gone":
            back = self._leases.give_up(one)
            self._merges.give_up(one)
            one.state, one.because = "gone", why
            self.note({"kind": "gone", "island": island, "because": why, "sequences": back})
        self._advance()

    def tick(self) -> None:
        """See who has been silent for too long. To be called about once a second."""
        now = self._clock()
        for one in list(self.members.values()):
            if one.state == "here" and now - one.seen_at > self.settings.timeout_seconds:
                self.lost(one.name, f"no sign of life for {self.settings.timeout_seconds:g} s")
            elif one.state == "away" and one.welcomed and now - one.away_at > self.settings.patience_seconds:
                self.give_up(one.name, f"away for {self.settings.patience_seconds:g} s (islands.patience_seconds)")
        if now - self._began > self.settings.patience_seconds:
            self._leases.begin_without_all()
        if self._merges.retained_bytes > self.settings.retained_mib << 20:
            self.request_save()
        self._advance()

    # --- requests -----------------------------------------------------------------------------------

    def handle(self, peer: Peer, number: int, request: Request, frames: Frames = ()) -> None:
        """Take a request. Its answer is in `answers` now or later.

        Args:
            peer: who asks.
            number: of the request, by which the peer knows the answer.
            request: of the protocol.
            frames: its bytes, whose hashes are right.
        """
        one = self.members.get(peer.island)
        if one is not None and one.incarnation == peer.incarnation:
            one.seen_at = self._clock()
            if one.state == "away" and one.welcome is not None:
                one.state = "here"
                self.note({"kind": "back", "island": one.name})
        try:
            answered = self._answer(peer, request, frames)
        except RefusedError as refusal:
            answered = refusal.refused, []
        except MessageError as error:
            answered = Refused(error.what, str(error.got or ""), str(error.allowed or "")), []
        self._settle(peer, number, request, answered)
        self._advance()

    def _settle(self, peer: Peer, number: int, request: Request, answered: Answered | None) -> None:
        if answered is None:
            self._waiting[peer, _key(request)] = (number, request)
        else:
            self.answers.append((peer, number, *answered))

    def _advance(self) -> None:
        """Answer what could not be answered before, until nothing more changes."""
        self._save_when_due()
        changed = True
        while changed:
            changed = self._merges.merge_ready(self._clock())
            for (peer, key), (number, request) in list(self._waiting.items()):
                one = self.members.get(peer.island)
                if one is None or (one.incarnation != peer.incarnation):
                    del self._waiting[peer, key]
                    continue
                try:
                    answered = self._answer(peer, request, ())
                except RefusedError as refusal:
                    answered = refusal.refused, []
                if answered is not None:
                    del self._waiting[peer, key]
                    self.answers.append((peer, number, *answered))
                    changed = True

    def _save_when_due(self) -> None:
        every = self.facts.save_every
        if every and self._leases.crossed("save", every):
            self.request_save()
        if self._leases.wants_save:
            self._leases.wants_save, self._mark = False, None
            self.request_save()
            self._leases.grant_saves()

    def _answer(self, peer: Peer, request: Request, frames: Frames) -> Answered | None:
        if isinstance(request, Hello):
            return self._hello(peer, request)
        one = self._known(peer)
        if isinstance(request, LeaseRequest):
            lease = self._leases.lease(one, request.lease, self._merges.versions)
            return None if lease is None else (lease, [])
        if isinstance(request, Offer):
            self._offer(one, peer, request, frames)
        elif isinstance(request, UpdateRequest):
            return self._merges.update(one, peer.rank, request)
        elif isinstance(request, OuterRequest):
            return self._merges.outer_part(one, peer.rank, request)
        elif isinstance(request, OuterGift):
            self._merges.gift(one, peer.rank, request, frames)
        elif isinstance(request, Report):
            self._report(one, request)
        elif isinstance(request, Saved):
            self._saved(one, request)
        elif isinstance(request, Score):
            self._score(one, request)
        elif isinstance(request, Beating):
            one.phase, one.step = request.phase, request.step
        elif isinstance(request, Bye):
            self._bye(one, request)
        return Taken(self.stop), []

    def _known(self, peer: Peer) -> MemberLog:
        one = self.members.get(peer.island)
        if one is None or not one.incarnation or peer.rank not in one.hellos:
            raise refuse(
                "the hub does not know this island: it was started anew",
                got=peer.island,
                fix="start the island again: it goes on from its newest save",
                again=True,
            )
        if one.incarnation != peer.incarnation:
            raise refuse(
                "another process of this island has come",
                got=peer.island,
                fix="end this one; islands that train side by side need names of their own (islands.island=NAME)",
            )
        if one.state == "gone":
            raise refuse(
                "the data of this island was given to the others",
                got=f"{peer.island}: {one.because}",
                fix="start the island again: it takes the outer weights and goes on from there",
                again=True,
            )
        return one

    def _hello(self, peer: Peer, hello: Hello) -> Answered | None:
        if peer.island in self._out:
            raise refuse(
                "this island was set aside, as its weights were not those of the others",
                got=f"{peer.island}: {self.members[peer.island].because}",
                fix="look at its devices (python -m orchestrator certify); another name lets other devices come",
            )
        one = self._admission.meet(peer, hello, self._clock())
        welcome = self._admission.welcome(one, peer.rank)
        return None if welcome is None else (welcome, [])

    def _offer(self, one: MemberLog, peer: Peer, offer: Offer, frames: Frames) -> None:
        wrong = self._merges.offer(one, peer.rank, offer, frames)
        if wrong is not None:
            self._set_aside(one, wrong)
            raise refuse(wrong, got=one.name, fix="look at its devices: python -m orchestrator certify")

    def _set_aside(self, one: MemberLog, wrong: str) -> None:
        self._out.add(one.name)
        self.note({"kind": "set aside", "island": one.name, "because": wrong})
        self.give_up(one.name, wrong)

    def _report(self, one: MemberLog, report: Report) -> None:
        lease = one.leases.get(report.lease)
        if lease is None or len(report.losses) != len(lease.steps) or len(report.targets) != len(lease.steps):
            return  # of a lease before its last save
        if not all(0 <= seconds <= _LONGEST for seconds in (report.seconds, report.waited, report.compiled)):
            raise refuse("a lease cannot have taken so long", got=report.seconds, allowed=f"0 to {_LONGEST:g} s")
        if any(count < 0 for count in report.targets):
            raise refuse("a step cannot have so few targets", got=min(report.targets), allowed="0 or more")
        self._leases.reported(one, report)

    def _saved(self, one: MemberLog, saved: Saved) -> None:
        if saved.problem:
            self.note({"kind": "not saved", "island": one.name, "because": saved.problem})
            if saved.mark == self._mark:
                self._mark, self._leases.mark = None, ""
            return
        if not 0 < len(saved.mark) <= _LONGEST_MARK or not 0 <= saved.lease <= one.next_lease:
            raise refuse("a save is of no mark or lease of this island", got=f"{saved.mark[:80]!r}, {saved.lease}")
        if saved.mark not in one.saves:  # a save of its own, such as at a stop
            self._leases.note_save(one, saved.mark, saved.lease)
        one.saves[saved.mark] = replace(one.saves[saved.mark], path=saved.path, step=saved.step)
        self.note({"kind": "saved", "island": one.name, "mark": saved.mark, "path": saved.path})

    def _score(self, one: MemberLog, score: Score) -> None:
        if score.what == "probe":
            self._probes.check(score)
        about = {"kind": score.what, "island": one.name, "at": score.at, "values": list(score.values)}
        self.note({**about, "names": list(score.names), "versions": list(score.versions), "lease": score.lease})
        if score.what == "probe" and (compared := self._probes.heard(one.name, score)) is not None:
            self.note({"kind": "handover", **vars(compared)})
            if not compared.agrees:
                found = f"loss by {compared.loss:.1e}, gradient norm by {compared.grad_norm:.1e}"
                wrong = f"the island '{one.name}' does not compute what '{compared.other}' does: {found}"
                self._set_aside(one, wrong)

    def _bye(self, one: MemberLog, bye: Bye) -> None:
        self.note({"kind": "bye", "island": one.name, "status": bye.status, "why": bye.why})
        if bye.status == "failed":
            self.give_up(one.name, bye.why or "it has failed")
        elif bye.status == "stopped" or not self.ended:
            self.lost(one.name, bye.why or "it was stopped")
        else:
            one.state = "left"

    def note(self, about: dict[str, Any]) -> None:
        """Let something be recorded, with the seconds since the hub has begun.

        Args:
            about: plain data, with its `kind`.
        """
        self._note({"after": round(self._clock() - self._began, 3), **about})

    # --- state ----------------------------------------------------------------------------------------

    def _newest(self, one: MemberLog, mark: str | None) -> str | None:
        kept = {name: save for name, save in one.saves.items() if save.path}
        if mark in kept:
            return mark
        return max(kept, key=lambda name: kept[name].lease, default=None)

    def _restore(self, state: HubState) -> None:
        for plain in state.plain["members"]:
            one = MemberLog.from_plain(plain)
            if one.state == "here":
                one.state, one.because = "away", "the hub was started anew"
            one.away_at = self._clock()
            self.members[one.name] = one
        self._out, self._marks = set(state.plain["out"]), int(state.plain["marks"])
        self._leases.restore(state.plain["leases"])
        self._admission.restore(state.plain["model"])
        self._merges.restore(state.tensors, state.plain["merges"])


def _key(request: Request) -> str:
    """Return what a request is the same as, that a peer asks again."""
    plain = {name: value for name, value in vars(request).items() if isinstance(value, (int, str))}
    return f"{type(request).__name__} {sorted(plain.items())}"
