"""Mixtures of experts on every layout: the losses, norms, loads and weights of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.config.convert import to_dict
from orchestrator.sharding.axes import MESH_AXES
from tests.lab.ranks import run_ranks
from tests.lab.runs import assert_trained_alike, checkpoint, losses, read_rows, small_config, train
from tests.lab.slow import cases
from tests.lab.tensors import read_all
from tests.strategies.test_conformance import _initial

RELATIVE = 1e-5
MOE = [
    *("model.layers=2", "model.moe.experts=4", "model.moe.top_k=2", "model.moe.mlp_dim=64", "model.moe.dense_layers=1"),
    *("model.moe.shared_mlp_dim=32", "model.moe.balance_loss=0.01", "model.moe.z_loss=0.001"),
    "model.moe.balance_bias=true",
]
FEATURES = {
    "capacity": ["model.moe.capacity_factor=1.0"],
    "accumulation": ["train.micro_batch_size=1"],
    "remat": ["train.remat=full"],
    "groups": ["model.moe.score=sigmoid", "model.moe.groups=2", "model.moe.top_groups=1", "model.moe.shared_gate=true"],
    "biases": ["model.moe.router_bias=true", "model.moe.expert_bias=true", "model.moe.score=softmax_chosen"],
}
CASES = {
    "expert2": ["layout.expert=2"],
    "expert4": ["layout.expert=4"],
    "fsdp4": ["layout.fsdp=4"],
    "expert2_fsdp2": ["layout.expert=2", "layout.fsdp=2"],
    "expert2_tensor2": ["layout.expert=2", "layout.tensor=2"],
    "expert2_context2": ["layout.expert=2", "layout.context=2"],
    "expert2_ring2": ["layout.expert=2", "layout.context=2", "layout.context_kind=ring"],
    "expert2_ulysses2": ["layout.expert=2", "layout.context=2", "layout.context_kind=ulysses"],
    "pipeline2_expert2": ["layout.pipeline=2", "layout.expert=2", "train.micro_batch_size=1"],
    "replicate2_expert2": ["layout.replicate=2", "layout.expert=2"],
    "replicate2_expert2_fsdp2": ["layout.replicate=2", "layout.expert=2", "layout.fsdp=2"],
    "expert2_fsdp2_tensor2": ["layout.expert=2", "layout.fsdp=2", "layout.tensor=2"],
}
QUICK = ["expert4", "expert2_fsdp2", "expert2_tensor2", "pipeline2_expert2"]


def _words(case: list[str]) -> list[str]:
    return [*case, *(() if any("fsdp" in word for word in case) else ("layout.fsdp=1",))]


def _size(case: list[str]) -> int:
    return int(np.prod([int(word.split("=")[1]) for word in case if word.split("=")[0].split(".")[1] in MESH_AXES]))


def _run(runs, case: list[str], *words: str):
    return runs(*MOE, *words, *_words(case), size=_size(case))


@pytest.mark.parametrize("name", cases(CASES, quick=QUICK))
def test_same_losses_norms_loads_and_evaluation(runs, name):
    ours, theirs = read_rows(_run(runs, CASES[name])), read_rows(_run(runs, []))
    assert_trained_alike(ours, theirs, RELATIVE)
    for figure in ("router_loss", "expert_load_max", "router_entropy", "dropped"):
        values = [[row[figure] for row in rows if "loss" in row] for rows in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-4, err_msg=figure)


OF_NO_RESULT = ("accumulation", "remat")
WITH = [
    ("capacity", "expert2_context2"),
    ("capacity", "expert2_ring2"),
    ("capacity", "expert2_tensor2"),
    ("accumulation", "expert2_fsdp2"),
]
WITH += [("accumulation", "replicate2_expert2_fsdp2"), ("remat", "expert2_tensor2"), ("groups", "expert2_tensor2")]
WITH += [("capacity", "expert2_ulysses2")]
WITH += [("biases", "expert2_tensor2"), ("biases", "expert2_fsdp2_tensor2")]


@pytest.mark.parametrize(("feature", "name"), cases(WITH, quick=[("capacity", "expert2_ring2")]))
def test_features_agree_too(runs, feature, name):
    ours = read_rows(_run(runs, CASES[name], *FEATURES[feature]))
    theirs = read_rows(_run(runs, [], *(() if feature in OF_NO_RESULT else FEATURES[feature])))
    assert_trained_alike(ours, theirs, RELATIVE)
    if feature == "capacity":
        dropped = [[row["dropped"] for row in rows if "loss" in row] for rows in (ours, theirs)]
        assert max(dropped[0]) > 0
        np.testing.assert_allclose(*dropped, rtol=1e-5)


@pytest.mark.parametrize("name", cases(CASES, quick=["expert2_fsdp2"]))
def test_a_killed_run_is_resumed_bitwise(runs, tmp_path, name):
    whole = _run(runs, CASES[name])
    config = small_config(runs.tmp, *MOE, *_words(CASES[name]))
    rows = train(config, _size(CASES[name]), tmp_path / "resumed", checkpoint(whole, 10))
    assert losses(rows) == losses(read_rows(whole))[10:]
    before, after = read_all(checkpoint(whole)), read_all(checkpoint(tmp_path / "resumed"))
    assert before.keys() == after.keys()
    assert "model.layers.1.mlp.router.balance_bias" in before
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "name",
    cases([name for name in CASES if not name.startswith("pipeline")], quick=["expert4", "expert2_fsdp2_tensor2"]),
)
def test_initial_weights_are_bitwise_those_of_one_process(runs, name):
    config = to_dict(small_config(runs.tmp, *MOE, *_words(CASES[name])))
    single = to_dict(small_config(runs.tmp, *MOE))
    whole = {name: array for name, _, _, _, array in run_ranks(1, _initial, single, [])[0]}
    held: dict[str, int] = dict.fromkeys(whole, 0)
    for shards in run_ranks(_size(CASES[name]), _initial, config, []):
        for tensor, _, slices, _, array in shards:
            np.testing.assert_array_equal(array, whole[tensor][slices])
            held[tensor] += array.size
    assert all(held[tensor] >= array.size for tensor, array in whole.items())
