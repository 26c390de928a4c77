"""The checkpoint of a run with islands: an ordinary one, with all of the run in it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.consistency import contradictions
from orchestrator.checkpoint.run_checkpoints import committed, set_aside
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.islands.hub import Hub
from orchestrator.islands.island_messages import Terms
from orchestrator.islands.ledger import audit
from orchestrator.launch.island_state import drop_saves, fitting, place_saves, read_run, save_run
from tests.lab.island_sim import SHAPES, Sim
from tests.lab.runs import small_config

KINDS = {
    "rounds": Terms(inner_steps=4),
    "int8": Terms(inner_steps=4, fragments=2, overlap_steps=1, exchange="int8", lr=0.7, momentum=0.9),
    "decoupled": Terms("decoupled", inner_steps=4),
}


def state_of(terms):
    sim = Sim(terms, steps=48, save_every=8, settings={"patience_seconds": 1e6, "timeout_seconds": 1e6})
    sim.start("a"), sim.start("b", ranks=2)
    while not sim.hub.save_ready:
        sim.run(0.5)
    return sim, sim.hub.capture()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again(tmp_path, kind):
    sim, state = state_of(KINDS[kind])
    config = small_config(tmp_path)
    path = save_run(tmp_path / "checkpoints", state, config)
    found = read_run(path)
    assert found.plain == json.loads(json.dumps(state.plain))
    assert found.tensors.keys() == state.tensors.keys()
    assert all(np.array_equal(found.tensors[name], state.tensors[name]) for name in state.tensors)
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    assert checkpoint.step == state.plain["step"]
    Hub(KINDS[kind], sim.hub.settings, sim.facts, found)  # takes it


def test_other_terms_keep_weights_and_ledger_and_drop_what_was_under_way(tmp_path):
    sim, state = state_of(KINDS["int8"])
    other = Terms(inner_steps=8, fragments=1)
    changed = fitting(state, other)
    hub = Hub(other, sim.hub.settings, sim.facts, changed)
    assert audit(hub.ledger) == []
    assert hub.ledger.booked == sim.hub.ledger.booked or hub.ledger.done <= sim.hub.ledger.done
    assert all(np.array_equal(changed.tensors[f"model.{name}"], state.tensors[f"model.{name}"]) for name in SHAPES)
    assert fitting(state, KINDS["int8"]) is state
    with pytest.raises(ConfigError, match="outer weights"):
        fitting(state, Terms("synchronous"))


def test_a_checkpoint_without_islands_is_no_run_of_islands(tmp_path):
    _, state = state_of(KINDS["rounds"])
    path = save_run(tmp_path / "checkpoints", state, small_config(tmp_path))
    shutil.rmtree(path / "islands", ignore_errors=True)
    with pytest.raises(CheckpointError):
        read_run(tmp_path)


def test_later_saves_of_islands_are_set_aside_when_the_run_goes_back(tmp_path):
    _, state = state_of(KINDS["rounds"])
    early = save_run(tmp_path / "checkpoints", state, small_config(tmp_path))
    own = tmp_path / "islands" / "a" / "checkpoints"
    step = state.plain["saves"]["a"]["step"]
    for number in (step, step + 4):  # any checkpoint will do
        shutil.copytree(early, own / f"step-{number:08d}")
    place_saves(early, tmp_path)
    assert [bool(set_aside(path)) for path in committed(own)] == [True, False]


def test_saves_of_a_run_that_begins_anew_are_set_aside(tmp_path):
    _, state = state_of(KINDS["rounds"])
    early = save_run(tmp_path / "checkpoints", state, small_config(tmp_path))
    own = tmp_path / "islands" / "a" / "checkpoints"
    shutil.copytree(early, own / early.name)
    drop_saves(tmp_path, ["a", "b"])
    assert [bool(set_aside(path)) for path in committed(own)] == [True]


def test_consistency_of_the_whole_is_checked(tmp_path):
    _, state = state_of(KINDS["int8"])
    path = save_run(tmp_path / "checkpoints", state, small_config(tmp_path))
    assert list(contradictions(Checkpoint(path))) == []
