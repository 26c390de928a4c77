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
from tests.lab.run_server import ROOT
from tests.lab.runs import checkpoint, losses, read_rows, small_overrides
from tests.lab.tensors import read_all
from tests.xla.test_conformance import NATIVE, RELATIVE, XLA, Trained

EXAMPLE = str(ROOT / "examples" / "own_model")
OWN = ("model._target_=own_model.model.SigmoidDecoder", "model.kv_heads=4")


LAYOUT = XLA["fsdp2_tensor2"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), EXAMPLE])}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trained = Trained(tmp_path_factory.mktemp("own"), EXAMPLE)
    yield trained
    trained.close()


@pytest.fixture(scope="module")
def ours(trained):
    return trained(*OWN, *LAYOUT)


@pytest.fixture(scope="module")
def theirs(trained):
    return trained(*OWN, python=NATIVE)


def test_its_losses_are_those_of_the_torch_native_strategy(ours, theirs):
    assert len(losses(read_rows(ours))) == 20
    np.testing.assert_allclose(losses(read_rows(ours)), losses(read_rows(theirs)), rtol=RELATIVE)


def test_its_checkpoints_move_both_ways_bitwise(ours, theirs, trained, tmp_path):
    """Saved again without a step between: the same bits, optimizer included."""
    for python, words, source in ((NATIVE, [], ours), (sys.executable, LAYOUT, theirs)):
        overrides = small_overrides(trained.tmp, *OWN, *words)
        (moved,) = trained.server(python).exchange(overrides, [checkpoint(source, 10)], tmp_path / f"{len(words)}")
        before, after = read_all(checkpoint(source, 10)), read_all(Path(moved["path"]))
        assert before.keys() == after.keys()
        assert any(key.startswith("optimizer.exp_avg_sq.") for key in before)
        assert all(torch.equal(before[key], after[key]) for key in before)
        np.testing.assert_allclose(moved["loss"], losses(read_rows(source))[10], rtol=RELATIVE)


def test_it_goes_on_with_the_other_strategy(ours, trained, tmp_path):
    """As a user moves a run: on the command line."""
    words = ["layout.fsdp=1", "layout.tensor=1", "hardware.simulate=null", f"resume={checkpoint(ours, 10)}"]
    overrides = small_overrides(trained.tmp, *OWN, *words, f"runs_dir={tmp_path}")
    command = [NATIVE, "-m", "orchestrator", "train", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT, env=_environment())
    assert result.returncode == 0, result.stdout + result.stderr
    other = only_run(tmp_path)
    np.testing.assert_allclose(losses(read_rows(other)), losses(read_rows(ours)), rtol=RELATIVE)
    assert json.loads((other / "handover.json").read_text())[0]["verdict"] == "agrees"


def test_it_resumes_bitwise(ours, trained):
    again = trained(*OWN, *LAYOUT, resume_from=checkpoint(ours, 10))
    assert losses(read_rows(again)) == losses(read_rows(ours))[10:]
    before, after = read_all(checkpoint(ours)), read_all(checkpoint(again))
    assert all(torch.equal(before[key], after[key]) for key in before)
