"""The loop of the hub's process, with islands of a few numbers in place of a socket."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.distributed import standing
from orchestrator.islands.island_messages import Terms
from orchestrator.islands.run_rows import RunRows
from orchestrator.launch import island_hub
from orchestrator.launch.island_hub import HubLoop, HubNotes
from orchestrator.observe.sink import Channel, JsonLines
from tests.lab.island_sim import Sim


class SimSocket:
    """Lets the islands of a simulation go on whenever the loop looks for a request."""

    def __init__(self, sim: Sim):
        self.sim, self.requests = sim, []
        sim.post = lambda peer, number, request, frames=(): self.requests.append((peer, number, request, list(frames)))

    def receive(self, timeout: float) -> Any:
        for name in sorted(self.sim.lives) if not self.requests else ():
            self.sim._advance(name)
        if not self.requests:
            waits = [wait for _, _, wait in self.sim.lives.values() if isinstance(wait, float)]
            self.sim.now = min([*waits, self.sim.now + 1.0])
            for island, _, _ in self.sim.lives.values():
                island.seen()
        return self.requests.pop(0) if self.requests else None

    def reply(self, peer: Any, number: int, answer: Any, frames: Any) -> None:
        self.sim.mail[peer, number] = (answer, frames)


@pytest.fixture
def looped(tmp_path, monkeypatch):
    """Makes a loop over a simulation."""
    monkeypatch.setattr(island_hub, "_TICK_SECONDS", 0.0)
    monkeypatch.setattr(standing, "here", standing.Standing())

    def make(terms: Terms, save: Any = None, **options: Any) -> tuple[HubLoop, Sim, HubNotes]:
        sim = Sim(terms, **options)
        channels = [Channel(name, JsonLines(tmp_path / name).write, print) for name in ("record", "metrics")]
        notes = HubNotes(channels[0], channels[1], 0)
        sim.hub._note = notes.take
        notes.rows = RunRows(8, 16, terms.algorithm != "decoupled")
        return HubLoop(sim.hub, SimSocket(sim), notes, save, max_steps=sim.facts.max_steps), sim, notes

    return make


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ["diloco", "decoupled", "synchronous"])
def test_the_hub_serves_until_all_is_trained(looped, tmp_path, algorithm):
    kept = []
    terms = Terms(algorithm, 1 if algorithm == "synchronous" else 4, error_feedback=False)
    loop, sim, notes = looped(terms, save=lambda state: kept.append(state) or tmp_path / "step", save_every=8)
    sim.start("a")
    sim.start("b", speed=4.0)
    assert loop.serve() == 0
    assert [row["step"] for row in _lines(tmp_path / "metrics")] == list(range(1, 33))
    record = _lines(tmp_path / "record")
    assert {"welcome", "lease", "exchange", "report", "saved"} <= {entry["kind"] for entry in record}
    assert len(kept) >= 3
    assert kept[-1].plain["step"] == 32
    about = loop.islands()
    assert sum(one["sequences"] for one in about["islands"].values()) == about["booked"] == about["sequences"] == 256
    assert about["exchanges"] == notes.exchanges == sum(entry["kind"] == "exchange" for entry in record)
    assert all(one["sent_bytes"] and one["received_bytes"] for one in about["islands"].values())


def test_a_request_to_stop_is_told_to_the_islands_and_what_they_saved_is_kept(looped, tmp_path, monkeypatch):
    kept = []
    loop, sim, _ = looped(Terms("diloco", 4), save=lambda state: kept.append(state) or tmp_path / "step", save_every=8)
    sim.start("a")
    sim.start("b")
    monkeypatch.setattr(island_hub.stopping, "requested", lambda: signal.SIGTERM if sim.hub.step >= 16 else 0)
    serve = loop._once

    def once() -> None:
        serve()
        if sim.hub.stop:
            for name in list(sim.lives):
                sim.kill(name)
                sim.hub.lost(name, "it was stopped")

    loop._once = once
    assert loop.serve() == 143
    assert 16 <= kept[-1].plain["step"] < 32


def test_a_save_that_fails_is_said_and_tried_again(looped, tmp_path, capsys):
    from orchestrator.errors import CheckpointError
    from orchestrator.output import printing

    calls = []

    def save(state: Any) -> Path:
        calls.append(state)
        if len(calls) == 1:
            raise CheckpointError("the disk is full")
        return tmp_path / "step"

    loop, sim, _ = looped(Terms("diloco", 4), save=save, save_every=8)
    sim.start("a")
    sim.start("b")
    with printing():
        assert loop.serve() == 0
    assert "could not be saved: the disk is full" in capsys.readouterr().err
    assert len(calls) > 2
