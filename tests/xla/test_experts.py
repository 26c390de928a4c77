"""Mixtures of experts on virtual devices: the same losses as one torch-native process, one program, any checkpoint."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.lab.runs import assert_trained_alike, read_rows
from tests.lab.slow import cases
from tests.strategies.test_experts import MOE
from tests.xla.test_conformance import NATIVE, RELATIVE, Trained, assert_exchanged, simulate

LAYOUTS = {
    "expert4": simulate(4, "layout.expert=4", "layout.fsdp=1"),
    "expert2_fsdp2": simulate(4, "layout.expert=2", "layout.fsdp=2"),
    "expert2_tensor2": simulate(4, "layout.expert=2", "layout.tensor=2", "layout.fsdp=1"),
    "expert2_context2": simulate(4, "layout.expert=2", "layout.context=2", "layout.fsdp=1"),
}
ISSUE = ["expert4", "expert2_fsdp2", "expert2_tensor2"]


EXCHANGED = {
    "native 1": (NATIVE, []),
    "native expert4": (NATIVE, ["layout.expert=4", "layout.fsdp=1", "hardware.devices=4"]),
    "native pipeline2_fsdp2": (NATIVE, ["layout.pipeline=2", "layout.fsdp=2", "hardware.devices=4"]),
    "xla expert2_fsdp2": (sys.executable, LAYOUTS["expert2_fsdp2"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    trained = Trained(tmp_path_factory.mktemp("runs"))
    yield trained
    trained.close()


@pytest.mark.parametrize("name", cases(LAYOUTS, quick=ISSUE))
def test_same_losses_norms_and_loads_with_one_program(runs, name):
    ours, theirs = read_rows(runs(*MOE, *LAYOUTS[name])), read_rows(runs(*MOE, python=NATIVE))
    assert_trained_alike(ours, theirs, RELATIVE)
    steps, expected = ([row for row in rows if "loss" in row] for rows in (ours, theirs))
    for figure in ("router_loss", "expert_load_max", "router_entropy"):
        np.testing.assert_allclose([row[figure] for row in steps], [row[figure] for row in expected], rtol=1e-4)
    # A checkpoint after ten steps compiles its copies once.
    assert steps[8]["compilations"] == steps[1]["compilations"] > 0


@pytest.mark.parametrize("target", cases(EXCHANGED, quick=["xla expert2_fsdp2"]))
def test_every_checkpoint_loads_everywhere_bitwise(runs, target, tmp_path):
    assert_exchanged(runs, EXCHANGED, target, tmp_path, *MOE)
