"""On XLA a step that is not finite changes nothing either: part of the compiled step, and read a step late."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from orchestrator.config.compose import compose
from orchestrator.distributed.world import World
from orchestrator.errors import DIVERGED
from orchestrator.output import printing
from tests.lab.poison import left_out, poisoned
from tests.lab.runs import checkpoint, resolved_run, small_overrides
from tests.lab.tensors import read_all

WORDS = ["hardware=tpu", "hardware.simulate=4", "layout.fsdp=2", "layout.tensor=2", "train.max_steps=7"]
WORDS += ["checkpoint.every_steps=null", "logger.every_steps=5", "optim.schedule.warmup_steps=2"]


def _run(tmp_path: Path, name: str, steps: list[int], *words: str, poison: bool = True) -> tuple[int, Path, str]:
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4", "OMP_NUM_THREADS": "1"}
    about = json.dumps({"steps": steps, "poison": poison, "run_dir": str(tmp_path / name)})
    command = [sys.executable, "-m", "tests.xla.test_divergence", about, *small_overrides(tmp_path, *WORDS, *words)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return result.returncode, tmp_path / name, result.stdout + result.stderr


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_a_bad_step_changes_no_bit_compiles_nothing_and_stops_the_run(tmp_path):
    skipped = _run(tmp_path, "skipped", [4], "train.on_nonfinite=skip")
    without = _run(tmp_path, "without", [4], "train.on_nonfinite=skip", poison=False)
    assert (skipped[0], without[0]) == (0, 0), skipped[2] + without[2]
    ours, theirs = read_all(checkpoint(skipped[1], 7)), read_all(checkpoint(without[1], 7))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = _rows(skipped[1])
    assert [row["step"] for row in rows if row["loss"] is None] == [4]
    assert rows[-1]["compilations"] == rows[4]["compilations"], "nothing is compiled for reading it"

    code, run_dir, output = _run(tmp_path, "stopped", [4], "train.max_steps=7")
    assert code == DIVERGED, output
    assert "began in layers.1: the output is not finite" in output
    about = json.loads((run_dir / "run.json").read_text())
    assert about["status"] == "diverged"
    assert not about["legs"][-1]["diverged"]["diagnosis"]["state"]
    assert [row["step"] for row in _rows(run_dir)] == [1, 2, 3, 4]


def main(about: dict[str, Any], words: list[str]) -> int:
    from orchestrator.launch.run import work

    run_dir = Path(about["run_dir"])
    run_dir.mkdir(parents=True)
    with ExitStack() as faults:
        fault = poisoned(about["steps"], 1, "forward") if about["poison"] else left_out(about["steps"])
        faults.enter_context(fault)
        faults.enter_context(printing())
        return work(resolved_run(compose(words).config, World(), run_dir), World())


if __name__ == "__main__":
    from orchestrator.stopping import end_process

    end_process(main(json.loads(sys.argv[1]), sys.argv[2:]))
