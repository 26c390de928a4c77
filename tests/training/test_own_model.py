"""A user's model (`examples/own_model`), which the package does not know: every layout, checkpoints, resume."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config.compose import compose
from tests.lab.runs import checkpoint, losses, read_rows, small_overrides, train
from tests.lab.slow import cases
from tests.lab.tensors import read_all

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model"
OWN = ("model=sigmoid", "model.dim=64", "model.layers=2", "model.heads=4", "model.mlp_dim=96")
RELATIVE = 1e-5


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))


def own_config(tmp: Path, *words: str):
    # The small sizes of the lab come first: the option of the group replaces them.
    return compose(small_overrides(tmp, *OWN, *words), str(EXAMPLE / "conf")).config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories of the example's model by overrides, each trained once."""
    tmp, done = tmp_path_factory.mktemp("own"), {}
    sys.path.insert(0, str(EXAMPLE))

    def run(*words: str, size: int = 1) -> Path:
        if words not in done:
            done[words] = tmp / f"r{len(done)}"
            train(own_config(tmp, *words), size, done[words])
        return done[words]

    run.tmp = tmp
    yield run
    sys.path.remove(str(EXAMPLE))


CASES = {
    "fsdp2_tensor2": (4, "layout.fsdp=2", "layout.tensor=2"),
    "context2_tensor2": (4, "layout.context=2", "layout.tensor=2", "train.remat=full"),
}


@pytest.mark.parametrize("name", cases(CASES, quick=["fsdp2_tensor2"]))
def test_losses_and_norms_are_those_of_one_process(runs, name):
    size, *words = CASES[name]
    ours, theirs = read_rows(runs(*words, size=size)), read_rows(runs())
    assert len(losses(theirs)) == 20
    assert losses(theirs)[-1] < losses(theirs)[0] - 0.5, "it learns"
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=RELATIVE)
    norms = [[row["grad_norm"] for row in rows if "loss" in row] for rows in (ours, theirs)]
    np.testing.assert_allclose(*norms, rtol=1e-4)


def test_a_resume_is_bitwise_and_a_move_to_one_process_agrees(runs, tmp_path):
    size, *words = CASES["fsdp2_tensor2"]
    whole = runs(*words, size=size)
    config = own_config(runs.tmp, *words)
    train(config, size, tmp_path / "resumed", checkpoint(whole, 10))
    assert losses(read_rows(tmp_path / "resumed")) == losses(read_rows(whole))[10:]
    before, after = read_all(checkpoint(whole)), read_all(checkpoint(tmp_path / "resumed"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    train(own_config(runs.tmp), 1, tmp_path / "moved", checkpoint(whole, 10))
    np.testing.assert_allclose(losses(read_rows(tmp_path / "moved")), losses(read_rows(whole))[10:], rtol=RELATIVE)
    for name in ("resumed", "moved"):
        (handover,) = json.loads((tmp_path / name / "handover.json").read_text())
        assert handover["verdict"] == "agrees"


def test_its_size_is_measured_and_what_it_computes_is_unknown(runs):
    facts = json.loads((runs() / "run.json").read_text())
    dim, mlp, layers, vocabulary = 64, 96, 2, 384
    assert facts["parameters"] == 2 * vocabulary * dim + layers * (5 * dim * dim + 3 * dim * mlp + 2 * dim) + dim
    assert facts["flops_per_token"] is None
    assert all(row["mfu"] is None for row in read_rows(runs()) if "loss" in row)
