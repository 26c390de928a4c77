"""The conformance suite under the vendors' names: the device types `neuron` and `tpu`, their process groups, compilers.

No chip is needed: `tests.lab.fake_device` registers each device type, backed by the CPU and gloo. docs/chips.md says
what that leaves open.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.lab.fake_chips import CHIPS, on_chip, train_on
from tests.lab.ranks import run_ranks
from tests.lab.runs import TINY, assert_trained_alike, checkpoint, losses, read_rows, small_config, train
from tests.lab.slow import cases
from tests.lab.tensors import read_all
from tests.strategies.test_conformance import CASES, RELATIVE, SIZES

LAYOUTS = ("fsdp2", "fsdp2_tensor2")
WORDS = (*TINY, "hardware.precision=fp32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains each case once: (chip, layout) → run directory and what the processes called."""
    tmp: Path = tmp_path_factory.mktemp("chips")
    done: dict[Any, tuple[Path, list[dict[str, int]]]] = {}

    def run(chip: str, layout: str) -> tuple[Path, list[dict[str, int]]]:
        if (chip, layout) not in done:
            folder = tmp / f"{chip}-{layout}"
            if chip == "cpu":
                train(small_config(tmp, *WORDS), 1, folder)
                done[chip, layout] = folder, []
            else:
                config = small_config(tmp, *CHIPS[chip][0], *WORDS, *CASES[layout])
                done[chip, layout] = folder, train_on(chip, config, SIZES[layout], folder)
        return done[chip, layout]

    run.tmp = tmp
    return run


@pytest.mark.parametrize(
    ("chip", "layout"),
    cases(list(itertools.product(CHIPS, LAYOUTS)), quick=[*zip(CHIPS, itertools.cycle(LAYOUTS), strict=False)]),
)
def test_same_losses_norms_and_evaluation(runs, chip, layout):
    (folder, calls), (plain, _) = runs(chip, layout), runs("cpu", "")
    ours, theirs = read_rows(folder), read_rows(plain)
    assert_trained_alike(ours, theirs, RELATIVE)
    for called in calls:
        # By the vendor's group, streams, events and counters, on the device.
        assert called["process_group"] >= 1
        assert called["c10d::_allgather_base_"] > 20
        assert called["c10d::_reduce_scatter_base_"] > 20
        assert called["Event.synchronize"] > 0
        assert called["Stream.synchronize"] > 0
        assert called["memory_allocated"] > 0
        assert called["aten::mm.out"] > 20 * 2


@pytest.mark.parametrize("chip", CHIPS)
def test_a_checkpoint_goes_on_bitwise_on_the_device_and_on_the_cpu(runs, chip):
    """Resumed on the device: the same bits to the end. Loaded on the CPU: every tensor's bits, and the same loss."""
    folder, _ = runs(chip, "fsdp2")
    middle = checkpoint(folder, 10)
    config = small_config(runs.tmp, *CHIPS[chip][0], *WORDS, *CASES["fsdp2"])
    resumed = runs.tmp / f"{chip}-resumed"
    train_on(chip, config, 2, resumed, middle)
    assert losses(read_rows(resumed)) == losses(read_rows(folder))[10:]
    before, after = (read_all(checkpoint(run_dir)) for run_dir in (folder, resumed))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    on_cpu = runs.tmp / f"{chip}-on-cpu"
    rows = train(small_config(runs.tmp, *WORDS), 1, on_cpu, middle)
    np.testing.assert_allclose(losses(rows), losses(read_rows(folder))[10:], rtol=RELATIVE)
    (handover,) = json.loads((on_cpu / "handover.json").read_text())
    assert (handover["verdict"], handover["changed"]) == ("agrees", ["backend", "layout"])
    assert handover["tensors"]["difference"] == 0, "a tensor has other bits"
    # How fp32 was multiplied: the made-up chip rounds the factors to bf16 unless it is told not to, as torch_tpu does.
    for side, runtime in (("from", {"neuron": "torchneuron", "tpu": "torch_tpu"}[chip]), ("to", "torch")):
        assert handover[side]["runtime"] == runtime
        assert handover[side]["numerics"] == {"float32_matmul_precision": "highest"}


def _round(world, chip):
    on_chip(chip, 1)
    device = CHIPS[chip][1]
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    results = {}
    for setting in ("medium", "highest"):
        torch.set_float32_matmul_precision(setting)
        results[setting] = (a.to(device) @ b.to(device)).cpu()
    torch.set_float32_matmul_precision("highest")
    return float((results["medium"] - a @ b).abs().max()), torch.equal(results["highest"], a @ b)


def _guard(world, chip):
    """One good and one bad update of AdamW, as the strategy wraps them."""
    from orchestrator.config.schema import AdamWConfig
    from orchestrator.hardware.target_table import get_target
    from orchestrator.sharding.layout import Layout
    from orchestrator.strategies.dtensor import DTensorStrategy
    from orchestrator.training.optimizer_setup import build_optimizer

    on_chip(chip, 1)
    name = {"neuron": "trainium", "tpu": "tpu"}[chip]
    target = get_target(name, {"neuron": "torchneuron", "tpu": "torch_tpu"}[chip])
    strategy = DTensorStrategy(target, world, Layout(), "fp32")
    strategy.join()
    model = torch.nn.Linear(4, 4).to(strategy.root_device)
    optimizer = build_optimizer(model, AdamWConfig(), strategy.root_device)
    seen = []
    for bad in (False, True, False):
        model(torch.ones(2, 4, device=strategy.root_device)).sum().backward()
        with strategy.update_unless(model, optimizer, torch.tensor(bad, device=strategy.root_device)):
            optimizer.step()
        assert model.weight.grad is not None
        optimizer.zero_grad()
        state = optimizer.state[model.weight]
        seen.append([value.detach().cpu().clone() for value in (model.weight, state["exp_avg"], state["step"])])
    strategy.seed_masks("a step")
    drawn = torch.rand(3, device=strategy.root_device).cpu()
    strategy.seed_masks("a step")
    assert torch.equal(drawn, torch.rand(3, device=strategy.root_device).cpu()), "the device's generator is seeded"
    strategy.leave()
    return [[torch.equal(a, b) for a, b in zip(seen[n], seen[n + 1], strict=True)] for n in range(2)]


@pytest.mark.parametrize("chip", CHIPS)
def test_the_made_up_chip_rounds_products_unless_told(chip):
    ((error, exact),) = run_ranks(1, _round, chip, clean=True)
    assert error > 1e-3
    assert exact


@pytest.mark.parametrize("chip", CHIPS)
def test_a_bad_step_leaves_weights_and_state_alone(chip):
    """Whether the vendor's fused kernel heeds `found_inf` (TPU) or refuses it (Trainium)."""
    ((skipped, taken),) = run_ranks(1, _guard, chip, clean=True)
    assert skipped == [True, True, True]
    assert taken == [False, False, False]


@pytest.mark.parametrize("chip", cases(CHIPS, quick=["tpu"]))
def test_a_rehearsal_computes_what_the_cpu_does(tmp_path, chip):
    """`hardware.simulate` runs the same strategy in processes of the CPU: the same losses, to the bit."""
    words = (*TINY, *CASES["fsdp2_tensor2"], "train.max_steps=6", "checkpoint.every_steps=6")
    instance = {"neuron": "trn2.48xlarge", "tpu": "v6e-16"}[chip]
    rehearsed = ["hardware.simulate=4", f"hardware.instance={instance}"]
    ours = train(small_config(tmp_path, *CHIPS[chip][0], *words, *rehearsed), 4, tmp_path / "rehearsed")
    theirs = train(small_config(tmp_path, *words), 4, tmp_path / "cpu")
    assert len(losses(ours)) == 6
    assert losses(ours) == losses(theirs)


@pytest.mark.parametrize("chip", CHIPS)
def test_blocks_are_compiled_by_the_devices_own_backend(tmp_path, chip):
    words = (*WORDS, "hardware.compile=true", "train.max_steps=2", "checkpoint.every_steps=2")
    (called,) = train_on(chip, small_config(tmp_path, *CHIPS[chip][0], *words), 1, tmp_path / "run")
    assert called[f"compile:{CHIPS[chip][1]}"] >= 1
    assert len(losses(read_rows(tmp_path / "run"))) == 2
