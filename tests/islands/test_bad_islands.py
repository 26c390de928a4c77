"""Who has the key may still be broken: whatever an island sends, the hub serves the others, and no sequence is lost."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest

from orchestrator.config.islands_schema import IslandsConfig
from orchestrator.islands import island_keys
from orchestrator.islands.hub import Hub
from orchestrator.islands.hub_socket import HubSocket
from orchestrator.islands.island_messages import REQUESTS, Bye, MessageError, Peer, Terms, read
from orchestrator.islands.ledger import audit
from orchestrator.islands.run_terms import RunTerms
from tests.lab.bad_wire import CutProxy, mutated
from tests.lab.island_sim import SHAPES, Sim, SimIsland
from tests.lab.stub_island import LinkSim

KINDS = {
    "rounds": Terms(inner_steps=4),
    "overlap": Terms(inner_steps=4, fragments=2, overlap_steps=1, exchange="int8"),
    "gradients": Terms("synchronous"),
    "decoupled": Terms("decoupled", inner_steps=4, fragments=2),
}
SECONDS_STUCK = 100.0
EQUAL: dict[str, float | None] = {"a": 1.0, "b": 1.0}  # shares: by speed they would differ


def _disturbed(terms: Terms, seed: int) -> tuple[Sim, int]:
    """Train two islands to the end beside a third one, each of whose requests comes with changed ones."""
    chance, handled = random.Random(seed), 0
    sim = Sim(terms, steps=24, save_every=8, settings={"patience_seconds": 5.0, "timeout_seconds": 2.0})
    sim.start("a"), sim.start("b", ranks=2)
    sim.run(2)
    sim.start("c")
    post = sim.post

    def post_all(peer: Peer, number: int, request: Any, frames: Any = ()) -> None:
        nonlocal handled
        for _ in range(12 if peer.island == "c" else 0):
            try:
                changed = read(mutated(request, chance), REQUESTS)
            except MessageError:
                continue
            if not isinstance(changed, Bye):
                handled += 1
                sim.hub.handle(peer, -1, changed, list(frames)[: chance.choice([None, None, None, -1])])
        post(peer, number, request, frames)

    sim.post = post_all  # type: ignore[method-assign]
    while not sim.hub.finished:
        sim.run(1)
        if sim.hub.save_ready:
            sim.hub.kept(sim.hub.capture())
        if sim.now > SECONDS_STUCK:
            sim.lives.pop("c", None)  # it said something that it cannot go on from
    return sim, handled


@pytest.mark.parametrize("kind", KINDS)
def test_an_island_that_says_what_it_likes_harms_nobody(kind):
    handled = 0
    for seed in range(8):
        sim, count = _disturbed(KINDS[kind], seed)
        handled += count
        assert audit(sim.hub.ledger) == []
        assert {"a", "b"} <= sim.hub.ledger.booked.keys()
        assert {sim.hub.members[name].state for name in "ab"} == {"left"}
        outer = sim.hub.capture().tensors
        assert all(np.isfinite(array).all() for name, array in outer.items() if name.startswith("model."))
    assert handled > 300


class _Serving:
    """A hub at its socket, in a thread."""

    def __init__(self, terms: Terms, steps: int, key: bytes):
        facts = RunTerms("run", steps, 8, EQUAL)
        self.exchanges: list[dict[str, Any]] = []
        self.hub = Hub(terms, IslandsConfig(), facts, note=self._note)
        self.socket = HubSocket("tcp://127.0.0.1:*", key)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _note(self, about: dict[str, Any]) -> None:
        if about["kind"] == "exchange":
            self.exchanges.append(about)

    def _work(self) -> None:
        try:
            while not self.hub.finished and self.error is None:
                if (got := self.socket.receive(0.05)) is not None:
                    self.hub.handle(*got)
                self.hub.tick()
                for answer in self.hub.answers:
                    self.socket.reply(*answer)
                self.hub.answers.clear()
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self.error = self.error or TimeoutError("it was asked to end")
        self._thread.join()
        self.socket.close()


def test_connections_that_break_again_and_again_change_no_bit(tmp_path):
    steps, key = 160, island_keys.make(tmp_path / "key")
    serving = _Serving(Terms(inner_steps=4), steps, key)
    proxy = CutProxy(serving.socket.address, 4000, 9000)
    words = {
        "islands.join": proxy.address,
        "islands.key_file": str(tmp_path / "key"),
        "islands.inner_steps": "4",
        "train.max_steps": str(steps),
        "train.global_batch_tokens": "128",
        "train.seq_len": "16",
    }
    sims = {name: LinkSim(words, tmp_path / name) for name in "ab"}
    islands = {name: SimIsland(sim, name) for name, sim in sims.items()}  # type: ignore[arg-type]
    for sim in sims.values():
        sim.hub.terms = serving.hub.terms
    threads = [threading.Thread(target=sims[name].live, args=(islands[name],), daemon=True) for name in "ab"]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    for thread in threads:
        thread.join(deadline - time.monotonic())
    assert not any(thread.is_alive() for thread in threads), serving.error
    assert proxy.connections > 10, "each island has come back"
    assert audit(serving.hub.ledger) == []
    whole = Sim(Terms(inner_steps=4), steps=steps, expected=EQUAL)
    undisturbed = whole.start("a")
    whole.start("b")
    whole.run()
    for name in SHAPES:
        assert np.array_equal(islands["a"].weights[name], undisturbed.weights[name])
        assert np.array_equal(islands["b"].weights[name], undisturbed.weights[name])
    assert [one["version"] for one in serving.exchanges] == list(range(1, steps // 4 + 1))
    proxy.close()
    serving.end()
