"""The product's own memory model against the traces and compiled programs that are kept as data, and its shape."""

from __future__ import annotations

import functools
import statistics
from dataclasses import replace

import pytest

from orchestrator.planner.estimate.memory import estimate_memory
from orchestrator.planner.estimate.own_memory import covers
from orchestrator.planner.estimate.rank_parts import parts_of
from orchestrator.planner.spec import ParallelPlan
from scripts.validate_planner_product import CHIPS, COMPILED, TRACES, Case, cases, read
from tests.planner.shapes import DEEPSEEK_V3, LLAMA_8B, MIXTRAL, cluster, job

RECORDED = read(TRACES)


@functools.cache
def total(text: str) -> float:
    """Return the bytes that are predicted for a case."""
    return Case(text).predict().total


def predicted(plan: ParallelPlan, **kwargs) -> float:
    return estimate_memory(job(stack="orchestrator", **kwargs), cluster("cpu-generic", plan.devices), plan).total


@pytest.mark.parametrize("text", list(RECORDED))
def test_within_six_percent_of_the_trace(text):
    assert total(text) == pytest.approx(max(RECORDED[text].values()), rel=0.06)


def test_every_case_has_a_trace_and_half_of_them_are_within_three_percent():
    errors = [abs(total(case.text) / max(RECORDED[case.text].values()) - 1) for case in cases()]
    assert len(errors) >= 20
    assert statistics.median(errors) < 0.03
    experts = [error for case, error in zip(cases(), errors, strict=True) if case.job.model.experts]
    assert len(experts) >= 6
    assert statistics.median(experts) < 0.03


def test_compiled_programs_stay_within_what_is_claimed():
    errors = {}
    for text, found in read(COMPILED).items():
        predicted = Case(text).predict(CHIPS[found["topology"].partition(":")[0]]).total
        errors[text] = abs(predicted / found["peak_bytes"] - 1)
    assert len(errors) >= 6
    assert statistics.median(errors.values()) < 0.1
    # GPT-2's program needs 45% more than is predicted, and why is not known.
    assert max(error for text, error in errors.items() if "gpt2" not in text) < 0.2
    assert max(errors.values()) < 0.35


def test_remat_keeps_less_and_shards_own_less():
    plan = ParallelPlan(fsdp=64)
    none, selective, full = (predicted(replace(plan, remat=remat)) for remat in ("none", "selective", "full"))
    assert none > selective > full
    assert predicted(replace(plan, fsdp=128), sequences=128) < none


def test_what_earlier_micro_batches_leave_is_a_shard_of_the_gradients_or_all_of_them():
    plan = ParallelPlan(fsdp=64, remat="full")
    one, two = (predicted(plan, sequences=64 * micro) for micro in (1, 2))
    assert 0 <= two - one <= 4 * 8.03e9 / 64 * 1.01
    late = replace(plan, reduce_gradients="last")
    assert predicted(late, sequences=64) == one
    assert predicted(late, sequences=128) - one == pytest.approx(4 * 8.03e9, rel=0.1)
    copies = [predicted(ParallelPlan(replicate=64, reduce_gradients=when), sequences=128) for when in ("each", "last")]
    assert copies[0] == copies[1], "copies have nothing to split"


def test_a_compiler_cuts_the_gradients_always():
    plan, work = ParallelPlan(fsdp=64, remat="full"), job(stack="orchestrator", sequences=128)
    each, last = (
        estimate_memory(work, cluster("tpu-v5p", 64), replace(plan, reduce_gradients=when)).total
        for when in ("each", "last")
    )
    assert each == last


def test_a_document_mask_is_kept_once():
    plan = ParallelPlan(fsdp=64, micro_batch=2)
    more = predicted(plan, sequences=128, document_mask=True) - predicted(plan, sequences=128)
    assert more == pytest.approx(2 * 2 * 8192**2)


def test_kernels_that_fuse_norms_keep_less():
    plan, work = ParallelPlan(fsdp=64), job(stack="orchestrator")
    cpu, gpu = (estimate_memory(work, cluster(chip, 64), plan).activations for chip in ("cpu-generic", "h100-sxm"))
    # Two norms a layer and the last one: two bytes an element instead of eight.
    assert cpu - gpu == pytest.approx(65 * 6 * 8192 * 4096, rel=0.01)


def test_what_the_strategy_cannot_do_is_left_to_the_general_model():
    assert covers(job(), ParallelPlan(fsdp=8))
    assert covers(job(), ParallelPlan(pipeline=2))
    assert covers(job(MIXTRAL), ParallelPlan(fsdp=8))
    assert not covers(job(DEEPSEEK_V3), ParallelPlan(fsdp=8))
    assert not covers(job(LLAMA_8B), ParallelPlan(fsdp=8, zero=1))
    assert not covers(job(LLAMA_8B), ParallelPlan(fsdp=8, remat="offload"))


def test_moments_in_fewer_bits_take_less():
    plan = ParallelPlan(fsdp=64)
    kinds = ("adamw", "adamw bf16", "adamw int8")
    whole, half, codes = (
        estimate_memory(job(stack="orchestrator", optimizer=kind), cluster("cpu-generic", 64), plan).optimizer
        for kind in kinds
    )
    assert half == whole / 2
    assert codes == whole * 2.125 / 8


@pytest.mark.parametrize(("schedule", "flying"), [("1f1b", [4, 3, 2, 1]), ("zero_bubble", [4, 4, 4, 4])])
def test_a_pipeline_holds_the_micro_batches_that_its_schedule_keeps(schedule, flying):
    plan = ParallelPlan(pipeline=4, schedule=schedule)
    parts = parts_of(job(LLAMA_8B, 16), plan)
    assert [part.in_flight for part in parts] == flying
    assert sum(sum(part.layers) for part in parts) == LLAMA_8B.layers
    assert [part.first for part in parts] == [True, False, False, False]
    assert [part.last for part in parts] == [False, False, False, True]
    short = parts_of(job(LLAMA_8B, 2), plan)
    assert max(part.in_flight for part in short) == 2, "there are no more than the step has"
