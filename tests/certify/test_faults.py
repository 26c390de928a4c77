"""A target with one deliberate fault fails the case that names it; one without passes every case."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from orchestrator.certify.kinds import KINDS
from orchestrator.strategies.dtensor import DTensorStrategy


def products_in_bf16(world):
    """What is called fp32 is multiplied as bf16."""
    DTensorStrategy.forward_context = lambda self: torch.autocast("cpu", torch.bfloat16)


def sum_without_rank_1(world):
    """An all-reduce of the device that leaves out what one rank brings."""
    whole = dist.all_reduce

    def lossy(tensor, *args, **kwargs):
        if world.rank == 1 and tensor.is_floating_point():
            tensor.zero_()
        return whole(tensor, *args, **kwargs)

    dist.all_reduce = lossy


def gradients_without_rank_1(world):
    """A reduce-scatter that leaves out what one rank brings: sums of scalars are right."""
    # By another name in older versions of torch.
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    whole = getattr(dist, name)

    def lossy(*args, **kwargs):
        if world.rank == 1:
            given = kwargs.get("input", kwargs.get("input_tensor", args[1] if len(args) > 1 else None))
            given.zero_()
        return whole(*args, **kwargs)

    setattr(dist, name, lossy)


def stale_weight(world):
    """One weight that a load does not reach: the strategy hands out a copy, and never takes it back."""
    views = DTensorStrategy.state_shards

    def shards(self, model, optimizer):
        found = views(self, model, optimizer)
        return [replace(one, data=one.data.clone()) if one.name.startswith("model.layers.1.") else one for one in found]

    DTensorStrategy.state_shards = shards


def unsteady_sums(world):
    """Reductions whose last bits depend on chance, as where the order of a sum is left to whoever comes first."""
    chance = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
    whole = DTensorStrategy.reduce_and_clip

    def noisy(self, model, loss_part, max_norm):
        loss, norm = whole(self, model, loss_part, max_norm)
        # Of more than one bit, so that no two trainings draw the same; of the loss too: Adam divides most of it away.
        noise = 1 + 1e-6 * torch.rand((), generator=chance)
        for parameter in model.parameters():
            if parameter.grad is not None:
                getattr(parameter.grad, "_local_tensor", parameter.grad).mul_(noise)
        return loss * noise, norm

    DTensorStrategy.reduce_and_clip = noisy


NOTES = {
    "matrix_products": "as bf16",
    "collectives": "of 2",
    "load": "model.layers.1.",
    "determinism": "of value",
}
FAULTS = {
    products_in_bf16: ["matrix_products"],
    sum_without_rank_1: ["collectives"],
    gradients_without_rank_1: ["collectives"],
    stale_weight: ["load"],
    unsteady_sums: ["determinism"],
}


def test_devices_without_a_fault_pass_every_case(site):
    result = site.run()
    assert {case["name"] for case in result["cases"]} >= set(KINDS) - {"host_cpu", "handover_out", "losses_bf16"}
    assert [case for case in result["cases"] if case["status"] != "passed"] == []
    assert len(result["losses"]["fsdp=2"]) == len(result["norms"]["fsdp=2"]) == 20
    site.after()
    (out,) = json.loads((site.folder / "after.json").read_text())
    assert (out["name"], out["status"]) == ("handover_out", "passed")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_the_case_that_names_it(site, fault):
    (name,) = FAULTS[fault]
    cases = {case["name"]: case for case in site.run([name], fault)["cases"]}
    assert cases[name]["status"] == "failed", cases
    # It is that fault which is found, and nothing on the way to it that has failed of itself.
    assert cases["initial_weights"]["status"] == "passed" if "initial_weights" in cases else name == "matrix_products"
    assert cases[name]["measured"] is not None
    assert NOTES[name] in cases[name]["note"]
