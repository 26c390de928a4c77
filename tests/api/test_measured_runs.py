"""`plan measured=RUN`: what a run has measured replaces what would be assumed, with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.planning import Plans, plan
from orchestrator.distributed.world import World
from orchestrator.errors import UserError
from orchestrator.observe.time_spans import BOOK, TimeEntry
from orchestrator.runs import run_directory
from orchestrator.training.resolved import write_resolved
from tests.lab.runs import resolved_run, small_overrides
from tests.lab.runs import small_config as composed

RESTARTS = 3
JOB = ("model.dim=512", "model.heads=8", "model.kv_heads=2", "model.mlp_dim=1024", "model.vocab_size=1024")
STEP = ("train.seq_len=128", "train.global_batch_tokens=4096", "train.remat=none", "layout.fsdp=2")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run on two processes of a CPU: steps of 2 s, saves of 3 s every 20 steps, three failures, each 30 s down."""
    config = composed(tmp_path, *JOB, *STEP, "hardware.devices=2")
    place = tmp_path / "runs" / "tiny" / "one"
    place.mkdir(parents=True)
    write_resolved(place, resolved_run(config, World(0, 2, 0, 2, "file:x"), place))
    run_directory.write_config(place, config)
    entries, t, saved = list[TimeEntry](), 0.0, 0
    for leg in range(RESTARTS + 1):
        entries += [TimeEntry(t, "starting"), TimeEntry(t := t + 20, "training", saved, leg)]
        for _ in range(5):
            saved += 20
            entries.append(TimeEntry(t := t + 40, "saving", saved, leg))
            entries.append(TimeEntry(t := t + 3, "training", saved, leg))
        state = "waiting" if leg < RESTARTS else "stopped"
        entries.append(TimeEntry(t := t + 10, state, saved + 5, stepped=t))
        t += 10
    (place / BOOK).write_text("".join(json.dumps(entry.to_dict()) + "\n" for entry in entries))
    energy = {"joules": {"cpu": 60_000.0, "dram": 12_000.0}, "counted": {"cpu": 1, "dram": 1}, "seconds": 240.0}
    run_directory.write_run(place, {"legs": [{"leg": 0, "hosts": 1, "energy": energy}, {"leg": 1, "hosts": 1}]})
    return place


def planned(run_dir: Path, *words: str, fleet: str = "cpux2", **options: Any) -> Plans:
    job = [
        word for word in small_overrides(run_dir.parent, *JOB, *STEP) if word.startswith(("model.", "train.", "lay"))
    ]
    return plan([*job, *words], fleet=fleet, tokens="1B", precision="fp32", measured=str(run_dir), **options)


def test_a_plan_takes_what_the_run_has_measured(run_dir: Path):
    found = planned(run_dir)
    figures, kept = found.fleets[0].figures, found.fleets[0].goodput
    assert figures["step"].value == pytest.approx(2.0)
    assert figures["step"].sources == ("measured: mean of 420 steps of tiny/one",)
    assert kept.stall.value == pytest.approx(3.0)
    assert "20 saves" in kept.stall.sources[0]
    days = 4 * (20 + 5 * 43 + 10) + RESTARTS * 10
    assert kept.rate.value == pytest.approx(RESTARTS / (2 * days / 86400), rel=1e-3)
    assert "measured: 3 failures in" in kept.rate.sources[0]
    assert "95%" in kept.rate.sources[0]
    assert found.fleets[0].fleet.power.value == pytest.approx(150)
    text = found.text(plain=True, explain="goodput")
    assert "tiny/one measured a goodput of" in text
    assert "restart seconds: 30 s  [measured: mean of 3 restarts of tiny/one]" in text


def test_what_the_user_gives_goes_first(run_dir: Path):
    kept = planned(run_dir, restart_seconds=100, failures_per_chip_day=0.5, watts_per_chip=77).fleets[0]
    assert kept.goodput.rate.value == 0.5
    assert kept.fleet.power.value == 77


@pytest.mark.parametrize(
    ("words", "fleet", "said"),
    [
        (("train.global_batch_tokens=8192",), "cpux2", "another model, batch or number of chips"),
        (("model.layers=4",), "cpux2", "another model, batch or number of chips"),
        ((), "cpux4", "another model, batch or number of chips"),
        (("layout.fsdp=1", "layout.tensor=2"), "cpux2", "its layout is another one: layout.replicate=1"),
        ((), "h100x2", "of tiny/one, on cpu-generic, the restart alone is taken"),
    ],
)
def test_what_is_not_comparable_is_predicted_and_said(run_dir: Path, words: tuple[str, ...], fleet: str, said: str):
    found = planned(run_dir, *words, fleet=fleet).fleets[0]
    assert any(said in note for note in found.notes), found.notes
    assert "measured" not in str(found.figures["step"].sources)


def test_runs_that_have_measured_nothing(run_dir: Path, tmp_path: Path):
    (run_dir / BOOK).unlink()
    with pytest.raises(UserError, match="has measured nothing"):
        planned(run_dir)
    with pytest.raises(UserError, match="there is no such run"):
        planned(tmp_path / "nowhere")
