"""Snapshots in the memory of the host on XLA: the format is the same, and so is the restart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from orchestrator.config.compose import compose
from orchestrator.distributed.world import World
from orchestrator.launch.run import work
from orchestrator.training.callbacks.snapshots import Snapshots
from tests.lab.runs import TINY, resolved_run, small_overrides

WORDS = ["hardware=tpu", "hardware.simulate=2", "layout.fsdp=2", *TINY, "train.max_steps=4", "train.sample.tokens=0"]
WORDS += ["checkpoint.every_steps=null", "checkpoint.memory.enabled=true", "checkpoint.memory.every_steps=2"]


def _run(tmp_path: Path, die_after: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2", "OMP_NUM_THREADS": "1"}
    words = small_overrides(tmp_path, *WORDS, f"checkpoint.memory.dir={tmp_path}")
    command = [sys.executable, "-m", "tests.xla.test_memory", str(tmp_path / "run"), str(die_after), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_killed_it_goes_on_from_memory_with_every_bit(tmp_path):
    (tmp_path / "run").mkdir()
    killed = _run(tmp_path, die_after=2)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list((tmp_path / "run").glob("checkpoints/step-*")), "storage has nothing yet"
    ended = _run(tmp_path, die_after=0)
    assert ended.returncode == 0, ended.stderr
    leg = json.loads((tmp_path / "run" / "run.json").read_text())["legs"][-1]
    assert (leg["start_step"], leg["restored_from"], leg["handover"]["verdict"]) == (2, "memory", "agrees")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000004"]


def main(run_dir: Path, die_after: int, words: list[str]) -> int:
    """Train, and die at once after a step and its snapshot, if that is asked for."""
    real = Snapshots.on_train_batch_end

    def step_and_die(self, trainer, module, *rest):
        self._saver.join()
        real(self, trainer, module, *rest)
        self._saver.join()
        if module.step == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    if die_after:
        Snapshots.on_train_batch_end = step_and_die
    return work(resolved_run(compose(words).config, World(), run_dir), World())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
