"""What is logged does not depend on how often it is fetched."""

from __future__ import annotations

import pytest
import torch

from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from tests.lab.ranks import run_ranks
from tests.lab.runs import small_config

STEPS = 30


def _sums(world, data: dict) -> dict[int, list[float]]:
    from orchestrator.hardware.registry import resolve
    from orchestrator.train.build import make_strategy

    config = from_dict(RunConfig, data)
    parallel = make_strategy(config, resolve(config.hardware), world)
    parallel.join()
    generator = torch.Generator().manual_seed(world.rank)
    parts = list(torch.rand(STEPS, generator=generator))
    found = {}
    for every in (1, 7, STEPS):
        found[every] = [
            loss for start in range(0, STEPS, every) for loss in parallel.fetch_sums(parts[start : start + every])
        ]
    parallel.leave()
    return found


@pytest.mark.parametrize(
    ("size", "layout"), [(3, ["layout.fsdp=3"]), (4, ["layout.fsdp=4"]), (4, ["layout.fsdp=2", "layout.tensor=2"])]
)
def test_a_loss_has_the_same_bits_however_many_are_fetched_together(tmp_path, size, layout):
    config = small_config(tmp_path, *layout, "train.global_batch_tokens=768")
    results = run_ranks(size, _sums, to_dict(config))
    assert all(result == results[0] for result in results), "and on every rank"
    assert results[0][1] == results[0][7] == results[0][STEPS]
    speakers = [0, 2] if "layout.tensor=2" in layout else range(size)
    parts = [torch.rand(STEPS, generator=torch.Generator().manual_seed(rank)) for rank in speakers]
    assert results[0][1] == pytest.approx(torch.stack(parts).double().sum(0).tolist(), rel=1e-12)
