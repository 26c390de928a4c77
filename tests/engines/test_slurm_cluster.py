"""A real Slurm cluster of two nodes on this machine: what `launch engine=slurm` promises, with nobody typing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.lab.run_server import ROOT
from tests.lab.runs import TINY, checkpoint, small_config, small_overrides, train
from tests.lab.slow import slow
from tests.lab.tensors import read_all

CLUSTER = ROOT / "scripts" / "cluster"
SECONDS = 240  # on a machine that is busy
STEPS = 20
RUN = (*TINY, "layout.fsdp=2", f"train.max_steps={STEPS}", "checkpoint.every_steps=5", "train.sample.tokens=0")


class Slurm:
    """The cluster, and a user of it in a folder of his own."""

    def __init__(self, folder: Path, work: Path):
        self.folder, self.work = folder, work
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "ORCHESTRATOR"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *words: object) -> str:
        command = list(map(str, words))
        done = subprocess.run(command, env=self.environment, cwd=self.work, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def node(self, command: str, name: str) -> None:
        self.call(CLUSTER, "slurm", command, name, self.folder)

    def launch(self, *words: str) -> str:
        return self.call(sys.executable, "-m", "orchestrator", "launch", *words)

    def jobs(self) -> dict[str, str]:
        """What Slurm says of the last job."""
        said = self.call("scontrol", "show", "job", "--oneliner").splitlines()
        return dict(word.partition("=")[::2] for word in said[-1].split())

    def wait(self, condition: Callable[[], bool], run_dir: Path) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            lines = "".join(path.read_text() for path in run_dir.glob("launch/slurm-*.out"))
            assert time.monotonic() < deadline, f"{self.jobs()}\n{lines}"
            time.sleep(0.3)

    def ended(self) -> bool:
        return self.jobs()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    done = subprocess.run([CLUSTER, "slurm", "start", folder], capture_output=True, text=True, timeout=300)
    if "there can be no Slurm cluster here" in done.stderr:
        pytest.skip(done.stderr)
    try:
        assert done.returncode == 0, done.stderr
        yield folder
    finally:
        subprocess.run([CLUSTER, "slurm", "stop", folder], check=True, timeout=60)


@pytest.fixture
def slurm(cluster, tmp_path):
    return Slurm(cluster, tmp_path)


def paced(seconds: float) -> str:
    return f"callbacks=[{{_target_: tests.engines.pace.Paced, seconds: {seconds}}}]"


def uninterrupted(tmp_path: Path) -> dict[str, torch.Tensor]:
    """What the run has at its end if nothing happens to it."""
    run_dir = tmp_path / "uninterrupted"
    train(small_config(tmp_path, *RUN), 2, run_dir)
    return read_all(checkpoint(run_dir, STEPS))


def assert_bitwise(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_node_is_lost_in_the_middle_and_the_run_ends_bitwise_as_if_it_were_not(slurm, tmp_path):
    words = small_overrides(tmp_path, *RUN, paced(0.2))
    slurm.launch("engine=slurm", "launch.nodes=2", "run_id=lost", *words)
    run_dir = tmp_path / "runs" / "tiny" / "lost"
    slurm.wait((checkpoint(run_dir, 10) / "manifest.json").exists, run_dir)
    slurm.node("kill", "n2")
    slurm.wait(lambda: slurm.jobs().get("Restarts") == "1", run_dir)
    slurm.node("boot", "n2")  # as the machine does when it has power again
    slurm.wait(slurm.ended, run_dir)
    assert slurm.jobs()["JobState"] == "COMPLETED"
    assert "finished (COMPLETED)" in slurm.launch("status", "lost")
    printed = slurm.launch("logs", "lost")
    assert printed.count("goes on from step-") == 1
    assert_bitwise(read_all(checkpoint(run_dir, STEPS)), uninterrupted(tmp_path))


@slow
def test_the_time_limit_comes_and_the_run_goes_on_in_the_next_start(slurm, tmp_path):
    words = small_overrides(tmp_path, *RUN, paced(6))
    slurm.launch("engine=slurm", "launch.nodes=2", "run_id=limit", "launch.time=3", "launch.signal_seconds=60", *words)
    run_dir = tmp_path / "runs" / "tiny" / "limit"
    slurm.wait(lambda: slurm.jobs().get("Restarts") == "1", run_dir)
    saved = max(int(path.parent.name.partition("-")[2]) for path in run_dir.glob("checkpoints/*/manifest.json"))
    assert 0 < saved < STEPS
    slurm.wait(lambda: slurm.ended() or int(slurm.jobs()["Restarts"]) > 3, run_dir)
    assert slurm.jobs()["JobState"] == "COMPLETED"
    assert f"goes on from step-{saved:08d}" in slurm.launch("logs", "limit")
    assert_bitwise(read_all(checkpoint(run_dir, STEPS)), uninterrupted(tmp_path))


@slow
def test_a_killed_process_is_started_again_on_the_same_nodes(slurm, tmp_path):
    words = small_overrides(tmp_path, *RUN, paced(0.3))
    slurm.launch("engine=slurm", "launch.nodes=2", "run_id=killed", *words)
    run_dir = tmp_path / "runs" / "tiny" / "killed"
    slurm.wait((checkpoint(run_dir, 10) / "manifest.json").exists, run_dir)
    pids = slurm.call("pgrep", "--full", "^[^ ]*python -m orchestrator train resume=auto run_id=killed").split()
    slurm.call("kill", "-KILL", pids[-1])
    slurm.wait(slurm.ended, run_dir)
    assert slurm.jobs()["JobState"] == "COMPLETED"
    assert slurm.jobs()["Restarts"] == "0"
    assert "started again (1 of 3)" in slurm.launch("logs", "killed")
    assert_bitwise(read_all(checkpoint(run_dir, STEPS)), uninterrupted(tmp_path))


@slow
def test_cancel_saves_first_and_a_sweep_is_an_array(slurm, tmp_path):
    words = small_overrides(tmp_path, *RUN, paced(0.5))
    words = [word for word in words if word != "layout.fsdp=2"]
    slurm.launch("engine=slurm", "run_id=many", "-m", "optim.lr=1e-3,3e-4", *words, "checkpoint.every_steps=1000")
    runs = [tmp_path / "runs" / "tiny" / f"many-{number}" for number in (0, 1)]
    for run_dir in runs:
        slurm.wait(lambda run_dir=run_dir: (run_dir / "metrics.jsonl").exists(), run_dir)
    slurm.wait(lambda: all((one / "metrics.jsonl").read_text().count("\n") > 3 for one in runs), runs[0])
    slurm.launch("cancel", "many")
    slurm.wait(slurm.ended, runs[0])
    assert "state      cancelled" in slurm.launch("status", "many")
    for run_dir in runs:
        assert len(list(run_dir.glob("checkpoints/*/manifest.json"))) == 1, "it was saved"
    assert slurm.launch("logs", "many").count("cancelled, not queued again") == 2
