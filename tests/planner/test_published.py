"""Published runs, read: single rows against what their pages say, and what is left out with its reason."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.evidence.published import held_out_families, read, shipped

DATA = Path(__file__).parent / "data"
RUNS, LEFT_OUT = shipped(DATA)
BY_KEY = {run.key: run for run in RUNS}


def test_each_run_is_either_read_or_left_out_with_a_reason():
    keys = set()
    for name in ("published_runs.csv", "layout_sweep_a100.csv"):
        with (DATA / name).open(newline="") as file:
            keys |= {row["id"].partition(":")[0] for row in csv.DictReader(file)}
    assert keys == set(BY_KEY) | {item.key for item in LEFT_OUT}
    assert len(keys) == len(RUNS) + len(LEFT_OUT)
    assert all(item.reason for item in LEFT_OUT)
    assert len(RUNS) > 1350


def test_every_run_is_whole():
    for run in RUNS:
        assert run.plan.devices == run.cluster.devices, run.key
        assert run.plan.micro_batches(run.job) > 0, run.key
        assert run.seconds or run.memory or run.out_of_memory is not None, run.key


def test_models_have_the_parameters_that_their_pages_state():
    stated = {}
    with (DATA / "published_runs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["params"] and row["id"].partition(":")[0] in BY_KEY:
                stated[row["id"].partition(":")[0]] = float(row["params"])
    off = {key: parameters(BY_KEY[key].job.model) / count - 1 for key, count in stated.items()}
    assert max(abs(value) for value in off.values()) < 0.07
    assert sorted(abs(value) for value in off.values())[len(off) // 2] < 0.002


def test_torchtitan():
    run = BY_KEY["tt-70b-256-2d-asynctp"]
    assert run.job.stack == "torchtitan+asynctp"
    assert (run.plan.fsdp, run.plan.tensor, run.plan.zero, run.plan.remat) == (32, 8, 3, "full")
    assert (run.plan.micro_batch, run.plan.micro_batches(run.job)) == (16, 1)
    assert run.job.precision == "fp8"
    assert run.seconds == pytest.approx(4194304 / 256 / 876)
    assert run.memory == 67.6 * 2**30
    assert BY_KEY["tt-8b-8-fsdp"].plan.compiled is False
    pipelined = BY_KEY["tt-405b-512-cp4"]
    assert (pipelined.plan.micro_batch, pipelined.plan.micro_batches(pipelined.job)) == (1, 8)


def test_composer():
    run = BY_KEY["mosaic-7b-h100-sxm-8-s32768-mb2-amp_bf16"]
    assert (run.plan.fsdp, run.plan.micro_batch, run.plan.micro_batches(run.job)) == (8, 2, 2)
    assert run.job.model.tied
    assert not run.job.model.gated
    assert not run.assumed
    sharded = BY_KEY["mosaic-1b-h100-sxm-512-s2048-mb12-amp_bf16"]
    assert sharded.plan.zero == 2, "SHARD_GRAD_OP"


def test_megatron_bridge():
    run = BY_KEY["mbridge-26.02.01-deepseek-v3-gb300-256-mxfp8-gbs4096"]
    assert run.job.stack == "megatron-2025"
    assert run.family == "megatron:deepseek-v3"
    assert (run.plan.fsdp, run.plan.zero, run.plan.pipeline, run.plan.virtual_stages) == (4, 1, 2, 8)
    assert (run.plan.expert, run.plan.micro_batch) == (32, 2)
    assert run.job.model.latent_kv == 512
    assert run.assumed == ("remat",)
    assert BY_KEY["mbridge-26.06-deepseek-v3-gb300-256-mxfp8-gbs4096"].job.stack == "megatron"


def test_operations_are_turned_into_seconds_by_the_pages_own_count():
    """MaxText of 2023 counts half the attention: 120 TFLOP/s on v5e is 61.1% of 197e12 in 6 N + 6 L d s."""
    run = BY_KEY["maxtext-16B-tpu-v5e-1x256"]
    per_token = 6 * 16441671680 - 6 * 32768 * 5120 + 6 * 32 * 32 * 256 * 2048
    assert run.seconds == pytest.approx(3145728 * per_token / 256 / 120e12, rel=1e-3)
    # Megatron's tables of 2021 count the recomputation too.
    old = BY_KEY["meg21-a100-145.6B"]
    layers = 80 * (24 * 12288**2 + 4 * 2048 * 12288)
    counted = 4 * layers + 6 * 51200 * 12288
    assert old.seconds == pytest.approx(4718592 * counted / 1536 / 148e12, rel=1e-3)


def test_slices_and_logical_devices():
    two = BY_KEY["maxtext-128B-tpu-v5p-2x128"]
    assert (two.cluster.chips, two.cluster.domain_chips, two.plan.replicate) == (256, 128, 2)
    assert BY_KEY["ironwood-deepseek-v3-128-s4096-bf16"].plan.devices == 256
    assert BY_KEY["neuron-l2-70b-2.18"].cluster.devices == 1024


def test_the_sweep():
    lost = BY_KEY["aa-13B-s2048-32-t132852"]
    assert lost.out_of_memory is True
    assert lost.seconds is None
    assert (lost.plan.micro_batch, lost.plan.sequence_parallel, lost.plan.compiled) == (8, True, True)
    kinds = {run.plan.attention for run in RUNS if run.key.startswith("aa-")}
    assert kinds == {"flash", "flash1", "fused", "eager"}


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("megascale-175b-megascale-256", "changed"),
        ("opt-175b-992", "layout"),
        ("tt2-8b-64-tp-fp8-rowwise", "fp8-rowwise"),
        ("amd-qwen3-235b-mi355x-32-1f1b", "sequence length"),
        ("nemo-long-l3-8b-b200-8k", "convention|layout"),
    ],
)
def test_what_a_page_does_not_state_is_a_reason(key, reason):
    found = {item.key: item.reason for item in LEFT_OUT}
    assert any(word in found[key] for word in reason.split("|"))


def test_runs_of_a_family_are_never_on_both_sides():
    held = held_out_families(RUNS)
    families = {run.family for run in RUNS}
    assert 0.35 < len(held) / len(families) < 0.6
    for vendor in ("nvidia", "amd", "google", "aws"):
        sides = {run.family in held for run in RUNS if run.vendor == vendor}
        assert sides == {True, False}, vendor


def test_a_damaged_row_is_left_out_and_said_why(tmp_path):
    with (DATA / "published_runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    row = dict(rows[0], notes=rows[0]["notes"] + ";INCONSISTENT")
    other = dict(rows[1], id="tt-other:peak_mem_gib", fsdp="4")
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows([row, other])
    runs, left_out = read(path)
    assert not runs
    assert [item.reason for item in left_out] == [
        "the page's figures contradict each other",
        "the stated degrees do not multiply to the number of devices",
    ]
