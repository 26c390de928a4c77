"""The hub of a run with islands, as a process: between the socket, the hub itself, and the run's directory."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from orchestrator import stopping
from orchestrator.checkpoint.storage import AnyPath
from orchestrator.distributed import standing
from orchestrator.errors import DIVERGED, DONE, UserError
from orchestrator.islands.hub import Hub
from orchestrator.islands.hub_state import HubState
from orchestrator.islands.run_rows import RunRows
from orchestrator.observe.history import finite_row
from orchestrator.observe.sink import Channel
from orchestrator.output import tell
from orchestrator.runs.messages import warn

if TYPE_CHECKING:
    from orchestrator.islands.hub_socket import HubSocket

_TICK_SECONDS = 0.5
_RECEIVE_SECONDS = 0.1
_LINE_SECONDS = 10.0
_PUBLISH_SECONDS = 5.0
_SAID = {
    "away": "is away",
    "back": "is back",
    "gone": "is gone",
    "set aside": "is set aside",
    "begins anew": "begins anew",
    "not saved": "has not saved",
}


class Traffic:
    """Bytes of tensors that each island has sent and got."""

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def got(self, island: str, frames: Sequence[Any]) -> None:
        """Count `frames` that came from `island`."""
        self.received[island] += sum(map(len, frames))

    def gave(self, island: str, frames: Sequence[Any]) -> None:
        """Count `frames` that went to `island`."""
        self.sent[island] += sum(map(len, frames))


class HubNotes:
    """Takes the notes of the hub: the record of all exchanges, rows of metrics, and lines for people.

    Args:
        record: channel of `islands/exchanges.jsonl`.
        metrics: channel of `metrics.jsonl`.
        leg: number of this start.

    Attributes:
        rows: makes the rows of the run; there before any island reports.
        begun: called when the first lease is handed out.
        exchanges: merges so far.
        waited: seconds that each island has waited for exchanges.
        worked: seconds that each island has trained, with waiting.
        failures: why islands have failed, by name.
        latest: the last row.
    """

    def __init__(self, record: Channel[Any], metrics: Channel[Any], leg: int):
        self._record, self._metrics, self._leg = record, metrics, leg
        self.rows: RunRows | None = None
        self.begun: Callable[[], object] = lambda: None
        self._has_begun = False
        self.exchanges = 0
        self.waited: Counter[str] = Counter()
        self.worked: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.latest: dict[str, Any] = {}

    def take(self, about: dict[str, Any]) -> None:
        """Take a note.

        Args:
            about: plain data, with its `kind`.
        """
        kind, now = about["kind"], time.time()
        self._record.put([finite_row({**_plain(about), "time": round(now, 3), "leg": self._leg})])
        if kind == "report":
            island = str(about["island"])
            self.waited[island] += about["waited"]
            self.worked[island] += about["seconds"]
            if self.rows is not None and (made := self.rows.add(about)):
                self.latest = made[-1]
                self._metrics.put(made)
                standing.reached(self.rows.step)
        elif kind == "validation":
            values = dict(zip(about["names"] or ["val_loss"], about["values"], strict=False))
            self._metrics.put([finite_row({"step": about["at"], **values, "time": now, "leg": self._leg})])
        elif kind == "exchange":
            self.exchanges += 1
        elif kind == "lease" and not self._has_begun:
            self._has_begun = True
            self.begun()
        elif kind == "welcome":
            how = {"replay": "goes on from its save", "take": "takes the outer weights"}.get(about["start"], "")
            tell(f"island     {about['island']}: {about['place']}{f'; {how}' if how else ''}", stream="stdout")
        elif kind == "bye" and about["status"] == "failed":
            self.failures[str(about["island"])] = str(about["why"])
            warn(f"the island {about['island']} has failed: {about['why']}")
        elif kind in _SAID:
            back = f"{about['sequences']} sequences go to the others" if about.get("sequences") else ""
            why = "; ".join(filter(None, [about.get("because"), back]))
            tell(f"island     {about['island']} {_SAID[kind]}{f': {why}' if why else ''}")


def _plain(value: Any) -> Any:
    """Return tuples as lists, and numbers that are not finite by their names, for JSON."""
    return json.loads(json.dumps(value, allow_nan=True), parse_constant=str)


class HubLoop:
    """Serves until the run has ended, or was stopped.

    Args:
        hub: of the run.
        socket: where islands ask.
        notes: what the hub notes.
        save: writes the state of the run, in a thread; returns where. None: nothing is saved.
        publish: called every few seconds with what the run's record says of the islands.
        max_steps: of the run.
        at_end: save when the run has ended.
    """

    def __init__(
        self,
        hub: Hub,
        socket: HubSocket,
        notes: HubNotes,
        save: Callable[[HubState], AnyPath] | None,
        publish: Callable[[dict[str, Any]], object] = lambda islands: None,
        max_steps: int = 0,
        at_end: bool = True,
    ):
        self._hub, self._socket, self._notes, self._save = hub, socket, notes, save
        self._publish, self._max_steps, self._at_end = publish, max_steps, at_end
        self.traffic = Traffic()
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._saving: tuple[HubState, Future[AnyPath]] | None = None
        self._due = dict.fromkeys(("tick", "line", "publish"), 0.0)
        self._shown: dict[str, Any] = {}

    def serve(self) -> int:
        """Serve. Returns the exit code.

        Raises:
            UserError: the state of the run cannot be saved.
        """
        with self._saver:
            while not self._over():
                self._once()
            self._conclude()
        self._publish(self.islands())
        if self._hub.stop and not self._hub.ended:
            return stopping.exit_code(self._hub.stop)
        return DONE if self._hub.ended else DIVERGED

    def _over(self) -> bool:
        hub = self._hub
        if hub.stop and not any(one.state == "here" for one in hub.members.values()):
            return True  # also where no island has come yet
        lost = bool(self._notes.failures) and all(one.state == "gone" for one in hub.members.values())
        return hub.finished or (lost and len(hub.members) >= len(hub.facts.expected))

    def _once(self) -> None:
        hub, now = self._hub, time.monotonic()
        if (number := stopping.requested()) and not hub.stop:
            hub.request_stop(number)
        if got := self._socket.receive(_RECEIVE_SECONDS):
            peer, request_id, request, frames = got
            self.traffic.got(peer.island, frames)
            hub.handle(peer, request_id, request, frames)
        if self._is_due("tick", now, _TICK_SECONDS):
            hub.tick()
        self._answer()
        self._keep()
        if self._is_due("line", now, _LINE_SECONDS):
            self._say()
        if self._is_due("publish", now, _PUBLISH_SECONDS):
            self._publish(self.islands())

    def _answer(self) -> None:
        answers, self._hub.answers[:] = list(self._hub.answers), []
        for peer, number, answer, frames in answers:
            self.traffic.gave(peer.island, frames)
            self._socket.reply(peer, number, answer, frames)

    def _keep(self) -> None:
        """Save the state of the run, where all its islands have saved theirs."""
        if self._saving is not None:
            state, future = self._saving
            if future.done():
                self._saving = None
                try:
                    tell(f"saved      {future.result()}", stream="stdout")
                    self._hub.kept(state)
                except UserError as error:  # as a full disk: the run goes on, and the next save is another try
                    warn(f"the state of the run could not be saved: {error.what}")
        elif self._hub.save_ready:
            self._begin_save()

    def _begin_save(self) -> None:
        state = self._hub.capture()
        if self._save is not None:
            self._saving = (state, self._saver.submit(self._save, state))

    def _conclude(self) -> None:
        """Save the end of the run, when the answers to those that left are sent."""
        self._answer()
        if self._saving is not None:
            futures.wait([self._saving[1]])
            self._keep()
        if any(one.saves or one.leases for one in self._hub.members.values()) and (self._at_end or not self._hub.ended):
            standing.enter(standing.ENDING)
            self._begin_save()
            if self._saving is not None:
                self._saving[1].result()
                self._keep()
        self._say(final=True)

    def _is_due(self, what: str, now: float, seconds: float) -> bool:
        if now < self._due[what]:
            return False
        self._due[what] = now + seconds
        return True

    def islands(self) -> dict[str, Any]:
        """Return what the run's record says of the islands: by name, plain data."""
        ledger, found = self._hub.ledger, {}
        for name, one in sorted(self._hub.members.items()):
            booked = sum(stop - start for start, stop in ledger.booked.get(name, ()))
            found[name] = {
                "place": one.place,
                "state": one.state,
                "sequences": booked,
                "share": booked / max(1, ledger.done),
                "speed": round(one.speed, 3),
                "waited_seconds": round(self._notes.waited[name], 3),
                "seconds": round(self._notes.worked[name], 3),
                "received_bytes": self.traffic.sent[name],
                "sent_bytes": self.traffic.received[name],
            }
        return {"islands": found, "exchanges": self._notes.exchanges, "booked": ledger.done, "sequences": ledger.total}

    def _say(self, final: bool = False) -> None:
        row = self._notes.latest
        if not row or (row is self._shown and not final):
            return
        self._shown = row
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        rate = f"  {row['tokens_per_second']:,.0f} tokens/s" if row["tokens_per_second"] else ""
        parts = [f"{name} {one['share']:.0%}{_waiting(one)}" for name, one in self.islands()["islands"].items()]
        tell(f"step {row['step']}/{self._max_steps}  loss {loss}{rate}  {', '.join(parts)}", stream="stdout")


def _waiting(one: Mapping[str, Any]) -> str:
    """Return how much of its time an island has waited, in words."""
    return f" (waited {one['waited_seconds'] / one['seconds']:.0%})" if one["seconds"] else ""
