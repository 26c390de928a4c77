"""What the torch-native strategy takes from its target, on a device that computes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from orchestrator.distributed.world import World
from orchestrator.hardware.cpu import CpuTarget
from orchestrator.sharding.layout import Layout
from orchestrator.strategies import dtensor
from orchestrator.training.job import make_trainer


class _NamedTarget(CpuTarget):
    device_type = "meta"
    collective_backend = "vendor"
    pin_memory = False

    def device(self, local_rank: int) -> torch.device:
        return torch.device("meta")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch):
    """Give a function that joins with a precision, and tells what torch was asked for."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: asked.update(device=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **rest: asked.update(backend=backend))
    monkeypatch.setattr(dtensor, "DeviceMesh", lambda kind, ranks, mesh_dim_names: asked.update(mesh=kind))

    def join(precision: str) -> tuple[dtensor.DTensorStrategy, dict[str, object]]:
        strategy = dtensor.DTensorStrategy(_NamedTarget(), World(), Layout(), precision)
        strategy.join()
        return strategy, asked

    before = torch.get_float32_matmul_precision()
    yield join
    torch.set_float32_matmul_precision(before)


def test_the_target_names_device_and_backend(joined):
    _, asked = joined("bf16")
    assert asked == {"device": torch.device("meta"), "backend": "cpu:gloo,meta:vendor", "mesh": "meta"}


@pytest.mark.parametrize(("precision", "products"), [("fp32", "highest"), ("bf16", "medium")])
def test_fp32_is_not_shortened(joined, precision, products):
    torch.set_float32_matmul_precision("medium")
    joined(precision)
    assert torch.get_float32_matmul_precision() == products


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_are_pinned_where_the_target_has_it(joined, monkeypatch, pinned):
    calls = []
    monkeypatch.setattr(_NamedTarget, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append(1) or tensor)
    strategy, _ = joined("bf16")
    batch = strategy.prepare_batch({"tokens": np.zeros((2, 8), dtype=np.int64)})
    assert batch["tokens"].device.type == "meta"
    assert len(calls) == pinned


@pytest.mark.parametrize("step", [{"SLURM_STEP_ID": "0"}, {}], ids=["srun -n 2", "sbatch --ntasks=2"])
def test_the_trainer_asks_no_engine(joined, monkeypatch, step):
    """Lightning knows Slurm, and refuses `--ntasks`."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **step}
    for key, value in slurm.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(dtensor.DTensorStrategy, "root_device", torch.device("cpu"))
    strategy, _ = joined("fp32")
    trainer = make_trainer(strategy, [], deterministic=False)
    assert (trainer.world_size, trainer.global_rank, trainer.num_nodes) == (1, 0, 1)
