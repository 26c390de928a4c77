"""Handovers between the XLA strategy (torch 2.9) and the torch-native one (torch 2.13), both ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.checkpoints import forge
from tests.lab.cli import only_run
from tests.lab.run_server import ROOT
from tests.lab.runs import checkpoint, losses, read_rows, small_overrides
from tests.lab.slow import cases

# The torch-native side runs where users run it: in the environment of the current torch.
NATIVE = os.environ.get("ORCHESTRATOR_VENV", str(ROOT / ".venv")) + "/bin/python"
XLA = ["hardware=tpu", "hardware.simulate=4"]
_VERB = "import sys; from orchestrator.cli.handover import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run directory of each side, trained once."""
    tmp = tmp_path_factory.mktemp("runs")
    done: dict[str, Path] = {}

    def get(side: str) -> Path:
        if side not in done:
            python, words = (sys.executable, [*XLA, "layout.fsdp=4"]) if side == "xla" else (NATIVE, [])
            overrides = small_overrides(tmp, *words, f"runs_dir={tmp / side}", "checkpoint.every_steps=5")
            command = [python, "-m", "orchestrator", "train", *overrides, "checkpoint.keep_last=5"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
            assert result.returncode == 0, result.stdout + result.stderr
            done[side] = only_run(tmp / side)
        return done[side]

    return get


def _check(python: str, source: Path, *words: str) -> tuple[int, dict]:
    command = [python, "-c", _VERB, str(source), *words, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.stdout, result.stderr
    return result.returncode, json.loads(result.stdout)


NATIVE_LAYOUTS = {
    "1": ["hardware=cpu", "layout=auto"],
    "fsdp4": ["hardware=cpu", "hardware.devices=4", "layout.fsdp=4"],
    "fsdp2_tensor2": ["hardware=cpu", "hardware.devices=4", "layout.fsdp=2", "layout.tensor=2"],
    "context2": ["hardware=cpu", "hardware.devices=2", "layout.fsdp=1", "layout.context=2"],
}
XLA_LAYOUTS = {
    "fsdp4": [*XLA, "layout.fsdp=4"],
    "fsdp2_tensor2": [*XLA, "layout.fsdp=2", "layout.tensor=2"],
    "fsdp2_context2": [*XLA, "layout.fsdp=2", "layout.context=2"],
    "replicate4": [*XLA, "layout.replicate=4", "layout.fsdp=1"],
}


@pytest.mark.parametrize("name", cases(NATIVE_LAYOUTS, quick=["1", "fsdp2_tensor2"]))
def test_saved_by_xla_and_checked_by_torch_native(runs, name):
    code, result = _check(NATIVE, checkpoint(runs("xla"), 10), *NATIVE_LAYOUTS[name])
    assert (code, result["verdict"]) == (0, "agrees"), result
    assert {"backend", "software"} <= set(result["changed"])


@pytest.mark.parametrize("name", cases(XLA_LAYOUTS, quick=["fsdp2_tensor2", "fsdp2_context2"]))
def test_saved_by_torch_native_and_checked_by_xla(runs, name):
    code, result = _check(sys.executable, checkpoint(runs("native"), 10), *XLA_LAYOUTS[name])
    assert (code, result["verdict"]) == (0, "agrees"), result
    assert {"backend", "software"} <= set(result["changed"])


def test_xla_catches_a_changed_weight(runs, tmp_path):
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(checkpoint(runs("native"), 10), bad)
    forge(bad, "model.norm.weight", lambda tensor: tensor.mul_(1.01))
    code, result = _check(sys.executable, bad, *XLA_LAYOUTS["fsdp4"])
    assert (code, result["verdict"], result["other_bits"]) == (1, "differs", ["model.norm.weight"])
    assert not result["logits"]["agrees"]


def test_measuring_compiles_nothing_in_the_middle_of_a_run(runs):
    """With a save every five steps: its graph was there before the first step."""
    rows = [row for row in read_rows(runs("xla")) if "loss" in row]
    assert len(losses(rows)) == 20
    compiled = {row["step"]: row["compilations"] for row in rows}
    assert compiled[20] == compiled[2], compiled
