"""Muon, Adafactor and averaged weights on the XLA strategy against the torch-native one: losses, and what moves."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lab.runs import checkpoint, losses, read_rows, small_overrides
from tests.lab.tensors import read_all
from tests.xla.test_conformance import NATIVE, RELATIVE, XLA, runs  # noqa: F401

OPTIMIZERS = {"muon": ["optim=muon"], "adafactor": ["optim=adafactor", "optim.lr=0.05"]}
OPTIMIZERS["average"] = ["train.ema.decay=0.75"]
LAYOUT = XLA["fsdp2_tensor2"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_and_state_are_those_of_torch_native(runs, tmp_path, optimizer):  # noqa: F811
    words = OPTIMIZERS[optimizer]
    ours, theirs = runs(*words, *LAYOUT), runs(*words, python=NATIVE)
    found, expected = (losses(read_rows(run_dir)) for run_dir in (ours, theirs))
    assert len(found) == 20
    np.testing.assert_allclose(found, expected, rtol=RELATIVE)
    sources = [checkpoint(ours, 10), checkpoint(theirs, 10)]
    for python, layout in ((sys.executable, LAYOUT), (NATIVE, [])):
        overrides = small_overrides(runs.tmp, *words, *layout)
        moved = runs.server(python).exchange(overrides, sources, tmp_path / Path(python).parts[-3])
        for source, result in zip(sources, moved, strict=True):
            before, after = read_all(source), read_all(Path(result["path"]))
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)
            np.testing.assert_allclose(result["loss"], expected[10], rtol=RELATIVE)
