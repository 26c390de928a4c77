"""The cases on a test double of a vendor's device, under the vendor's names: `tests.lab.fake_device`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.certify.fixture import WORDS, with_layout
from orchestrator.certify.kinds import KINDS
from orchestrator.config.compose import compose
from orchestrator.distributed.world import World
from orchestrator.hardware.target_table import resolve
from orchestrator.launch.certifier import RESULT, work
from orchestrator.strategies.dtensor import DTensorStrategy
from orchestrator.training.resolved import resolve_run
from tests.certify.conftest import LAYOUT
from tests.lab.fake_chips import CHIPS, on_chip
from tests.lab.ranks import run_ranks
from tests.lab.slow import slow


def in_rank(world: World, chip: str, folder: Path, wanted: list[str] | None, precise: bool) -> None:
    on_chip(chip, world.size)
    config = compose([*WORDS, *CHIPS[chip][0], "hardware.devices=2", "hardware.precision=fp32"]).config
    target = resolve(config.hardware)
    if not precise:
        leave_open(DTensorStrategy)
    resolved = resolve_run(with_layout(config, LAYOUT), target, 2, 256)
    work(resolved, world, target, [LAYOUT], folder, wanted=None if wanted is None else frozenset(wanted))


def leave_open(strategy: Any) -> None:
    """What this strategy does is right, but for what it tells the runtime of the precision: nothing."""
    join = strategy.join

    def joined(self: Any) -> None:
        join(self)
        torch.set_float32_matmul_precision("medium")

    strategy.join = joined


def run(site: Any, chip: str, wanted: list[str] | None = None, precise: bool = True) -> dict[str, dict[str, Any]]:
    run_ranks(2, in_rank, chip, site.folder, wanted, precise, clean=True)
    return {case["name"]: case for case in json.loads((site.folder / RESULT).read_text())["cases"]}


@slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_case_passes_under_the_vendors_name(site, chip):
    found = run(site, chip)
    assert set(found) >= set(KINDS) - {"host_cpu", "handover_out", "losses_bf16"}
    assert [case for case in found.values() if case["status"] != "passed"] == []
    site.after()
    (out,) = json.loads((site.folder / "after.json").read_text())
    assert (out["name"], out["status"]) == ("handover_out", "passed")


def test_a_runtime_that_rounds_products_unless_told_is_found(site):
    """As torch_tpu does by default: its fp32 products have the precision of bf16."""
    found = run(site, "tpu", ["matrix_products"], precise=False)
    assert found["matrix_products"]["status"] == "failed"
    assert "as bf16" in found["matrix_products"]["note"]
