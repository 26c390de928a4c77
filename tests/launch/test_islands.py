"""Runs with islands: the real launcher and hub, with islands of a few numbers in place of training ones."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import pytest

from orchestrator.config.compose import compose
from orchestrator.errors import ConfigErrors
from orchestrator.launch.island_words import Joining, island_words
from orchestrator.launch.start import Outcome, launch
from orchestrator.report.run_data import summarise
from orchestrator.report.run_frame import frame
from tests.lab.cli import only_run
from tests.lab.runs import TINY
from tests.lab.stub_island import write_stub

WORDS = (
    *TINY,
    "train.max_steps=16",
    "train.global_batch_tokens=512",
    "train.seq_len=64",
    "islands.inner_steps=4",
    "islands.patience_seconds=30",
    "launch.backoff_seconds=0.1",
)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a run of two islands, each by a program; returns its outcome."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before_it = set(psutil.Process().children())  # such as a fork server of other tests

    def start(*words: str, before: Mapping[str, str] = MappingProxyType({})) -> Outcome:
        programs = [write_stub(tmp_path / name, before.get(name, "")) for name in ("a", "b")]
        members = ",".join(f"{{name: {one.name}, hardware: cpu, python: {one}}}" for one in programs)
        outcome = launch(compose([*WORDS, f"islands=[{members}]", f"runs_dir={tmp_path / 'runs'}", *words]))
        assert set(psutil.Process().children()) <= before_it, "nothing of a run outlives it"
        return outcome

    return start


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _meanwhile(do: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    return thread


def _when(there: Callable[[], bool], do: Callable[[], Any]) -> threading.Thread:
    def wait() -> None:
        deadline = time.monotonic() + 30
        while not there() and time.monotonic() < deadline:
            time.sleep(0.01)
        do()

    return _meanwhile(wait)


def _process(name: str) -> psutil.Process:
    return next(
        child for child in psutil.Process().children(recursive=True) if any(name in word for word in child.cmdline())
    )


def test_a_run_of_two_islands_ends_with_one_record(start, tmp_path):
    outcome = start()
    run_dir = only_run(tmp_path / "runs")
    assert (outcome.code, outcome.run_dir.resolve()) == (0, run_dir.resolve())
    facts = json.loads((run_dir / "run.json").read_text())
    assert (facts["status"], facts["legs"][-1]["end_step"]) == ("finished", 16)
    assert [row["step"] for row in _lines(run_dir / "metrics.jsonl")] == list(range(1, 17))
    islands = facts["legs"][-1]["islands"]
    assert {name: one["sequences"] > 0 for name, one in islands.items()} == {"a": True, "b": True}
    assert sum(one["sequences"] for one in islands.values()) == 16 * 8
    assert sum(entry["kind"] == "exchange" for entry in _lines(run_dir / "islands" / "exchanges.jsonl")) == 4
    assert (run_dir / "islands" / "key").stat().st_mode & 0o777 == 0o600
    assert summarise(run_dir)["status"] == "finished"
    page = (run_dir / "report.html").read_text()
    for part in ("<h2>Islands</h2>", "chart-islands-trained", "4 exchanges"):
        assert part in page
    lines = dict(frame(facts, _lines(run_dir / "metrics.jsonl"), 80))
    assert lines["hardware"].startswith("2 islands, diloco: every 4 steps")
    assert "% of the sequences" in lines["island b"]


def test_a_killed_island_is_started_again(start, tmp_path):
    runs = tmp_path / "runs"
    killed = []

    def kill() -> None:
        victim = _process(str(tmp_path / "b"))
        killed.append(victim.pid)
        victim.kill()

    record = lambda: any("exchange" in path.read_text() for path in runs.glob("*/*/islands/exchanges.jsonl"))  # noqa: E731
    _when(record, kill)
    assert start("train.max_steps=32").code == 0
    run_dir = only_run(runs)
    assert killed
    entries = _lines(run_dir / "islands" / "exchanges.jsonl")
    assert len([entry for entry in entries if entry["kind"] == "welcome" and entry["island"] == "b"]) == 2
    assert [row["step"] for row in _lines(run_dir / "metrics.jsonl")] == list(range(1, 33))


def test_a_killed_hub_goes_on_from_its_newest_checkpoint_and_its_islands_come_back(start, tmp_path):
    runs, killed = tmp_path / "runs", []

    def kill() -> None:
        killed.extend(path.name for path in runs.glob("*/*/checkpoints/step-*"))
        _process("orchestrator.launch.worker").kill()

    _when(lambda: any(runs.glob("*/*/checkpoints/step-*/manifest.json")), kill)
    assert start("train.max_steps=120", "checkpoint.every_steps=20").code == 0
    assert killed
    run_dir = only_run(runs)
    facts = json.loads((run_dir / "run.json").read_text())
    assert [leg["start_step"] > 0 for leg in facts["legs"]] == [False, True]
    assert facts["status"] == "finished"
    # The second hub took the state of the first, so that no sequence was trained twice.
    assert facts["legs"][-1]["booked"] == facts["legs"][-1]["sequences"] == 120 * 8
    found = _lines(run_dir / "islands" / "exchanges.jsonl")
    starts = [entry["start"] for entry in found if entry["kind"] == "welcome" and entry["leg"] == 1]
    assert len(starts) >= 2


def test_a_request_to_stop_reaches_all_islands(start, tmp_path):
    runs = tmp_path / "runs"
    record = lambda: any("exchange" in path.read_text() for path in runs.glob("*/*/islands/exchanges.jsonl"))  # noqa: E731
    _when(record, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert start("train.max_steps=4000").code == 143
    facts = json.loads((only_run(runs) / "run.json").read_text())
    assert facts["status"] == "interrupted"
    assert 0 < facts["legs"][-1]["end_step"] < 4000


def test_an_island_that_cannot_start_ends_the_run_before_it_begins(start, tmp_path, capfd):
    from orchestrator.output import printing

    with printing():
        outcome = start(before={"b": "print('error: there is no torch_xla here'); sys.exit(2)"})
    assert outcome.code == 2
    said = capfd.readouterr().err
    assert "  | error: there is no torch_xla here" in said
    assert "the run has ended before all was trained (b: exit code 2)" in said
    assert not list((tmp_path / "runs").glob("*/*"))  # nothing was trained


def test_an_island_that_goes_on_with_other_devices_does_not_keep_the_layout_of_its_save(tmp_path):
    config = compose(["islands=[{hardware: cpu}, {hardware: cpu, devices: 2, layout: {tensor: 2}}]"]).config
    joining = Joining("tcp://127.0.0.1:1", tmp_path / "key", tmp_path)
    found = [set(island_words(config, "a", member, joining)) for member in config.islands.members]
    assert {"hardware.devices='auto'", "layout.fsdp='auto'", "layout.tensor='auto'"} <= found[0]
    assert {"hardware.devices=2", "layout.fsdp='auto'", "layout.tensor=2"} <= found[1]


def test_what_is_no_run_with_islands_is_said(tmp_path):
    words = [*WORDS, f"runs_dir={tmp_path}"]
    with pytest.raises(Exception, match="there are no islands to exchange anything"):
        launch(compose([*words, "islands=decoupled"]))
    with pytest.raises(Exception, match="the interpreter of an island is not there"):
        launch(compose([*words, "islands=[{hardware: cpu, python: /no/python}]"]))
    with pytest.raises(ConfigErrors):
        compose([*words, "islands=[{hardware: cpu, name: a}, {hardware: cpu, name: a}]"])
