"""Runs that heal themselves: real ranks of the product's launcher, killed, suspended, failing, once or for ever."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import stopping
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.config.compose import compose
from orchestrator.distributed.process_template import ProcessTemplate
from orchestrator.launch import start
from orchestrator.launch.start import Outcome, launch
from tests.lab.cli import only_run
from tests.lab.processes import ranks_below
from tests.lab.runs import TINY, small_overrides
from tests.lab.tensors import read_all

ROOT = Path(__file__).parents[2]
STEPS = 12
WORDS = (
    *TINY,
    f"train.max_steps={STEPS}",
    "train.sample.tokens=0",
    "checkpoint.every_steps=5",
    "checkpoint.asynchronous=false",
    "checkpoint.handover.enabled=false",
    "layout.fsdp=2",
    "hardware.devices=2",
    "launch.backoff_seconds=0.1",
)
# Does what `do` says on the ranks and at the step that it says, if the file `once` is not there yet.
CALLBACK = """
import os, signal, time
import lightning.pytorch as lightning

class Fault(lightning.Callback):
    def __init__(self, do, rank, step, once=""):
        self.do, self.rank, self.step, self.once = do, rank, step, once

    def on_train_batch_end(self, trainer, module, *rest):
        if module.step != self.step or int(os.environ["ORCHESTRATOR_RANK"]) != self.rank:
            return
        if self.once:
            try:
                os.close(os.open(self.once, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        if self.do == "raise":
            raise KeyError("what I look for")
        if self.do == "sleep":
            time.sleep(600)
        os.kill(os.getpid(), getattr(signal, self.do))
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Iterator[ProcessTemplate]:
    """One template for all: it takes what a start takes. And the user's own module."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_fault.py").write_text(CALLBACK)
    path = os.pathsep.join([str(folder), str(ROOT)])
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    made = ProcessTemplate([sys.executable, "-m", "orchestrator.launch.worker", "template"], variables, silent=False)
    sys.path.insert(0, str(folder))
    yield made
    sys.path.remove(str(folder))
    made.close()


class _Kept:
    """The template, which no run ends."""

    def __init__(self, template: ProcessTemplate):
        self.start = template.start

    def close(self) -> None:
        pass


@pytest.fixture
def supervised(template, tmp_path, monkeypatch):
    """Starts a run. Returns its outcome, its run.json and what was said."""
    monkeypatch.setattr(start, "_template", lambda *unused: _Kept(template))

    def run(*words: str, fault: str = "") -> tuple[Outcome, dict[str, Any]]:
        given = [f"callbacks=[{{_target_: own_fault.Fault, {fault}}}]"] if fault else []
        outcome = launch(compose(small_overrides(tmp_path, *WORDS, *given, *words)), captured=True)
        facts: dict[str, Any] = json.loads((only_run(tmp_path / "runs") / "run.json").read_text())
        return outcome, facts

    return run


@pytest.fixture(scope="module")
def uninterrupted(template, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights that every run of these must end with."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "_template", lambda *unused: _Kept(template))
        assert launch(compose(small_overrides(folder, *WORDS)), captured=True).code == 0
    return read_all(committed(only_run(folder / "runs") / "checkpoints")[0])


def _assert_whole(folder: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    newest = committed(only_run(folder / "runs") / "checkpoints")[0]
    found = read_all(newest)
    assert found.keys() == uninterrupted.keys()
    assert all(torch.equal(found[name], uninterrupted[name]) for name in found)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_rank_is_killed_goes_on_by_itself_and_ends_with_the_same_weights(
    tmp_path, supervised, uninterrupted, rank
):
    outcome, facts = supervised(fault=f"do: SIGKILL, rank: {rank}, step: 7, once: {tmp_path / 'done'}")
    assert (outcome.code, facts["status"], facts["restarts"]) == (0, "finished", 1)
    first, second = facts["attempts"]
    assert (first["ending"], first["rank"], first["step"], first["saved"]) == ("killed", rank, 7, 5)
    assert first["error"] == "SIGKILL"
    assert first["noticed_seconds"] < 1.0
    assert 0.0 < first["down_seconds"] <= first["lost_seconds"]
    assert (second["ending"], second["start_step"], second["step"]) == ("finished", 5, STEPS)
    assert [leg["start_step"] for leg in facts["legs"]] == [0, 5]
    _assert_whole(tmp_path, uninterrupted)


def test_a_suspended_rank_ends_the_attempt_within_the_time_out_and_all_say_where_they_were(
    tmp_path, supervised, uninterrupted
):
    fault = f"do: SIGSTOP, rank: 1, step: 7, once: {tmp_path / 'done'}"
    outcome, facts = supervised("hardware.timeout_seconds=5", fault=fault)
    assert (outcome.code, facts["status"], facts["restarts"]) == (0, "finished", 1)
    first = facts["attempts"][0]
    assert (first["ending"], first["rank"], first["phase"]) == ("suspended", 1, "training")
    assert 5.0 <= first["noticed_seconds"] <= 8.0
    folder = only_run(tmp_path / "runs") / "hang" / "attempt-0"
    texts = [(folder / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "is suspended (SIGSTOP)" in texts[1]
    assert "own_fault.py" in texts[1], "where it was stopped"
    assert "training" in texts[0]
    assert "most recent call first" in texts[0]
    recorded = json.loads((folder / "rank-0.json").read_text())
    assert recorded["entries"], "the last collectives"
    _assert_whole(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_callback_that_never_returns_is_found_and_when_it_hangs_again_the_run_stops_with_a_diagnosis(
    tmp_path, supervised, caplog
):
    begin = time.monotonic()
    outcome, facts = supervised("hardware.timeout_seconds=4", fault="do: sleep, rank: 1, step: 7")
    assert (outcome.code, facts["status"], facts["restarts"]) == (1, "failed", 1)
    first, second = facts["attempts"]
    assert [(one["ending"], one["rank"], one["step"]) for one in (first, second)] == [("hung", 1, 7)] * 2
    assert "own_fault.py" in (Path(first["stacks"]) / "rank-1.txt").read_text()
    assert "failed twice with the same error after step 7" in caplog.text
    assert time.monotonic() - begin < 120


def test_an_error_that_comes_every_time_stops_the_run_with_a_diagnosis(tmp_path, supervised, caplog):
    with caplog.at_level("INFO", logger="orchestrator"):
        outcome, facts = supervised(fault="do: raise, rank: 0, step: 7")
    assert (outcome.code, facts["status"], facts["restarts"]) == (1, "failed", 1)
    first, second = facts["attempts"]
    assert first["error"] == second["error"]
    assert first["error"].startswith("KeyError at ")
    assert (first["start_step"], second["start_step"]) == (0, 5), "from different checkpoints"
    (said,) = [record.getMessage() for record in caplog.records if "is not started again" in record.getMessage()]
    assert "it has failed twice with the same error after step 7" in said
    assert "own_fault.py:" in said
    assert "step:    8, on sequences 28 to 31 in the order of the data" in said
    assert "began:   after step 0 and after step 5" in said
    assert "the callback own_fault.Fault failed" in str(outcome.error)


@pytest.mark.parametrize("do", ["raise", "SIGSEGV"])
def test_an_error_that_comes_once_costs_one_restart(tmp_path, supervised, uninterrupted, do):
    outcome, facts = supervised(fault=f"do: {do}, rank: 1, step: 7, once: {tmp_path / 'done'}")
    assert (outcome.code, facts["status"], facts["restarts"]) == (0, "finished", 1)
    assert facts["attempts"][0]["error"].startswith("KeyError at " if do == "raise" else "SIGSEGV")
    assert (facts["attempts"][0]["rank"], facts["attempts"][0]["outside"]) == (1, False)
    _assert_whole(tmp_path, uninterrupted)


def test_a_request_to_stop_ends_the_wait_for_a_restart_at_once(tmp_path, supervised, caplog):
    def ask() -> None:
        while "restart    1 of" not in caplog.text:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    caplog.set_level("INFO", logger="orchestrator")
    asked = threading.Thread(target=ask)
    asked.start()
    begin = time.monotonic()
    outcome, facts = supervised("launch.backoff_seconds=300", fault="do: SIGKILL, rank: 1, step: 7")
    asked.join()
    assert time.monotonic() - begin < 100
    assert (outcome.code, facts["status"], facts["restarts"]) == (143, "interrupted", 0)
    assert not stopping.requested()


def test_a_fault_in_the_restart_itself_is_healed_too(tmp_path, supervised, uninterrupted, monkeypatch, caplog):
    """The newest checkpoint is damaged in between, and a process of the second attempt is killed while it starts."""
    real, starts = start.run_local, []

    def run_local(*arguments: Any, **options: Any) -> Any:
        starts.append(1)
        if len(starts) == 2:
            threading.Thread(target=kill_one, daemon=True).start()
        ended = real(*arguments, **options)
        if len(starts) == 1:
            newest = committed(only_run(tmp_path / "runs") / "checkpoints")[0]
            (newest / "manifest.json").write_text("{}")
        return ended

    def kill_one() -> None:
        while 0 not in (ranks := ranks_below(os.getpid())):
            time.sleep(0.01)
        ranks[0].kill()

    monkeypatch.setattr(start, "run_local", run_local)
    outcome, facts = supervised(fault=f"do: SIGKILL, rank: 1, step: 11, once: {tmp_path / 'done'}")
    assert (outcome.code, facts["restarts"]) == (0, 2)
    assert [one["start_step"] for one in facts["attempts"]] == [0, 5, 5]
    assert [one["step"] for one in facts["attempts"]] == [11, None, STEPS]
    assert "step-00000010" in caplog.text, "that it was skipped"
    _assert_whole(tmp_path, uninterrupted)


def test_a_template_that_is_gone_costs_the_imports_and_nothing_else(tmp_path):
    """Processes are started as anywhere else."""
    gone = ProcessTemplate([sys.executable, "-c", "pass"], {}, silent=True)
    assert gone.start({}, piped=False) is None
    assert gone.start({}, piped=True) is None


def test_a_request_to_stop_reaches_a_process_that_was_just_forked(template, tmp_path):
    """Its template ignores signals: what comes before the process has handlers of its own must not be lost."""
    for _ in range(20):
        process = template.start({"ORCHESTRATOR_RUN_DIR": str(tmp_path)}, piped=True)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() in (-signal.SIGTERM, 143)
        process.stdout.close()
        process.stderr.close()


def test_no_rank_is_left_by_a_run(tmp_path, supervised):
    outcome, _ = supervised("train.max_steps=1", "checkpoint.every_steps=null")
    assert outcome.code == 0
    assert not ranks_below(os.getpid())
