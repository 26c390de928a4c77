"""Islands train one model: as one process where they exchange gradients, bitwise again, killed, joined by others."""

from __future__ import annotations

import random
import signal
import time

import numpy as np
import pytest

from orchestrator.errors import DIVERGED
from orchestrator.islands import island_keys
from orchestrator.islands.island_messages import Terms
from tests.lab.islands import LabRun
from tests.lab.runs import losses, small_config, train
from tests.lab.slow import slow

QUICK = ("train.sample.tokens=0", "data.document_mask=true")


@pytest.fixture
def lab(tmp_path):
    """Makes runs, and ends what is left of them."""
    made = []

    def make(name, terms, words=(), **options):
        made.append(LabRun(tmp_path / name, terms, (*QUICK, *words), **options))
        return made[-1]

    yield make
    for run in made:
        run.close()


def finished(run):
    run.finish()
    assert run.ledger()["problems"] == []
    return run


def same(one, other):
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


LAYOUTS = [
    ("layout.fsdp=2", 2),
    pytest.param("layout.tensor=2", 2, marks=slow),
    pytest.param("layout.replicate=2", 2, marks=slow),
    pytest.param("layout.context=2", 2, marks=slow),
    pytest.param("layout.pipeline=2", 2, marks=slow),
]


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_exchanged_gradients_are_those_of_one_process(lab, tmp_path, layout, size):
    run = lab("islands", Terms("synchronous"))
    run.start("a")
    run.start("b", layout, size=size)
    finished(run)
    alone = train(small_config(tmp_path / "islands", *QUICK), 1, tmp_path / "alone")
    np.testing.assert_allclose(list(run.losses().values()), losses(alone), rtol=1e-5)
    norms = [norm for note in run.notes("report") if note["island"] == "a" for norm in note["norms"]]
    np.testing.assert_allclose(norms, [row["grad_norm"] for row in alone if "loss" in row], rtol=1e-4)
    assert run.validation() == pytest.approx([row["val_loss"] for row in alone if "val_loss" in row][-1], rel=1e-5)


KINDS = {
    "rounds": Terms(inner_steps=5),
    "int8": Terms(inner_steps=5, fragments=2, overlap_steps=2, exchange="int8", lr=0.7, momentum=0.9),
    "eager": Terms(inner_steps=5, overlap_steps=2, exchange="bf16", eager=True, lr=0.7, momentum=0.9),
    "mixed": Terms(inner_steps=5, overlap_steps=2, exchange="int4", overlap_mix=0.5),
}
ALL_KINDS = ["rounds", "int8", *(pytest.param(kind, marks=slow) for kind in ("eager", "mixed"))]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_two_runs_have_the_same_bits(lab, kind):
    found = []
    for name in ("one", "two"):
        run = lab(name, KINDS[kind], expected={"a": 1.0, "b": 1.0})
        run.start("a")
        run.start("b", "layout.fsdp=2", size=2)
        found.append(finished(run).outer())
    assert same(*found)


def test_islands_that_are_killed_come_back_to_the_same_bits(lab):
    """Killed at any time, also within an exchange and a save; the other one waits."""
    chance, found = random.Random(0), []
    for name, kills in (("undisturbed", 0), ("killed", 4)):
        run = lab(
            name,
            KINDS["int8"],
            words=("train.max_steps=60",),
            expected={"a": 1.0, "b": 1.0},
            save_every=10,
            settings={"patience_seconds": 60.0, "timeout_seconds": 2.0},
        )
        run.start("a", slower=0.02 if kills else 0.0)
        run.start("b", "layout.fsdp=2", size=2)
        for _ in range(kills):
            time.sleep(chance.uniform(0.5, 2.5))
            victim = chance.choice(sorted(run.islands))
            if run.islands[victim].alive:
                run.islands[victim].kill()
                run.start(victim, *(("layout.fsdp=2",) if victim == "b" else ()), size=2 if victim == "b" else 1)
        found.append(finished(run).outer())
    assert len([note for note in run.notes("welcome") if note["start"] in ("replay", "keep")]) >= 3
    assert same(*found)


def test_an_island_stops_for_good_and_a_third_one_joins(lab):
    run = lab(
        "run",
        Terms("decoupled", inner_steps=5),
        words=("train.max_steps=80",),
        save_every=10,
        settings={"patience_seconds": 1.0, "timeout_seconds": 1.0},
    )
    run.start("a", slower=0.05)
    run.start("b", slower=0.05)
    while not run.notes("saved"):
        time.sleep(0.1)
    run.islands.pop("b").kill()
    run.start("c", "layout.fsdp=2", size=2)
    finished(run)
    assert [note["island"] for note in run.notes("gone")] == ["b"]
    assert {"a", "c"} <= run.ledger()["booked"].keys()


@pytest.mark.parametrize("kind", ["rounds", pytest.param("synchronous", marks=slow)])
def test_islands_that_are_asked_to_stop_save_and_go_on_where_they_were(lab, kind):
    """The first one has left when the other comes to where it waits for it."""
    terms, found = KINDS.get(kind, Terms("synchronous")), []
    for name in ("undisturbed", "stopped"):
        run = lab(name, terms, words=("train.max_steps=20",), expected={"a": 1.0, "b": 1.0})
        late = 0.03 if name == "stopped" else 0.0
        run.start("a", slower=late)
        run.start("b", slower=late)
        if name == "stopped":
            while len(run.notes("report")) < 4:
                time.sleep(0.05)
            run.islands["a"].signal(signal.SIGTERM)
            run.islands["a"].wait(30, code=143)
            time.sleep(0.4)
            run.islands["b"].signal(signal.SIGTERM)
            run.islands["b"].wait(30, code=143)
            run.start("b")
            run.start("a")
        finished(run)
        found.append((run.outer(), run.validation()))
    assert [note["start"] for note in run.notes("welcome")][-2:] == ["replay", "replay"]
    assert same(*(outer for outer, _ in found))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)  # the island that evaluates may be another one


def test_islands_that_are_none_of_the_run_are_refused_and_nothing_is_lost(lab):
    run = lab("run", KINDS["rounds"], words=("train.max_steps=10",))
    run.start("a")  # waits for b
    while not run.notes("welcome"):
        time.sleep(0.05)
    other = run.folder / "other"
    island_keys.make(other)
    asked = {
        "model": ("model.layers=1",),
        "longer": ("train.max_steps=20",),
        "key": (f"islands.key_file={other}",),
    }
    for name, words in asked.items():
        run.start(name, *words)
    refused = {name: run.islands.pop(name) for name in asked}
    for island in refused.values():
        island.wait(90, code=2)
    run.start("b")
    finished(run)
    said = {name: island.log.read_text() for name, island in refused.items()}
    assert "another model" in said["model"]
    assert "train.max_steps" in said["longer"]
    assert "its key is another one" in said["key"]
    assert not any("Traceback" in text for text in said.values())
    assert run.ledger()["booked"].keys() == {"a", "b"}


def test_an_island_that_diverges_gives_its_data_to_the_others(lab):
    run = lab("run", Terms("decoupled", inner_steps=5), words=("train.max_steps=30",))
    run.start("a", slower=0.05)
    run.start("b", "optim.lr=1e30", "optim.grad_clip=null")
    run.islands.pop("b").wait(60, code=DIVERGED)
    finished(run)
    assert [note["status"] for note in run.notes("bye") if note["island"] == "b"] == ["failed"]
    assert np.isfinite(list(run.losses().values())[-1])
