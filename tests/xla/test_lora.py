"""Adapters on XLA: the losses of one torch-native process, and checkpoints that move between the engines."""

from __future__ import annotations

import json

import pytest
import torch

from tests.lab.runs import assert_trained_alike, checkpoint, losses, read_rows
from tests.lab.slow import cases, slow
from tests.lab.tensors import read_all
from tests.xla.test_conformance import NATIVE, XLA, Trained

LORA = ("train.lora.rank=4", "train.lora.alpha=8", "optim.lr=0.01")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories by overrides, each trained once."""
    trained = Trained(tmp_path_factory.mktemp("runs"))
    yield trained
    trained.close()


@pytest.fixture(scope="module")
def lora(runs):
    """The words of a run of adapters beside weights that the torch-native strategy trained."""
    base = checkpoint(runs("train.max_steps=2", "checkpoint.every_steps=2", python=NATIVE), 2)
    return (f"train.init_from={base}", *LORA)


@pytest.mark.parametrize("name", cases(["fsdp2_tensor2", "context2_fsdp2"], quick=["fsdp2_tensor2"]))
def test_same_losses_as_torch_native(runs, lora, name):
    # Full remat: torch_xla's checkpoint is reentrant, and nothing before the first block is trained.
    ours = read_rows(runs(*XLA[name], *lora, "train.remat=full"))
    theirs = read_rows(runs(*lora, python=NATIVE))
    assert_trained_alike(ours, theirs, 1e-5)


@slow
def test_adapters_move_to_xla_bitwise(runs, lora):
    whole = runs(*lora, python=NATIVE)
    moved = runs(*XLA["fsdp2_tensor2"], *lora, "train.remat=full", resume_from=checkpoint(whole, 10))
    (handover,) = json.loads((moved / "handover.json").read_text())
    assert handover["other_bits"] == []
    before, after = (read_all(checkpoint(run_dir)) for run_dir in (whole, moved))
    assert before.keys() == after.keys()
    torch.testing.assert_close(losses(read_rows(moved)), losses(read_rows(whole))[10:], rtol=1e-5, atol=0)
