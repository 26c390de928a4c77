"""Bytes per device: known cases, and what must grow or shrink with what."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.estimate.memory import device_capacity, estimate_memory, layer_bytes, step_memory
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.evidence.calibration import Calibration
from orchestrator.planner.spec import ModelShape, ParallelPlan
from tests.planner.shapes import DEEPSEEK_V3, LLAMA_8B, LLAMA_70B, cluster, job

PLAIN = Calibration("test", "nvidia", fragmentation=0.0, context_bytes=0.0)
MEGATRON = replace(PLAIN, weight_bytes=2.0, gradient_bytes=4.0, optimizer_bytes=12.0)
NODE = cluster("h100-sxm", 8)


def test_llama_8b_under_fsdp():
    """fp32 weights, gradients and two moments: 16 bytes of each of 8.03e9 parameters, over 8 devices."""
    found = step_memory(job(sequences=8), NODE, ParallelPlan(fsdp=8, remat="full"), PLAIN)
    eighth = parameters(LLAMA_8B) / 8
    assert found.parameters == pytest.approx(4 * eighth, rel=1e-5)
    assert found.gradients == pytest.approx(4 * eighth, rel=1e-5)
    assert found.optimizer == pytest.approx(8 * eighth, rel=1e-5)


@pytest.mark.parametrize(
    ("zero", "bytes_per_parameter"), [(1, 2 + 4 + 12 / 8), (2, 2 + 4 / 8 + 12 / 8), (3, 2 / 8 + 4 / 8 + 12 / 8)]
)
def test_levels_of_zero(zero, bytes_per_parameter):
    """Rajbhandari et al. 1910.02054, figure 1, with fp32 gradients."""
    found = step_memory(job(sequences=8), NODE, ParallelPlan(fsdp=8, zero=zero), MEGATRON)
    states = found.parameters + found.gradients + found.optimizer
    assert states == pytest.approx(bytes_per_parameter * parameters(LLAMA_8B), rel=1e-5)


def test_replicas_shard_nothing():
    found = step_memory(job(sequences=8), NODE, ParallelPlan(replicate=8), PLAIN)
    assert found.optimizer == pytest.approx(8 * parameters(LLAMA_8B), rel=1e-5)


def test_the_context_axis_shards_the_state():
    long = job(sequences=1)
    sharded = step_memory(long, NODE, ParallelPlan(context=8), PLAIN)
    assert sharded.parameters == pytest.approx(4 * parameters(LLAMA_8B) / 8, rel=1e-5)


def test_activations_of_a_gpt_layer_as_korthikanti_counts_them():
    """34 s b h per layer with dropout, 5 a s^2 b for scores; without dropout's masks and copies 26 s b h remain: two
    norms' inputs and results 8, queries, keys, values and attention's result 8, the feed-forward's 4 h wide input
    and output of GELU 16... of which the formula's elements are 4 d + 4 d + 8 d of two bytes."""
    gpt = ModelShape("gpt", 96, 12288, 4 * 12288, 96, 96, 128, 51200, gated=False)
    plan = ParallelPlan(attention="fused")
    tokens, seq_len = 2048, 2048
    found = layer_bytes(job(gpt, 1, seq_len), plan, tokens, False)
    assert found == tokens * (2 * (4 + 4 + 8) * 12288 + 5 * 96 * seq_len)
    flash = layer_bytes(job(gpt, 1, seq_len), replace(plan, attention="flash"), tokens, False)
    assert found - flash == 5 * 96 * seq_len * tokens


def test_sequence_parallelism_splits_what_the_tensor_axis_leaves_whole():
    plan = ParallelPlan(tensor=8, sequence_parallel=False)
    whole = layer_bytes(job(), plan, 8192, False)
    split = layer_bytes(job(), replace(plan, sequence_parallel=True), 8192, False)
    assert whole - split == pytest.approx(8192 * 2 * 4 * 4096 * 7 / 8)
    assert split == pytest.approx(layer_bytes(job(), ParallelPlan(), 8192, False) / 8)


def test_remat_keeps_less_and_less():
    kept = [
        step_memory(job(sequences=8), NODE, ParallelPlan(fsdp=8, remat=remat), PLAIN).activations
        for remat in ("none", "selective", "full", "offload")
    ]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


def test_the_first_stages_hold_the_most_micro_batches():
    """1F1B: p - i of them, so the activations of the first stage do not shrink with more stages."""
    held = [
        step_memory(job(LLAMA_70B, 64), cluster("h100-sxm", 8), ParallelPlan(pipeline=p, fsdp=8 // p), MEGATRON)
        for p in (2, 4, 8)
    ]
    per_layer = layer_bytes(job(LLAMA_70B), ParallelPlan(), 8192, False)
    for found, stages in zip(held, (2, 4, 8), strict=True):
        assert found.activations == pytest.approx(per_layer * 80 / stages * stages, rel=0.01)


def test_interleaving_holds_more_in_flight():
    plan = ParallelPlan(pipeline=8)
    plain = step_memory(job(LLAMA_70B, 64), NODE, plan, MEGATRON).activations
    inter = step_memory(job(LLAMA_70B, 64), NODE, replace(plan, virtual_stages=5), MEGATRON).activations
    assert 1.0 < inter / plain < 2.0
    assert inter / plain == pytest.approx((14 + 4 * 8 + 1) / 5 / 8, rel=0.02)


def test_logits_by_chunks():
    whole = step_memory(job(sequences=8), NODE, ParallelPlan(fsdp=8), PLAIN).logits
    assert whole == 10 * 8192 * 128256
    chunked = step_memory(job(sequences=8, loss_chunk_tokens=1024), NODE, ParallelPlan(fsdp=8), PLAIN).logits
    assert chunked == whole / 8 + 4 * 128256 * 4096, "the head's gradient is summed meanwhile"
    shared = step_memory(job(sequences=8), NODE, ParallelPlan(tensor=8), PLAIN).logits
    assert shared == whole / 8


def test_experts_are_split_over_their_axis():
    """256 experts over 64 of 256 devices: four on each, their moments over the 4 groups that have the same."""
    plan = ParallelPlan(fsdp=4, expert=64, zero=1, remat="full")
    found = step_memory(job(DEEPSEEK_V3, 256, 4096), cluster("h100-sxm", 256), plan, MEGATRON)
    experts = 58 * 256 * 3 * 7168 * 2048
    others = parameters(DEEPSEEK_V3) - experts
    assert found.parameters == pytest.approx(2 * (others + experts / 64), rel=1e-3)
    assert found.optimizer == pytest.approx(12 * (others / 256 + experts / 256), rel=1e-3)


def test_fp32_activations_are_twice_as_large():
    bf16 = step_memory(job(sequences=8), NODE, ParallelPlan(fsdp=8), PLAIN).activations
    assert step_memory(job(sequences=8, precision="fp32"), NODE, ParallelPlan(fsdp=8), PLAIN).activations == 2 * bf16


def test_gradients_that_come_as_activations_go():
    loose = replace(PLAIN, gradients_stay=False)
    found = step_memory(job(sequences=8), NODE, ParallelPlan(fsdp=8), loose)
    assert found.gradients == 0, "one micro-batch: the activations were larger"
    summed = step_memory(job(sequences=16), NODE, ParallelPlan(fsdp=8), loose)
    assert summed.gradients == pytest.approx(4 * parameters(LLAMA_8B) / 8, rel=1e-5)


def test_capacity():
    assert device_capacity(cluster("tpu-v7x", 4)) == 192 * 2**30 / 2
    assert device_capacity(cluster("trn2", 16)) == 96 * 2**30 / 4
    assert estimate_memory(job(LLAMA_70B, 8), NODE, ParallelPlan(fsdp=8)).fits is False
    assert estimate_memory(job(sequences=8), NODE, ParallelPlan(fsdp=8, remat="full")).fits is True


def test_unknown_memory_gives_no_verdict():
    cpu = cluster("cpu-generic", 1)
    assert device_capacity(cpu) is None
    assert estimate_memory(job(sequences=1), cpu, ParallelPlan()).fits is None


@given(
    shards=st.sampled_from([1, 2, 4, 8]), micro=st.integers(1, 4), remat=st.sampled_from(["none", "selective", "full"])
)
def test_more_shards_never_need_more_and_more_tokens_never_less(shards, micro, remat):
    base = ParallelPlan(fsdp=shards, micro_batch=micro, remat=remat)
    now = step_memory(job(sequences=64), NODE, base, MEGATRON)
    states = now.parameters + now.gradients + now.optimizer
    more = step_memory(job(sequences=64), NODE, replace(base, fsdp=2 * shards), MEGATRON)
    assert more.parameters + more.gradients + more.optimizer < states
    larger = step_memory(job(sequences=64), NODE, replace(base, micro_batch=2 * micro), MEGATRON)
    assert larger.activations > now.activations
