"""The hub with islands in virtual time: every sequence once, the same bits after kills, joins, and bad peers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from orchestrator.islands.island_messages import Offer, Peer, Refused, Terms
from orchestrator.islands.ledger import audit
from tests.lab.island_sim import SHAPES, Sim, SimIsland

PATIENT = {"patience_seconds": 1e6, "timeout_seconds": 1e6}
KINDS = {
    "rounds": Terms(inner_steps=4),
    "fragments": Terms(inner_steps=4, fragments=2),
    "overlap": Terms(inner_steps=4, fragments=2, overlap_steps=1, lr=0.7, momentum=0.9),
    "int8": Terms(inner_steps=4, exchange="int8"),
    "gradients": Terms("synchronous"),
    "decoupled": Terms("decoupled", inner_steps=4, fragments=2, overlap_steps=1),
}


def weights(island: SimIsland) -> bytes:
    return b"".join(island.weights[name].tobytes() for name in SHAPES)


def capture(sim: Sim) -> Any:
    if sim.hub.save_ready:
        state = sim.hub.capture()
        sim.hub.kept(state)
        return state
    return None


def trained(terms: Terms, kills: int = 0, seed: int = 0, **options: Any) -> tuple[Sim, dict[str, SimIsland]]:
    """Train two islands to the end, and kill one of them so many times."""
    sim = Sim(terms, steps=48, save_every=8, settings=PATIENT, **options)
    islands = {"a": sim.start("a"), "b": sim.start("b", ranks=2)}
    chance = random.Random(seed)
    while not sim.hub.finished:
        sim.run(chance.uniform(0.3, 4) if kills else 1e9)
        capture(sim)
        name = chance.choice(sorted(islands))
        if kills and name in sim.lives and not sim.hub.finished:
            kills -= 1
            islands[name] = restarted(sim, name)
    assert audit(sim.hub.ledger) == []
    assert not [island.refused for island in islands.values() if island.refused]
    return sim, islands


def restarted(sim: Sim, name: str, told: bool = True) -> SimIsland:
    old = sim.kill(name)
    if told:
        sim.hub.lost(name, "killed")
    kept = old.newest() or old.kept
    new = sim.start(name, ranks=old.ranks, kept=kept, speed=old.speed)
    new.saves = dict(old.saves) or ({kept.mark: kept} if kept else {})
    return new


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_have_the_same_bits_on_all_islands_and_at_the_hub(kind):
    first, one = trained(KINDS[kind])
    _, two = trained(KINDS[kind])
    assert weights(one["a"]) == weights(two["a"]) == weights(one["b"])
    assert first.hub.versions == tuple([first.hub.versions[0]] * len(first.hub.versions))
    if kind != "gradients":
        outer = first.hub.capture().tensors
        assert all(np.array_equal(outer[f"model.{name}"], one["a"].weights[name]) for name in SHAPES)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_islands_that_are_killed_come_back_to_the_same_bits(kind, seed):
    _, undisturbed = trained(KINDS[kind])
    sim, killed = trained(KINDS[kind], kills=20, seed=seed)
    starts = [note["start"] for note in sim.notes if note["kind"] == "welcome"]
    assert {"give", "take", "restore"} & set(starts[2:]) == set(), "none of them had to begin anew"
    if kind != "decoupled":  # there it matters who was when where
        assert weights(killed["a"]) == weights(killed["b"]) == weights(undisturbed["a"])
    assert weights(killed["a"]) == weights(killed["b"])


def test_rounds_are_the_steps_of_the_whole_run():
    sim, _ = trained(KINDS["rounds"])
    leases = [note for note in sim.notes if note["kind"] == "lease"]
    by_step: dict[int, list[int]] = {}
    for lease in leases:
        for at, rows in lease["steps"]:
            by_step.setdefault(at, []).extend(row for start, stop in rows for row in range(start, stop))
    assert {at: sorted(rows) for at, rows in by_step.items()} == {
        at: list(range(8 * at, 8 * at + 8)) for at in range(48)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_island_that_is_gone_leaves_its_data_to_the_others_and_may_come_back(kind):
    sim = Sim(KINDS[kind], steps=48, save_every=8, settings={"patience_seconds": 5.0, "timeout_seconds": 2.0})
    islands = {"a": sim.start("a"), "b": sim.start("b", ranks=2)}
    sim.run(12)
    capture(sim)
    gone = sim.kill("b")
    sim.run(20)
    assert sim.hub.members["b"].state == "gone"
    assert "no sign of life" in next(note["because"] for note in sim.notes if note["kind"] == "away")
    back = sim.start("b", ranks=2, kept=gone.newest())
    while not sim.hub.finished:
        sim.run(5)
        capture(sim)
    assert audit(sim.hub.ledger) == []
    assert weights(back) == weights(islands["a"])
    assert back.welcome.start == ("restore" if kind == "gradients" else "take")
    assert {"a", "b"} == sim.hub.ledger.booked.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_third_island_joins(kind):
    sim = Sim(KINDS[kind], steps=48, save_every=8, settings=PATIENT)
    islands = {"a": sim.start("a"), "b": sim.start("b", ranks=2)}
    sim.run(10)
    capture(sim)
    islands["c"] = sim.start("c", unit=2)
    while not sim.hub.finished:
        sim.run(5)
        capture(sim)
    assert audit(sim.hub.ledger) == []
    assert weights(islands["a"]) == weights(islands["b"]) == weights(islands["c"])
    assert sim.hub.ledger.booked.keys() == {"a", "b", "c"}
    assert islands["c"].welcome.path in sim.disk, "moments of the optimizer are those of another island"
    assert not islands["c"].welcome.leads


@pytest.mark.parametrize("others", [("a", "b"), ("a",), ("a", "b", "c"), ("x",)], ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_what_was_captured_with_the_same_islands_or_others(kind, others):
    _, undisturbed = trained(KINDS[kind])
    sim = Sim(KINDS[kind], steps=48, save_every=8, settings=PATIENT)
    first = {"a": sim.start("a"), "b": sim.start("b", ranks=2)}
    state = None
    while state is None:
        sim.run(0.5)
        state = capture(sim)
    sim.run(7)  # all that comes after it is lost
    disk = sim.disk
    again = Sim(
        KINDS[kind], steps=48, save_every=8, state=state, expected=dict.fromkeys(others),
        settings={"patience_seconds": 5.0, "timeout_seconds": 1e6},
    )  # fmt: skip
    again.disk = disk
    saves = state.plain["saves"]
    islands = {}
    for name in others:
        kept = disk[saves[name]["path"]][1] if name in saves else None
        islands[name] = again.start(name, ranks=first[name].ranks if name in first else 1, kept=kept)
    while not again.hub.finished:
        again.run(5)
        capture(again)
    assert audit(again.hub.ledger) == []
    assert len({weights(island) for island in islands.values()}) == 1
    if others == ("a", "b") and kind != "decoupled":
        assert weights(islands["a"]) == weights(undisturbed["a"])
        assert [island.welcome.start for island in islands.values()] == ["replay", "replay"]


def test_a_slow_island_does_not_hold_up_a_fast_one_and_shares_follow_the_speeds():
    terms = Terms("decoupled", inner_steps=8)
    sim = Sim(terms, steps=400, settings=PATIENT)
    fast, slow = sim.start("a", speed=32.0), sim.start("b", speed=8.0)
    sim.run()
    assert audit(sim.hub.ledger) == []
    assert fast.waited <= 0.05 * (fast.busy + fast.waited)
    booked = {name: sum(stop - start for start, stop in ranges) for name, ranges in sim.hub.ledger.booked.items()}
    assert booked["a"] / booked["b"] == pytest.approx(4, rel=0.15)
    assert weights(fast) == weights(slow)


def test_rounds_give_a_slow_island_less_where_shares_are_measured():
    sim = Sim(Terms(inner_steps=4), steps=200, batch=20, settings=PATIENT)
    sim.start("a", speed=32.0), sim.start("b", speed=8.0)
    sim.run()
    last = [note["rows"] for note in sim.notes if note["kind"] == "shares"][-1]
    assert last == {"a": 16, "b": 4}


def test_given_shares_are_kept():
    sim = Sim(Terms(inner_steps=4), steps=40, settings=PATIENT, expected={"a": 3.0, "b": 1.0})
    sim.start("a"), sim.start("b")
    sim.run()
    assert [note["rows"] for note in sim.notes if note["kind"] == "shares"][-1] == {"a": 6, "b": 2}


def test_a_recorded_schedule_is_repeated_bitwise():
    terms = KINDS["decoupled"]

    def run(speeds, **options):
        sim = Sim(terms, steps=64, settings=PATIENT, **options)
        islands = [sim.start(name, speed=speed) for name, speed in zip("ab", speeds, strict=True)]
        sim.run()
        assert audit(sim.hub.ledger) == []
        return sim, islands[0]

    first, one = run((32.0, 9.0))
    _, other = run((9.0, 32.0))
    _, again = run((9.0, 32.0), repeat=first.notes)
    assert weights(one) != weights(other)
    assert weights(one) == weights(again)


def test_an_island_whose_outer_weights_differ_is_set_aside_by_name():
    sim = Sim(Terms(inner_steps=4), steps=40, settings={"patience_seconds": 5.0, "timeout_seconds": 1e6})
    good, bad = sim.start("a"), sim.start("b", ranks=2, broken=lambda step: step == 9)
    sim.run()
    assert "island 'b' are not those of the others" in bad.refused.what
    assert sim.hub.finished
    assert audit(sim.hub.ledger) == []
    again = sim.start("b")
    sim._advance("b")
    sim._advance("b")
    assert "set aside" in again.refused.what
    assert good.refused is None


def test_what_is_not_finite_is_not_merged():
    sim = Sim(Terms(inner_steps=4), steps=16, settings={"patience_seconds": 5.0, "timeout_seconds": 1e6})
    sim.start("a")
    bad = sim.start("b")
    bad.weights["norm"][0] = np.nan
    sim.run()
    assert "not finite" in bad.refused.what
    assert np.isfinite(sim.hub.capture().tensors["model.norm"]).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"protocol": 99}, "version of the protocol"),
        ({"run": "another"}, "another run"),
        ({"model": "other"}, "another model"),
        ({"data": "other"}, "another data"),
        ({"seed": 7}, "another seed"),
        ({"seq_len": 8}, "another train.seq_len"),
        ({"max_steps": 5}, "another train.max_steps"),
        ({"sequences": 5}, "another train.global_batch_tokens"),
        ({"rank": 3}, "none of its ranks"),
        ({"island": "../x"}, "is a word"),
    ],
)
def test_who_does_not_belong_to_the_run_is_refused_by_one_message(change, said, monkeypatch):
    import tests.lab.island_sim as lab

    sim = Sim(Terms(inner_steps=4), steps=16, settings=PATIENT, expected={"a": None})
    good = sim.start("a")
    sim.run(3)
    hello = lab.Hello
    monkeypatch.setattr(lab, "Hello", lambda *values: _changed(hello(*values), change))
    bad = sim.start("b")
    sim._advance("b")
    sim._advance("b")
    assert said in bad.refused.what
    assert bad.refused.final
    sim.run()
    assert audit(sim.hub.ledger) == []
    assert good.refused is None


def _changed(hello, change):
    from dataclasses import replace

    return replace(hello, **change)


def test_an_older_process_of_the_same_name_is_told_to_end():
    sim = Sim(Terms(inner_steps=4), steps=16, settings=PATIENT)
    sim.start("a"), sim.start("b")
    sim.run(3)
    old = sim.lives.pop("b")
    sim.start("b")
    sim.run(1)
    sim.lives["b"], new = old, sim.lives.pop("b")
    sim.run(3)
    assert "another process" in old[0].refused.what
    sim.lives["b"] = new
    sim.run()
    assert audit(sim.hub.ledger) == []


def test_what_an_offer_says_of_itself_is_not_believed():
    sim = Sim(Terms(inner_steps=4), steps=16, settings=PATIENT)
    sim.start("a"), sim.start("b")
    sim.run(1)
    peer = Peer("a", sim.lives["a"][0].incarnation, 0)
    for wrong in (
        Offer(99, 0, 0, 1, 0, 1, ()),
        Offer(0, 7, 0, 1, 0, 1, ()),
        Offer(0, 0, 5, 1, 0, 1, ()),
        Offer(0, 0, 0, 1, 0, 77, ()),
    ):
        sim.post(peer, 1000, wrong)
        answer, _ = sim.mail.pop((peer, 1000))
        assert isinstance(answer, Refused)
    sim.run()
    assert audit(sim.hub.ledger) == []


def test_who_is_lost_before_it_has_saved_still_comes_back_from_what_it_had():
    """The others have saved, the run's state is kept, and the lost one's log reaches further back."""
    sim = Sim(KINDS["rounds"], steps=48, save_every=8, settings=PATIENT)
    sim.start("a"), sim.start("b")
    while not sim.hub.save_ready:
        sim.run(0.25)
    capture(sim)
    lost = sim.lives["b"][0]
    lost._save = lambda mark, lease: None  # from now on its disk is too slow
    saves = sim.hub.members["b"].saves
    while all(save.path for save in saves.values()):
        sim.run(0.25)
    sim.kill("b")
    sim.hub.lost("b", "killed")
    sim.run(1)
    assert capture(sim) is not None
    again = sim.start("b", kept=lost.newest())
    while not sim.hub.finished:
        sim.run(2)
        capture(sim)
    assert again.welcome.start == "replay"
    assert audit(sim.hub.ledger) == []
