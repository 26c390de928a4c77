"""Who is let into a run with islands, and how it begins."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.islands.boxes import Box
from orchestrator.islands.hub_leases import HubLeases
from orchestrator.islands.hub_merges import HubMerges
from orchestrator.islands.island_messages import PROTOCOL, Hello, Peer, Terms, Welcome
from orchestrator.islands.member_log import MemberLog
from orchestrator.islands.refusal import refuse
from orchestrator.islands.run_terms import RunTerms

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST_ELEMENTS = 1 << 44
_MOST_RANKS = 1 << 16
_MOST_DIMS = 32  # of a tensor, as NumPy has them
_FASTEST = 1e12  # sequences per second
_MODEL = ("model", "data", "seq_len", "seed", "names", "shapes")  # fields of a hello that all islands have alike


class Admission:
    """Lets islands in.

    Args:
        terms: of the exchange.
        facts: of the run.
        members: the islands, by name; the hub's own table.
        leases: of the run.
        merges: of the run.
        note: records.
    """

    def __init__(
        self,
        terms: Terms,
        facts: RunTerms,
        members: dict[str, MemberLog],
        leases: HubLeases,
        merges: HubMerges,
        note: Callable[[dict[str, Any]], object],
    ):
        self.terms, self._facts, self._members = terms, facts, members
        self._leases, self._merges, self._note = leases, merges, note
        self._known: dict[str, Any] = {}
        self._giver = ""  # the island that is asked for the initial weights

    def meet(self, peer: Peer, hello: Hello, now: float) -> MemberLog:
        """Take note of a rank that comes.

        Args:
            peer: who it is.
            hello: what it says.
            now: by the hub's clock.

        Returns:
            Its island.
        """
        self._check(peer, hello)
        one = self._members.setdefault(peer.island, MemberLog(peer.island))
        if peer.incarnation in one.past:
            raise refuse(
                "another process of this island has come",
                got=peer.island,
                fix="end this one; islands that train side by side need names of their own (islands.island=NAME)",
            )
        if one.incarnation != peer.incarnation:
            if one.incarnation:
                one.past.add(one.incarnation)
            one.incarnation, one.hellos, one.welcome = peer.incarnation, {}, None
        if one.hellos.get(peer.rank) != hello:
            if one.welcome is not None:
                fix = "start the island again"
                raise refuse("a rank says something else of itself than when it came", got=peer.island, fix=fix)
            one.hellos[peer.rank] = hello
            one.unit, one.place = hello.unit, hello.place or one.place
        one.seen_at = now
        return one

    def welcome(self, one: MemberLog, rank: int) -> Welcome | None:
        """Return how an island begins; None: not yet.

        Args:
            one: the island.
            rank: of the island.
        """
        if one.welcome is None:
            ranks = one.hellos[rank].ranks
            if len(one.hellos) < ranks or any(hello.ranks != ranks for hello in one.hellos.values()):
                return None
            self._check_parts(one)
            one.welcome = self._decide(one)
            if one.welcome is not None:
                one.welcomed, one.state = True, "here"
                one.speed = one.speed or one.hellos[0].speed
                self._leases.joining.discard(one.name)
                about = {"kind": "welcome", "island": one.name, "start": one.welcome.start, "place": one.place}
                self._note({**about, "lease": one.welcome.lease, "versions": list(one.welcome.versions)})
        return one.welcome

    def _decide(self, one: MemberLog) -> Welcome | None:
        hello = one.hellos[0]
        save = one.saves.get(hello.mark)
        if one.welcomed and save is not None and save.lease == hello.lease and self._has_log(one, save.lease):
            return self._welcome(one, "replay", save.lease, tuple(save.versions))
        if one.welcomed and hello.lease is None and self._has_all(one):
            return self._welcome(one, "keep", 0, tuple(one.base))  # it had saved nothing yet
        if one.welcomed:
            back = self._leases.give_up(one)
            self._merges.give_up(one)
            self._note({"kind": "begins anew", "island": one.name, "sequences": back})
        started = any(self._merges.versions)
        if self.terms.gradients:
            return self._into_gradients(one, started)
        if self._merges.outer.needed:
            giver = self._members.get(self._giver)
            if giver is not None and giver is not one and giver.state == "here":
                return None
            self._giver = one.name
            return self._begin(one, "give")
        if not started and not hello.mark:
            return self._begin(one, "keep")
        if not self._leases.quiet:
            # At the end of the rounds that are under way, all have the same weights.
            self._leases.joining.add(one.name)
            return None
        self._merges.pin(one.name)
        return self._begin(one, "take", self._donor(one))

    def _into_gradients(self, one: MemberLog, started: bool) -> Welcome | None:
        """Let an island into a run that exchanges gradients: it needs the weights of another one, as they are now."""
        if not started and not one.hellos[0].mark:
            return self._begin(one, "keep")
        self._leases.joining.add(one.name)
        if not self._leases.quiet:
            return None
        now = self._merges.versions
        for other in self._members.values():
            for save in other.saves.values():
                if other is not one and save.path and save.versions == now:
                    return self._begin(one, "restore", save.path)
        coming = [save for other in self._members.values() for save in other.saves.values() if not save.path]
        self._leases.wants_save = not any(save.versions == now for save in coming)
        return None

    def _begin(self, one: MemberLog, start: Any, path: str = "") -> Welcome:
        # Each one that comes measures the reference batch, and with one that joins the leading island does, too.
        leader = self._leases.leader() if any(self._merges.versions) else None
        self._leases.probing |= {one.name, leader or one.name}
        one.base = self._merges.versions
        self._leases.present_changed()
        return self._welcome(one, start, one.next_lease, tuple(one.base), path)

    def _welcome(self, one: MemberLog, start: Any, lease: int, versions: tuple[int, ...], path: str = "") -> Welcome:
        present = self._leases.leader()
        leads = present is None or present == one.name
        return Welcome(self._facts.run, self.terms, start, lease, versions, leads, path)

    def _has_log(self, one: MemberLog, lease: int) -> bool:
        return all(number in one.leases for number in range(lease, one.next_lease))

    def _has_all(self, one: MemberLog) -> bool:
        """Whether an island that begins with initial weights can be answered as it was before."""
        given = self.terms.gradients or not self._merges.outer.needed
        return given and not any(one.base) and self._has_log(one, 0)

    def _donor(self, one: MemberLog) -> str:
        """Return the newest save of an island, the own one last: its moments fit the outer weights best."""
        saves = [
            (other is not one, save.lease, save.path)
            for other in self._members.values()
            for save in other.saves.values()
            if save.path
        ]
        return max(saves)[2] if saves else ""

    # --- checks -----------------------------------------------------------------------------------------

    def _check(self, peer: Peer, hello: Hello) -> None:
        if hello.protocol != PROTOCOL:
            fix = "install the same version of orchestrator for all islands"
            raise refuse("the island speaks another version of the protocol", hello.protocol, PROTOCOL, fix)
        if hello.run and hello.run != self._facts.run:
            fix = "give islands.join of the island's own run, or another runs_dir"
            raise refuse("the island is one of another run", hello.run, self._facts.run, fix)
        if not _NAME.fullmatch(peer.island) or hello.island != peer.island:
            raise refuse("the name of an island is a word", got=ascii(peer.island)[:80], allowed="letters, digits, -_.")
        if not 0 <= peer.rank < hello.ranks <= _MOST_RANKS or hello.rank != peer.rank or hello.unit < 1:
            raise refuse("an island's rank is none of its ranks", got=f"{peer.rank} of {hello.ranks}")
        if not 0 <= hello.speed <= _FASTEST:
            raise refuse("an island cannot be that fast", got=hello.speed, allowed=f"0 to {_FASTEST:g}")
        for what, got, wanted in (
            ("train.max_steps", hello.max_steps, self._facts.max_steps),
            ("train.global_batch_tokens / train.seq_len", hello.sequences, self._facts.sequences),
        ):
            if got != wanted:
                fix = "give all islands the words of the run"
                raise refuse(f"the island was started with another {what}", got, wanted, fix)
        self._check_model(hello)

    def _check_model(self, hello: Hello) -> None:
        mine = {name: getattr(hello, name) for name in _MODEL}
        if not self._known:
            self._check_shapes(hello)
            self._known = mine
            self._merges.set_model(dict(zip(hello.names, hello.shapes, strict=True)))
        words = {"model": "model", "data": "data (sources, tokenizer or order)", "seq_len": "train.seq_len"}
        for name in _MODEL:
            if mine[name] != self._known[name]:
                got, wanted = (str(each[name])[:60] for each in (mine, self._known))
                what = words.get(name, name)
                fix = "give all islands the same model, data and seed"
                raise refuse(f"the island has another {what} than the run", got, wanted, fix)
        self._check_boxes(hello)

    def _check_shapes(self, hello: Hello) -> None:
        wrong = len(hello.names) != len(hello.shapes) or len(set(hello.names)) != len(hello.names) or not hello.names
        if any(len(shape) > _MOST_DIMS for shape in hello.shapes):
            raise refuse("a tensor of the island has too many dims", allowed=_MOST_DIMS)
        sizes = [math.prod(shape) for shape in hello.shapes]
        if wrong or any(length < 0 for shape in hello.shapes for length in shape) or sum(sizes) > _MOST_ELEMENTS:
            raise refuse("the tensors of the island cannot be", got=f"{len(hello.names)} names, {sum(sizes)} elements")

    def _check_boxes(self, hello: Hello) -> None:
        """See that the parts of a rank are of the model."""
        shapes = self._shapes()
        for part in hello.boxes:
            shape = shapes.get(part.name)
            if shape is None or not len(part.start) == len(part.stop) == len(shape):
                raise refuse("a rank has a part of a tensor that is not in the model", got=part.name)
            if any(not 0 <= a <= b <= c for a, b, c in zip(part.start, part.stop, shape, strict=True)):
                raise refuse("a rank has a part that is not in its tensor", got=f"{part.name}: {part.stop}")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(zip(self._known["names"], self._known["shapes"], strict=True))

    def _check_parts(self, one: MemberLog) -> None:
        """See that the ranks together bring each element once."""
        shapes = self._shapes()
        owned = dict.fromkeys(shapes, 0)
        for hello in one.hellos.values():
            for part in hello.boxes:
                if part.owned:
                    owned[part.name] += Box(part.name, shapes[part.name], part.start, part.stop).size
        for name, shape in shapes.items():
            if owned[name] != math.prod(shape):
                fix = "this is a defect of the strategy: please report it"
                raise refuse(f"the ranks do not bring '{name}' once", owned[name], math.prod(shape), fix)

    # --- state ------------------------------------------------------------------------------------------

    def plain(self) -> dict[str, Any]:
        """Return what all islands have alike, for JSON."""
        return dict(self._known)

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Take over what `plain` gave.

        Args:
            plain: from a checkpoint.
        """
        if plain:
            shapes = tuple(tuple(int(length) for length in shape) for shape in plain["shapes"])
            self._known = {**plain, "names": tuple(plain["names"]), "shapes": shapes}
            self._merges.set_model(dict(zip(self._known["names"], shapes, strict=True)))
