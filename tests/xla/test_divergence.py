"""On XLA a step that is not finite changes nothing either: part of the compiled step, and read a step late."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

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


def _run(
    tmp_path: Path,
    name: str,
    steps: list[int],
    *words: str,
    poison: bool = True,
    first: int | None = None,
    flip: int = 0,
) -> tuple[int, Path, str]:
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4", "OMP_NUM_THREADS": "1"}
    about = json.dumps(
        {"steps": steps, "poison": poison, "first": first, "flip": flip, "run_dir": str(tmp_path / name)}
    )
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


def test_a_rewound_run_compiles_no_step_again_and_is_one_that_left_the_data_out(tmp_path):
    words = ["train.on_nonfinite=rewind", "checkpoint.every_steps=2", "logger.every_steps=1"]
    code, run_dir, output = _run(tmp_path, "rewound", [4], *words, first=3 * 8)
    assert code == 0, output
    (rewind,) = json.loads((run_dir / "run.json").read_text())["legs"][-1]["rewinds"]
    assert (rewind["step"], rewind["to"], rewind["skipped"]) == (4, 2, [2 * 8, 4 * 8])
    assert rewind["diagnosis"]["layer"] == "layers.1"
    again = [row for row in _rows(run_dir) if row["step"] > 2][-5:]
    assert [row["step"] for row in again] == [3, 4, 5, 6, 7]
    assert again[-1]["compilations"] == again[0]["compilations"], "the graph of a step is the one from before"

    code, other, output = _run(tmp_path, "told", [], *words, "data.skip=[[16,32]]", poison=False)
    assert code == 0, output
    ours, theirs = read_all(checkpoint(run_dir, 7)), read_all(checkpoint(other, 7))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_device_whose_copy_differs_is_named(tmp_path):
    words = ["train.check_replicas_every=2", "checkpoint.every_steps=1", "checkpoint.keep_last=1"]
    code, run_dir, output = _run(tmp_path, "flipped", [], *words, poison=False, flip=5)
    assert code == 1, output
    found = json.loads((run_dir / "run.json").read_text())["legs"][-1]["corrupted"]
    assert (found["step"], found["good_step"], found["certain"]) == (6, 4, False)
    # It spreads, but from the copy that was changed: along the tensor axis, of which two devices have one part each.
    assert any("CPU:1" in device for device in found["suspects"])
    assert [Path(path).name for path in found["set_aside"]] == ["step-00000005"]
    assert Path(found["checkpoint"]) == checkpoint(run_dir, 4)


@contextmanager
def flipped(step: int) -> Iterator[None]:
    """Within it one device's copy of a norm's part is changed after `step`; 0: never."""
    import torch_xla.distributed.spmd as xs

    from orchestrator.training.module import LanguageModule

    training_step = LanguageModule.training_step

    def spoil(self: LanguageModule, batch: Any, index: int) -> None:
        training_step(self, batch, index)
        if self.step == step:
            wrapped = xs.wrap_if_sharded(self.model.norm.weight.data)
            shards = wrapped.local_shards
            shards[1].data = shards[1].data + 2.0**-20
            wrapped.load_local_shards_(shards)

    with mock.patch.object(LanguageModule, "training_step", spoil):
        yield


def main(about: dict[str, Any], words: list[str]) -> int:
    from orchestrator.errors import RunFailedError
    from orchestrator.launch.run import work

    run_dir = Path(about["run_dir"])
    run_dir.mkdir(parents=True)
    with ExitStack() as faults:
        if about["steps"]:
            poison = poisoned(about["steps"], 1, "forward", first=about["first"])
            faults.enter_context(poison if about["poison"] else left_out(about["steps"]))
        faults.enter_context(flipped(about["flip"]))
        faults.enter_context(printing())
        try:
            return work(resolved_run(compose(words).config, World(), run_dir), World())
        except RunFailedError as error:
            print(error)
            return error.exit_code


if __name__ == "__main__":
    from orchestrator.stopping import end_process

    end_process(main(json.loads(sys.argv[1]), sys.argv[2:]))
