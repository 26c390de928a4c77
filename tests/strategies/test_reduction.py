"""The loss and the gradient norm of a step: summed once, the same bits on all ranks, however often they are logged."""

from __future__ import annotations

import math

import pytest
import torch

from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from tests.lab.ranks import run_ranks
from tests.lab.runs import resolved_run, small_config

STEPS = 10


def _reduce(world, data: dict) -> list[list[float]]:
    from orchestrator.training.job import make_strategy

    resolved = resolved_run(from_dict(RunConfig, data), world)
    parallel = make_strategy(resolved, resolved.target(), world)
    parallel.join()
    parts = [*torch.rand(STEPS, generator=torch.Generator().manual_seed(world.rank)), torch.tensor(math.inf)]
    losses = [parallel.reduce_and_clip(torch.nn.Module(), part, None)[0] for part in parts]
    once, together = [parallel.fetch([loss])[0] for loss in losses], parallel.fetch(losses)
    parallel.leave()
    return [once, together]


@pytest.mark.parametrize(
    ("size", "layout"), [(3, ["layout.fsdp=3"]), (4, ["layout.fsdp=4"]), (4, ["layout.fsdp=2", "layout.tensor=2"])]
)
def test_a_loss_has_the_same_bits_everywhere_and_counts_each_token_once(tmp_path, size, layout):
    config = small_config(tmp_path, *layout, "train.global_batch_tokens=768")
    results = run_ranks(size, _reduce, to_dict(config))
    assert all(result == results[0] for result in results)
    once, together = results[0]
    assert once == together, "however many are fetched at a time"
    assert once[-1] == math.inf, "and an infinity stays what it is"
    speakers = [0, 2] if "layout.tensor=2" in layout else range(size)
    parts = [torch.rand(STEPS, generator=torch.Generator().manual_seed(rank)) for rank in speakers]
    assert once[:-1] == pytest.approx(torch.stack(parts).double().sum(0).tolist(), rel=1e-6)
