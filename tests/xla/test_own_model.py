"""A user's model (`examples/own_model`) on the XLA strategy: losses, checkpoints and resumes as on the other one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lab.cli import only_run
from tests.lab.exchange import ROOT, exchange
from tests.lab.runs import checkpoint, losses, read_rows, small_overrides
from tests.lab.tensors import read_all
from tests.xla.test_conformance import NATIVE, RELATIVE, XLA

EXAMPLE = str(ROOT / "examples" / "own_model")
OWN = ("model._target_=own_model.model.SigmoidDecoder", "model.kv_heads=4")


LAYOUT = XLA["fsdp2_tensor2"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), EXAMPLE])}


def _train(python: str, tmp: Path, name: str, *words: str) -> Path:
    overrides = small_overrides(tmp, *OWN, *words, f"runs_dir={tmp / name}", "checkpoint.keep_last=5")
    command = [python, "-m", "orchestrator", "train", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT, env=_environment())
    assert result.returncode == 0, result.stdout + result.stderr
    return only_run(tmp / name)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def ours(tmp):
    return _train(sys.executable, tmp, "xla", *LAYOUT)


@pytest.fixture(scope="module")
def theirs(tmp):
    return _train(NATIVE, tmp, "native")


def test_its_losses_are_those_of_the_torch_native_strategy(ours, theirs):
    assert len(losses(read_rows(ours))) == 20
    np.testing.assert_allclose(losses(read_rows(ours)), losses(read_rows(theirs)), rtol=RELATIVE)


def test_its_checkpoints_move_both_ways_bitwise(ours, theirs, tmp, monkeypatch):
    """Saved again without a step between: the same bits, optimizer included."""
    monkeypatch.setenv("PYTHONPATH", _environment()["PYTHONPATH"])
    for python, words, source in ((NATIVE, [], ours), (sys.executable, LAYOUT, theirs)):
        overrides = small_overrides(tmp, *OWN, *words)
        (moved,) = exchange(python, overrides, 1, [checkpoint(source, 10)], tmp / f"moved-{len(words)}")
        before, after = read_all(checkpoint(source, 10)), read_all(Path(moved["path"]))
        assert before.keys() == after.keys()
        assert any(key.startswith("optimizer.exp_avg_sq.") for key in before)
        assert all(torch.equal(before[key], after[key]) for key in before)
        np.testing.assert_allclose(moved["loss"], losses(read_rows(source))[10], rtol=RELATIVE)


def test_it_goes_on_with_the_other_strategy(ours, tmp):
    words = ["layout.fsdp=1", "layout.tensor=1", "hardware.simulate=null", f"resume={checkpoint(ours, 10)}"]
    other = _train(NATIVE, tmp, "other", *words)
    np.testing.assert_allclose(losses(read_rows(other)), losses(read_rows(ours)), rtol=RELATIVE)
    assert json.loads((other / "handover.json").read_text())[0]["verdict"] == "agrees"


def test_it_resumes_bitwise(ours, tmp):
    again = _train(sys.executable, tmp, "again", *LAYOUT, f"resume={checkpoint(ours, 10)}")
    assert losses(read_rows(again)) == losses(read_rows(ours))
    before, after = read_all(checkpoint(ours)), read_all(checkpoint(again))
    assert all(torch.equal(before[key], after[key]) for key in before)
