"""Pipelines give the result of one process, on every schedule and beside every other axis."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config.convert import to_dict
from orchestrator.config.schema import LayoutConfig, ModelConfig
from orchestrator.distributed.world import World
from orchestrator.errors import LayoutError
from orchestrator.hardware.target_table import get_target
from orchestrator.models.decoder import Decoder
from orchestrator.models.protocol import ShardableModel
from orchestrator.sharding.axes import MESH_AXES
from orchestrator.sharding.layout import Layout, resolve_layout
from orchestrator.strategies.dtensor import DTensorStrategy
from orchestrator.strategies.pipeline_stages import keep_own_stages
from tests.lab.ranks import run_ranks
from tests.lab.runs import assert_trained_alike, checkpoint, losses, read_rows, small_config, train
from tests.lab.slow import cases, slow
from tests.lab.tensors import read_all
from tests.strategies.test_conformance import _initial as initial
from tests.strategies.test_conformance import _load_and_save as load_and_save

RELATIVE = 1e-5
MODEL = ("model.layers=4", "model.dim=32", "model.mlp_dim=48", "train.seq_len=32", "train.global_batch_tokens=256")
LAYOUTS = {
    "pipeline2": ["layout.pipeline=2"],
    "pipeline4": ["layout.pipeline=4"],
    "pipeline2_fsdp2": ["layout.pipeline=2", "layout.fsdp=2"],
    "pipeline2_tensor2": ["layout.pipeline=2", "layout.tensor=2"],
    "pipeline2_context2": ["layout.pipeline=2", "layout.context=2"],
    "replicate2_fsdp2_pipeline2": ["layout.replicate=2", "layout.fsdp=2", "layout.pipeline=2"],
}
SCHEDULES = ("interleaved", "zero_bubble", "dualpipe_v")
CASES = {
    **LAYOUTS,
    **{f"pipeline2_{name}": ["layout.pipeline=2", f"layout.schedule={name}"] for name in SCHEDULES},
}


def size_of(words: list[str]) -> int:
    axes = tuple(f"layout.{axis}=" for axis in MESH_AXES)
    return int(np.prod([int(word.partition("=")[2]) for word in words if word.startswith(axes)]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains a configuration once per module, however many tests look at it."""
    tmp: Path = tmp_path_factory.mktemp("runs")
    done: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str, size: int = 1) -> Path:
        if overrides not in done:
            done[overrides] = tmp / f"run{len(done)}"
            train(small_config(tmp, *MODEL, *overrides), size, done[overrides])
        return done[overrides]

    run.tmp = tmp
    return run


@pytest.mark.parametrize("name", cases(CASES, quick=["pipeline2"]))
def test_same_losses_norms_and_evaluation(runs, name):
    ours = read_rows(runs(*CASES[name], size=size_of(CASES[name])))
    assert_trained_alike(ours, read_rows(runs()), RELATIVE)


EXPERTS = [
    *("model.moe.experts=4", "model.moe.top_k=2", "model.moe.mlp_dim=32", "model.moe.dense_layers=1"),
    *("model.moe.balance_loss=0.01", "model.moe.balance_bias=true"),
]
TIED = ["model.tied_embeddings=true", "model.positions=learned"]
FEATURES = {
    "tied": ["layout.pipeline=2", "layout.fsdp=2", *TIED],
    "tied_dualpipe_v": ["layout.pipeline=2", "layout.schedule=dualpipe_v", *TIED],
    "tied_pipeline4_tensor2": ["layout.pipeline=4", "layout.tensor=2", *TIED],
    "remat": ["layout.pipeline=2", "train.remat=full"],
    "remat_zero_bubble": ["layout.pipeline=4", "layout.schedule=zero_bubble", "train.remat=full"],
    "interleaved_fsdp2": ["layout.pipeline=2", "layout.fsdp=2", "layout.schedule=interleaved"],
    "zero_bubble_two_stages": ["layout.pipeline=2", "layout.schedule=zero_bubble", "layout.virtual_stages=2"],
    "zero_bubble_fsdp2_tensor2": [
        *("layout.pipeline=2", "layout.fsdp=2", "layout.tensor=2"),
        *("layout.schedule=zero_bubble", "layout.virtual_stages=2"),
    ],
    "dualpipe_v_tensor2": ["layout.pipeline=2", "layout.tensor=2", "layout.schedule=dualpipe_v"],
    "dualpipe_v_fsdp2": ["layout.pipeline=2", "layout.fsdp=2", "layout.schedule=dualpipe_v"],
    "uneven": ["layout.pipeline=2", "layout.stage_layers=[3,1]", "train.micro_batch_size=3"],
    "experts": ["layout.pipeline=2", "layout.schedule=interleaved", *EXPERTS],
    "experts_zero_bubble": ["layout.pipeline=4", "layout.schedule=zero_bubble", *EXPERTS],
    "expert2": ["layout.pipeline=2", "layout.expert=2", *EXPERTS],
    "expert2_fsdp2_dualpipe_v": [
        *("layout.pipeline=2", "layout.expert=2", "layout.fsdp=2", "layout.schedule=dualpipe_v", *EXPERTS),
    ],
    "ring2": ["layout.pipeline=2", "layout.context=2", "layout.context_kind=ring"],
    "ulysses2_zero_bubble": [
        *("layout.pipeline=2", "layout.context=2", "layout.context_kind=ulysses"),
        *("layout.schedule=zero_bubble", "layout.virtual_stages=2"),
    ],
    "muon": ["layout.pipeline=2", "layout.fsdp=2", "optim=muon"],
}


def _plain(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith(("layout.", "train.micro", "train.remat"))]


@pytest.mark.parametrize("name", cases(FEATURES, quick=["tied_dualpipe_v"]))
def test_features_agree_too(runs, name):
    words = FEATURES[name]
    ours = read_rows(runs(*words, size=size_of(words)))
    assert_trained_alike(ours, read_rows(runs(*_plain(words))), RELATIVE)


@pytest.mark.parametrize("name", cases(["pipeline2", "pipeline2_fsdp2", "tied"], quick=["pipeline2"]))
def test_a_run_is_resumed_bitwise(runs, tmp_path, name):
    words = {**CASES, **FEATURES}[name]
    whole = runs(*words, size=size_of(words))
    rows = train(small_config(runs.tmp, *MODEL, *words), size_of(words), tmp_path, checkpoint(whole, 10))
    assert losses(rows) == losses(read_rows(whole))[10:]
    before, after = (read_all(checkpoint(run_dir)) for run_dir in (whole, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    (handover,) = json.loads((tmp_path / "handover.json").read_text())
    assert [handover[key]["difference"] for key in ("loss", "grad_norm", "logits")] == [0, 0, 0]


ELSEWHERE = {
    "one": [],
    "fsdp2_tensor2": ["layout.fsdp=2", "layout.tensor=2"],
    "pipeline2_dualpipe_v": ["layout.pipeline=2", "layout.schedule=dualpipe_v"],
    "pipeline4": ["layout.pipeline=4"],
}


@pytest.mark.parametrize(
    ("source", "target"),
    cases([(source, target) for source in ("pipeline2", "tied") for target in ELSEWHERE], quick=[("pipeline2", "one")]),
)
def test_a_checkpoint_moves_to_any_layout_and_back_bitwise(runs, source, target):
    words = {**CASES, **FEATURES}[source]
    saved = checkpoint(runs(*words, size=size_of(words)), 10)
    there = _moved(runs, [*ELSEWHERE[target], *_plain(words)], saved, f"{source}-{target}")
    back = _moved(runs, words, there, f"{source}-{target}-back")
    before = read_all(saved)
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in before)
    for copy in (read_all(there), read_all(back)):
        assert before.keys() == copy.keys()
        assert all(torch.equal(before[key], copy[key]) for key in before)


def _moved(runs, words, source: Path, name: str) -> Path:
    config = small_config(runs.tmp, *MODEL, *words, "train.max_steps=11", "checkpoint.every_steps=11")
    results = run_ranks(size_of(words), load_and_save, to_dict(config), source, runs.tmp / name)
    return Path(results[0]["path"])


@pytest.mark.parametrize("name", cases({**CASES, **FEATURES}, quick=["pipeline4", "tied"]))
def test_initial_weights_are_bitwise_those_of_one_process(runs, name):
    words = {**CASES, **FEATURES}[name]
    config, single = (to_dict(small_config(runs.tmp, *MODEL, *given)) for given in (words, _plain(words)))
    whole = {name: array for name, _, _, _, array in run_ranks(1, initial, single, [])[0]}
    seen = set()
    for shards in run_ranks(size_of(words), initial, config, []):
        assert {shard[0] for shard in shards} < set(whole), "a rank has a part of the model"
        seen |= {shard[0] for shard in shards}
        for tensor, _, slices, _, array in shards:
            np.testing.assert_array_equal(array, whole[tensor][slices])
    assert seen == set(whole)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "dualpipe_v"])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_hold_their_stages_under_the_names_of_the_whole(schedule, tied):
    layout = resolve_layout(LayoutConfig(pipeline=2, schedule=schedule), 2)
    whole, parts = _described(tied), []
    for rank in range(2):
        model = _described(tied)
        stages = keep_own_stages(model, layout, rank)
        names = {name for name, _ in model.named_parameters()}
        layers = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
        assert layers == {number for stage in stages for number in stage.layers}
        parts.append(names)
    assert set.union(*parts) == {name for name, _ in whole.named_parameters()}
    both = {"embed.weight"} if tied and schedule != "dualpipe_v" else set()
    assert set.intersection(*parts) == both


def _described(tied: bool) -> Decoder:
    with torch.device("meta"):
        return Decoder(
            ModelConfig(layers=4, dim=32, heads=2, kv_heads=2, mlp_dim=48, vocab_size=64, tied_embeddings=tied)
        )


def test_a_model_without_parts_is_refused():
    class Whole(Decoder):
        end = ShardableModel.end

    with torch.device("meta"):
        model = Whole(ModelConfig(layers=4, dim=32, heads=2, kv_heads=2, mlp_dim=48, vocab_size=64))
    with pytest.raises(LayoutError, match="Whole has no `end`"):
        keep_own_stages(model, Layout(pipeline=2), 0)


def test_a_trainer_of_ones_own_is_refused():
    strategy = DTensorStrategy(get_target("cpu"), World(), Layout(pipeline=2), "fp32")
    with pytest.raises(LayoutError, match="Trainer of one's own"):
        strategy.place(torch.nn.Linear(2, 2))


@slow
def test_bf16_stays_within_its_tolerance(runs):
    exact = losses(read_rows(runs()))
    words = ("hardware.precision=bf16", "layout.pipeline=2", "layout.fsdp=2")
    for schedule in ("1f1b", "zero_bubble"):
        ours = losses(read_rows(runs(*words, f"layout.schedule={schedule}", size=4)))
        np.testing.assert_allclose(ours, exact, rtol=1e-2)
        assert ours != exact
