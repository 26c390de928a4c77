"""Each optimizer gives the same run on every layout, and its state moves between layouts to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.consistency import contradictions
from orchestrator.config.convert import to_dict
from tests.lab.ranks import run_ranks
from tests.lab.runs import checkpoint, losses, read_rows, small_config, train
from tests.lab.slow import cases
from tests.lab.tensors import read_all
from tests.strategies.test_conformance import RELATIVE, _load_and_save

SHORT = ("train.eval_tokens=128", "train.sample.tokens=0")
OPTIMIZERS = {
    "muon": ["optim=muon"],
    "adafactor": ["optim=adafactor", "optim.lr=0.05"],
    "sgd": ["optim=sgd"],
    "own": ["optim._target_=torch.optim.NAdam"],
    "schedule_free": ["optim._target_=tests.optim.test_units.ScheduleFree", "optim.lr=0.3"],
}
LAYOUTS = {
    "fsdp2": (["layout.fsdp=2"], 2),
    "tensor2": (["layout.tensor=2"], 2),
    "fsdp2_tensor2": (["layout.fsdp=2", "layout.tensor=2"], 4),
    "fsdp3": (["layout.fsdp=3", "train.global_batch_tokens=384"], 3),
}
CASES = [(optimizer, layout) for optimizer in ("muon", "adafactor") for layout in ("fsdp2", "tensor2", "fsdp2_tensor2")]
CASES += [("sgd", "fsdp2_tensor2"), ("own", "fsdp2_tensor2"), ("schedule_free", "fsdp2_tensor2")]
FURTHER = ("own", "sgd", "schedule_free")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories by optimizer and layout, each trained once."""
    tmp: Path = tmp_path_factory.mktemp("optimizers")
    done: dict[tuple, Path] = {}

    def run(optimizer: str, layout: str | None = None) -> Path:
        words, size = LAYOUTS[layout] if layout else ([], 1)
        if (optimizer, layout) not in done:
            done[optimizer, layout] = tmp / f"{optimizer}-{layout}"
            config = small_config(tmp, *SHORT, *OPTIMIZERS[optimizer], *words)
            train(config, size, done[optimizer, layout])
        return done[optimizer, layout]

    run.tmp = tmp
    return run


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    cases(CASES, quick=[case for case in CASES if case[1] == "fsdp2_tensor2" and case[0] not in FURTHER]),
)
def test_every_layout_gives_the_losses_of_one_process(runs, optimizer, layout):
    ours, theirs = (losses(read_rows(runs(optimizer, where))) for where in (layout, None))
    assert len(ours) == 20
    np.testing.assert_allclose(ours, theirs, rtol=RELATIVE)
    assert ours[-1] < ours[0] - 0.1


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    cases(
        [*((name, "fsdp3") for name in OPTIMIZERS), ("muon", None), ("adafactor", None), ("schedule_free", None)],
        quick=[
            *((name, "fsdp3") for name in ("muon", "adafactor")),
            ("muon", None),
            ("adafactor", None),
        ],
    ),
)
def test_state_moves_to_another_layout_to_the_bit(runs, optimizer, layout):
    """Saved on fsdp 2 x tensor 2, loaded elsewhere and saved again without a step between."""
    source = checkpoint(runs(optimizer, "fsdp2_tensor2"), 10)
    words, size = LAYOUTS[layout] if layout else ([], 1)
    target = runs.tmp / f"moved-{optimizer}-{layout}"
    config = small_config(runs.tmp, *SHORT, *OPTIMIZERS[optimizer], *words, "resume_allow=[batch]")
    moved = run_ranks(size, _load_and_save, to_dict(config), source, target)
    before, after = read_all(source), read_all(Path(moved[0]["path"]))
    assert before.keys() == after.keys()
    assert any(key.startswith("optimizer.") and tensor.any() for key, tensor in before.items())
    for key in before:
        assert torch.equal(before[key], after[key]), key


@pytest.mark.parametrize("optimizer", cases(["muon", "adafactor", "own", "schedule_free"], quick=["muon"]))
def test_a_resumed_run_ends_to_the_bit_as_one_that_was_not_stopped(runs, tmp_path, optimizer):
    whole = runs(optimizer, "fsdp2_tensor2")
    words, size = LAYOUTS["fsdp2_tensor2"]
    config = small_config(runs.tmp, *SHORT, *OPTIMIZERS[optimizer], *words)
    rows = train(config, size, tmp_path / "resumed", checkpoint(whole, 10))
    assert losses(rows) == losses(read_rows(whole))[10:]
    before, after = (read_all(checkpoint(run_dir)) for run_dir in (whole, tmp_path / "resumed"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


STATES = {
    "muon": {
        "layers.0.attn.k.weight": {"momentum_buffer": (32, 64)},
        "embed.weight": {"exp_avg": (384, 64), "exp_avg_sq": (384, 64), "step": ()},
        "layers.1.mlp_norm.weight": {"exp_avg": (64,), "exp_avg_sq": (64,), "step": ()},
    },
    "adafactor": {
        "layers.0.mlp.down.weight": {"row_var": (64, 1), "col_var": (1, 96), "step": ()},
        "norm.weight": {"variance": (64,), "step": ()},
    },
    "sgd": {"norm.weight": {"momentum_buffer": (64,)}},
    "own": {"norm.weight": {"exp_avg": (64,), "exp_avg_sq": (64,), "step": (), "mu_product": ()}},
}


@pytest.mark.parametrize("optimizer", cases(STATES, quick=["muon", "adafactor"]))
def test_state_has_names_and_global_shapes(runs, optimizer):
    found = Checkpoint(checkpoint(runs(optimizer, "fsdp2_tensor2")))
    assert list(contradictions(found)) == []
    tensors = found.manifest.tensors
    for weight, states in STATES[optimizer].items():
        has = {
            name.removeprefix("optimizer.").removesuffix(f".{weight}"): tensor.shape
            for name, tensor in tensors.items()
            if name.startswith("optimizer.") and name.split(".", 2)[2] == weight
        }
        assert has == states


MOE = ("model.moe.experts=4", "model.moe.mlp_dim=32", "model.moe.shared_mlp_dim=32", "model.moe.expert_bias=true")
EXPERTS = {
    "expert2": (["layout.expert=2", "layout.fsdp=1"], 2),
    "fsdp2": (["layout.fsdp=2"], 2),
    "expert2_fsdp2": (["layout.expert=2", "layout.fsdp=2"], 4),
    "expert2_tensor2": (["layout.expert=2", "layout.tensor=2", "layout.fsdp=1"], 4),
}


@pytest.fixture(scope="module")
def mixtures(runs):
    """Run directories of models with experts, by optimizer and layout."""
    done: dict[tuple, Path] = {}

    def run(optimizer: str, layout: str | None = None) -> Path:
        words, size = EXPERTS[layout] if layout else ([], 1)
        if (optimizer, layout) not in done:
            done[optimizer, layout] = runs.tmp / f"experts-{optimizer}-{layout}"
            config = small_config(runs.tmp, *SHORT, *OPTIMIZERS[optimizer], *MOE, *words)
            train(config, size, done[optimizer, layout])
        return done[optimizer, layout]

    return run


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    cases(
        [*(("muon", layout) for layout in EXPERTS), ("adafactor", "expert2_fsdp2"), ("adafactor", "expert2_tensor2")],
        quick=[("muon", "expert2_fsdp2")],
    ),
)
def test_experts_train_alike_on_every_layout(mixtures, optimizer, layout):
    ours, theirs = (losses(read_rows(mixtures(optimizer, where))) for where in (layout, None))
    np.testing.assert_allclose(ours, theirs, rtol=RELATIVE)
    assert ours[-1] < ours[0] - 0.1
    found = Checkpoint(checkpoint(mixtures(optimizer, layout)))
    assert list(contradictions(found)) == []
    if optimizer == "muon":
        states = {name.split(".")[1] for name in found.manifest.tensors if name.endswith("experts.down")}
        assert states - {"layers"} == {"momentum_buffer"}
        assert found.manifest.tensors["optimizer.momentum_buffer.layers.1.mlp.experts.down"].shape == (4, 64, 32)
        assert "optimizer.exp_avg.layers.1.mlp.router.weight" in found.manifest.tensors
