"""Seconds per step: formulas of known cases, what must grow with what, and what is not known."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.chips.chip import Figure
from orchestrator.errors import ConfigError
from orchestrator.planner.estimate.memory import estimate_memory
from orchestrator.planner.estimate.time import device_rates, estimate_time, step_time
from orchestrator.planner.estimate.work import model_flops_per_token
from orchestrator.planner.evidence.calibration import Calibration
from orchestrator.planner.spec import Cluster, ModelShape, ParallelPlan, TimeEstimate
from tests.planner.shapes import DEEPSEEK_V3, LLAMA_8B, LLAMA_70B, MIXTRAL, cluster, job

NODE = cluster("h100-sxm", 8)
# Rates as published, no fixed costs, nothing hidden: what is left is arithmetic.
IDEAL = Calibration(
    "test", "nvidia", gemm=1.0, gemm_traffic=0.0, elementwise=0.0, optimizer=0.0, layer_seconds=0.0, step_seconds=0.0,
    intra_link=1.0, inter_link=1.0, intra_hop=0.0, inter_hop=0.0, straggler=0.0, expert_seconds=0.0, expert_gemm=1.0,
    pipeline_hidden=1.0, tensor_hidden=0.0, context_hidden=0.0, expert_hidden=0.0, replicate_hidden=0.0,
)  # fmt: skip


def test_compute_is_the_models_operations_at_the_measured_rate():
    """Llama 8B, 64 sequences of 8192 on 8 H100: products at 794.5 TFLOP/s, attention at a share of 989."""
    work, plan = job(sequences=64), ParallelPlan(fsdp=8)
    found = step_time(work, NODE, plan, replace(IDEAL, attention=0.5))
    tokens = 64 * 8192 / 8
    products = model_flops_per_token(LLAMA_8B, 8192) - 12 * 32 * 4096 * 4096
    # Flash attention computes the scores again in its backward pass: 3.5 forwards instead of 3.
    attention = 12 * 32 * 4096 * 4096 * 3.5 / 3
    assert found.compute == pytest.approx(tokens * (products / 794.5e12 + attention / (0.5 * 989e12)))


def test_full_remat_runs_the_layers_forward_again():
    none = step_time(job(), NODE, ParallelPlan(fsdp=8), IDEAL).compute
    full = step_time(job(), NODE, ParallelPlan(fsdp=8, remat="full"), IDEAL).compute
    layers = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    again = 64 * 8192 / 8 * (2 * layers / 794.5e12 + 4 * 32 * 4096 * 4096 / (0.4 * 989e12))
    assert full - none == pytest.approx(again)


@pytest.mark.parametrize("virtual", [1, 5])
def test_the_bubble(virtual):
    """(p-1)/(v m) of the time that the stages compute, where all stages are alike (2104.04473)."""
    even = replace(LLAMA_70B, vocab=0)
    work, plan = job(even, 32, 4096), ParallelPlan(pipeline=8, virtual_stages=virtual)
    found = step_time(work, NODE, plan, IDEAL)
    assert found.bubble == pytest.approx(found.compute * 7 / (virtual * 32))
    assert found.bubble / found.step == pytest.approx(7 / (virtual * 32 + 7))


def test_the_head_makes_the_last_stage_the_slowest():
    small = step_time(job(LLAMA_70B, 32), NODE, ParallelPlan(pipeline=8), IDEAL).compute
    large = step_time(job(replace(LLAMA_70B, vocab=512_000), 32), NODE, ParallelPlan(pipeline=8), IDEAL).compute
    assert large - small == pytest.approx(32 * 6 * 8192 * 8192 * (512_000 - 128_256) / 794.5e12)


def test_tensor_parallel_traffic():
    """Eight passes of (t-1)/t of a micro-batch's activations per layer and four for the ends (2205.05198)."""
    found = step_time(job(sequences=8), NODE, ParallelPlan(tensor=8), IDEAL)
    gather = 8192 * 4096 * 2 * 7 / 8 / 450e9
    assert found.tensor == pytest.approx(8 * (32 * 8 + 4) * gather)
    half = step_time(job(sequences=8), NODE, ParallelPlan(tensor=8), replace(IDEAL, tensor_hidden=0.5))
    assert half.tensor == pytest.approx(found.tensor / 2)


def test_zero_3_gathers_for_every_micro_batch_and_zero_1_once():
    bare = replace(IDEAL, fsdp_hidden=0.0)
    elements = 8_030_261_248 - 4096
    once = elements * 7 / 8 / 450e9
    work = job(sequences=64)
    three = step_time(work, NODE, ParallelPlan(fsdp=8, zero=3), bare).fsdp
    one = step_time(work, NODE, ParallelPlan(fsdp=8, zero=1), bare).fsdp
    assert three == pytest.approx(8 * once * (2 + 2 + 4), rel=1e-4)
    assert one == pytest.approx(once * (2 + 4), rel=1e-4)


def test_gradients_are_scattered_for_every_micro_batch_or_for_the_last():
    """Eight micro-batches of Llama 8B, nothing hidden: two gathers in bf16 for each, and scatters in fp32."""
    work = job(sequences=64)
    constants = replace(IDEAL, fsdp_hidden=0.0)
    each, last, once = (
        step_time(work, NODE, plan, constants).fsdp
        for plan in (
            ParallelPlan(fsdp=8),
            ParallelPlan(fsdp=8, reduce_gradients="last"),
            ParallelPlan(fsdp=8, micro_batch=8, reduce_gradients="last"),
        )
    )
    # In units of gathering the weights in bf16: a scatter in fp32 is two.
    assert each / last == pytest.approx(8 * (2 + 2) / (8 * 2 + 2))
    assert once == pytest.approx(each / 8)
    hidden = replace(IDEAL, fsdp_hidden=1.0)
    plan = ParallelPlan(fsdp=8)
    late = step_time(work, NODE, replace(plan, reduce_gradients="last"), hidden).fsdp
    assert late <= step_time(work, NODE, plan, hidden).fsdp


def test_computation_hides_the_gathers_but_not_the_first():
    found = step_time(job(sequences=64), NODE, ParallelPlan(fsdp=8), replace(IDEAL, fsdp_hidden=1.0)).fsdp
    bare = step_time(job(sequences=64), NODE, ParallelPlan(fsdp=8), replace(IDEAL, fsdp_hidden=0.0)).fsdp
    assert found == pytest.approx(bare / (8 * 33))


def test_experts_that_are_far_cost_more():
    near = step_time(job(MIXTRAL, 64, 4096), cluster("h100-sxm", 8), ParallelPlan(expert=8), IDEAL).expert
    far = step_time(job(MIXTRAL, 64, 4096), cluster("mi250x", 4), ParallelPlan(expert=8), IDEAL).expert
    assert 0 < near < far
    assert step_time(job(MIXTRAL, 64, 4096), NODE, ParallelPlan(fsdp=8), IDEAL).expert == 0


def test_a_host_that_launches_slowly_sets_the_pace_of_sparse_layers_only():
    slow = replace(IDEAL, expert_seconds=1.0)
    work, plan = job(DEEPSEEK_V3, 64, 4096), ParallelPlan(expert=64, zero=1)
    found = step_time(work, cluster("h100-sxm", 64), plan, slow)
    assert found.compute + found.memory_bound + found.expert == pytest.approx(58.0, rel=0.02)
    dense = step_time(job(), NODE, ParallelPlan(fsdp=8), slow)
    assert dense.step == step_time(job(), NODE, ParallelPlan(fsdp=8), IDEAL).step


def test_parts_add_up_and_the_largest_is_named():
    found = estimate_time(job(), NODE, ParallelPlan(fsdp=8))
    parts = [value for value in vars(found).values() if isinstance(value, float)]
    assert found.step == pytest.approx(sum(parts))
    assert found.bound_by == "compute"
    assert all(part >= 0 for part in parts)


def test_a_chip_without_a_measured_rate_takes_a_share_of_its_peak():
    rates = device_rates(cluster("tpu-v5p", 4), "bf16", replace(IDEAL, achievable=0.7))
    assert rates.products == pytest.approx(0.7 * 459e12)
    # An fp8 rate that nobody measured is as far below its peak as bf16's.
    amd = device_rates(cluster("mi325x", 8), "fp8", replace(IDEAL, gemm_fp8=1.0))
    assert amd.products == pytest.approx(784.9e12 / 1307e12 * 2610e12)


def test_a_constant_in_place_of_a_measured_rate_is_marked():
    assert estimate_time(job(), cluster("h100-sxm", 8), ParallelPlan(fsdp=8)).estimated == ()
    assert estimate_time(job(), cluster("tpu-v5p", 8), ParallelPlan(fsdp=8)).estimated == ("achievable_bf16_flops",)
    amd = estimate_time(job(precision="fp8"), cluster("mi325x", 8), ParallelPlan(fsdp=8))
    assert amd.estimated == ("achievable_fp8_flops",)


def test_what_is_unknown_is_named():
    pods = Cluster(replace(cluster("tpu-v7x", 1).chip, inter_bandwidths=()), 2 * 9216)
    plan = ParallelPlan(replicate=2, fsdp=2 * 9216)
    found = estimate_time(job(sequences=4 * 9216), pods, plan)
    assert found.unknown == ("inter_bandwidth",)
    assert found.replicate < 1e-4, "no more than latency: the step is a lower bound"
    given = estimate_time(job(sequences=4 * 9216), replace(pods, inter_bandwidth=25e9), plan)
    assert given.unknown == ()
    assert given.replicate > 0
    assert "fp8_flops" in estimate_time(job(precision="fp8"), cluster("a100-80", 8), ParallelPlan(fsdp=8)).unknown


def test_a_chip_of_which_nothing_is_known_gives_a_lower_bound_that_says_so():
    chip = replace(NODE.chip, bf16_flops=Figure(None, "FLOP/s"), hbm_bandwidth=Figure(None, "byte/s"))
    chip = replace(chip, achievable_bf16_flops=Figure(None, "FLOP/s"), achievable_fp8_flops=Figure(None, "FLOP/s"))
    for precision in ("bf16", "fp8"):
        found = estimate_time(job(precision=precision), Cluster(chip, 8), ParallelPlan(fsdp=8))
        assert {"bf16_flops", "hbm_bandwidth"} <= set(found.unknown)
        assert math.isfinite(found.step)
        assert found.step > 0


def test_fp32_runs_at_fp32s_rate():
    chip = replace(NODE.chip, fp32_flops=Figure(67e12, "FLOP/s", "test"))
    found = estimate_time(job(precision="fp32"), Cluster(chip, 8), ParallelPlan(fsdp=8))
    assert found.unknown == ()
    assert found.compute > 5 * estimate_time(job(), NODE, ParallelPlan(fsdp=8)).compute


def test_a_plan_that_does_not_fit_the_job_or_the_cluster_is_refused():
    with pytest.raises(ConfigError, match="degrees do not multiply"):
        estimate_time(job(), NODE, ParallelPlan(fsdp=4))
    with pytest.raises(ConfigError, match="batch does not divide"):
        estimate_time(job(sequences=12), NODE, ParallelPlan(fsdp=8))


PLANS = st.builds(
    lambda t, p, f, micro, remat: ParallelPlan(
        tensor=t, pipeline=p, fsdp=f, replicate=64 // (t * p * f), micro_batch=micro, remat=remat
    ),
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]),
    st.sampled_from(["none", "full"]),
)  # fmt: skip


@given(plan=PLANS, chip=st.sampled_from(["h100-sxm", "mi300x", "tpu-v5p"]))
def test_more_work_takes_longer_and_faster_links_never_do(plan: ParallelPlan, chip: str):
    machine = Cluster(cluster(chip, 64).chip, 64, 10e9)
    now = estimate_time(job(LLAMA_70B, 256), machine, plan)
    assert 0 < now.step < float("inf")
    assert estimate_time(job(LLAMA_70B, 512), machine, plan).step > now.step
    assert estimate_time(job(replace(LLAMA_70B, layers=160), 256), machine, plan).step > now.step
    assert estimate_time(job(LLAMA_70B, 256), replace(machine, inter_bandwidth=20e9), plan).step <= now.step
    assert estimate_time(job(LLAMA_70B, 256), machine, replace(plan, compiled=False)).step > now.step


def test_an_estimate_takes_less_than_a_third_of_a_millisecond():
    machine, work = cluster("h100-sxm", 512), job(DEEPSEEK_V3, 4096, 4096)
    plan = ParallelPlan(fsdp=4, tensor=2, pipeline=8, expert=8, remat="full", zero=1)

    def best(estimate) -> float:
        spent = []
        for _ in range(5):
            begin = time.process_time()
            for _ in range(50):
                estimate(work, machine, plan)
            spent.append((time.process_time() - begin) / 50)
        return min(spent)

    assert best(estimate_time) < 0.3e-3
    assert best(estimate_memory) < 0.3e-3


def test_nothing_heavy_is_imported():
    names = ("estimate.time", "estimate.memory", "evidence.accuracy")
    code = "".join(f"import orchestrator.planner.{name}\n" for name in names) + "import sys\n"
    code += "print([name for name in ('torch', 'numpy', 'scipy', 'lightning') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_time_estimate_without_numbers_is_not_made():
    shape = ModelShape("tiny", 2, 64, 128, 4, 4, 16, 256)
    found = estimate_time(job(shape, 8, 128), NODE, ParallelPlan(fsdp=8))
    assert isinstance(found, TimeEstimate)
    assert found.step > 0


def test_schedules_wait_less_and_kinds_of_context_attention_cost_differently():
    work = job(LLAMA_8B, 32)
    waits = [
        step_time(work, NODE, ParallelPlan(pipeline=8, schedule=schedule, virtual_stages=virtual), IDEAL).bubble
        for schedule, virtual in (("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("dualpipe_v", 2))
    ]
    assert waits[1] == pytest.approx(waits[0] / 2)
    assert waits[2] == waits[3] == pytest.approx(waits[0] / 3)
    gather, ring, ulysses = (
        step_time(job(LLAMA_8B, 1, 65536), NODE, ParallelPlan(context=8, context_kind=kind), IDEAL)
        for kind in ("gather", "ring", "ulysses")
    )
    assert ring.context == 0, "attention hides what travels meanwhile"
    assert gather.context > 0
    assert ulysses.context > 0
    ours = [
        step_time(
            job(LLAMA_8B, 1, 65536),
            NODE,
            ParallelPlan(context=8, context_kind=kind),
            replace(IDEAL, stack="orchestrator"),
        ).compute
        for kind in ("gather", "ring")
    ]
    assert ours[0] > ours[1], "gathered keys are masked, and all their scores are computed"
