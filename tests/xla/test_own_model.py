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


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), EXAMPLE]))
    monkeypatch.syspath_prepend(EXAMPLE)


def _train(python: str, tmp: Path, name: str, *words: str) -> Path:
    overrides = small_overrides(tmp, *OWN, *words, f"runs_dir={tmp / name}", "checkpoint.keep_last=5")
    command = [python, "-m", "orchestrator", "train", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return only_run(tmp / name)


def test_it_trains_moves_and_resumes_as_a_model_of_the_package(tmp_path):
    layout = XLA["fsdp2_tensor2"]
    ours, theirs = _train(sys.executable, tmp_path, "xla", *layout), _train(NATIVE, tmp_path, "native")
    assert len(losses(read_rows(ours))) == 20
    np.testing.assert_allclose(losses(read_rows(ours)), losses(read_rows(theirs)), rtol=RELATIVE)

    # Moved both ways and saved again without a step between: the same bits, optimizer included.
    for python, words, source in ((NATIVE, [], ours), (sys.executable, layout, theirs)):
        overrides = small_overrides(tmp_path, *OWN, *words)
        (moved,) = exchange(python, overrides, 1, [checkpoint(source, 10)], tmp_path / f"moved-{source.parent.name}")
        before, after = read_all(checkpoint(source, 10)), read_all(Path(moved["path"]))
        assert before.keys() == after.keys()
        assert any(key.startswith("optimizer.exp_avg_sq.") for key in before)
        assert all(torch.equal(before[key], after[key]) for key in before)
        np.testing.assert_allclose(moved["loss"], losses(read_rows(source))[10], rtol=RELATIVE)

    # Resumed on the other engine, which the handover check allows, and bitwise on its own.
    other = _train(NATIVE, tmp_path, "other", f"resume={checkpoint(ours, 10)}", "layout.fsdp=1", "layout.tensor=1")
    np.testing.assert_allclose(losses(read_rows(other)), losses(read_rows(ours)), rtol=RELATIVE)
    assert json.loads((other / "handover.json").read_text())[0]["verdict"] == "agrees"
    again = _train(sys.executable, tmp_path, "again", *layout, f"resume={checkpoint(ours, 10)}")
    assert losses(read_rows(again)) == losses(read_rows(ours))
    before, after = read_all(checkpoint(ours)), read_all(checkpoint(again))
    assert all(torch.equal(before[key], after[key]) for key in before)
