"""Tracing a step on ranks that are not there: what is counted, and that recorded traces are those of today's step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.config.schema import AdafactorConfig, MuonConfig
from orchestrator.planner.estimate.optimizer_memory import optimizer_elements, optimizer_kind, update_bytes
from orchestrator.planner.estimate.work import parameters
from orchestrator.rehearsal.memory_trace import trace_deep, trace_step
from scripts.validate_planner_product import TRACES, Case, read
from tests.lab.slow import cases, slow

# One of each kind of layout, of remat and of micro-batches; scripts/validate_planner_product traces all.
LIVE = [
    "tiny seq=256 batch=16 fp32",
    "tiny fsdp=4,tensor=2 seq=256 batch=8 fp32 mask",
    "tiny_qwen3 fsdp=4,context=2 seq=256 batch=8 fp32",
    "gpt2 replicate=2,fsdp=4 seq=1024 batch=4 micro=2 reduce=last bf16 remat=full",
    "llama3_70b fsdp=64,tensor=8 seq=8192 batch=4 bf16 remat=full",
]


@pytest.mark.parametrize("text", cases(LIVE, quick=LIVE[:1]))
def test_the_step_of_today_needs_what_was_recorded_and_what_is_predicted(text):
    case = Case(text)
    trace = trace_deep(case.config, case.plan.devices)
    # Versions of torch differ a little in what they keep.
    assert trace.peak.total == pytest.approx(max(read(TRACES)[text].values()), rel=0.03)
    assert case.predict().total == pytest.approx(trace.peak.total, rel=0.1)


@slow
def test_states_are_counted_to_the_byte():
    case = Case("tiny fsdp=8 seq=256 batch=16 fp32")
    memory = trace_step(case.config, 8).phases["update"]
    count = parameters(case.job.model)
    assert memory.parameters == memory.gradients == 4 * count / 8
    # Both moments, and a count of four bytes for each of 38 tensors.
    assert memory.optimizer == pytest.approx(8 * count / 8 + 4 * 38, abs=4)


@slow
@pytest.mark.parametrize("optim", [MuonConfig(), AdafactorConfig()], ids=lambda optim: optim.name)
def test_what_an_optimizer_keeps_is_predicted(optim):
    case = Case("tiny fsdp=4,tensor=2 seq=256 batch=8 fp32")
    memory = trace_step(replace(case.config, optim=optim), 8).phases["update"]
    job = replace(case.job, optimizer=optimizer_kind(optim))
    # Beside it a count of four bytes for each tensor that has one.
    assert memory.optimizer == pytest.approx(4 * optimizer_elements(job, case.plan, memory.parameters / 4), abs=4 * 40)
    assert 0.6 < memory.working / update_bytes(job, case.plan) < 1.1


@slow
def test_few_layers_tell_of_many():
    case = Case("tiny fsdp=4,tensor=2 seq=256 batch=8 fp32")
    config = replace(case.config, model=replace(case.config.model, layers=6))
    full, deep = trace_step(config, 8), trace_deep(config, 8)
    for phase, memory in deep.phases.items():
        assert memory.total == pytest.approx(full.phases[phase].total, rel=1e-3), phase


@slow
def test_a_rank_of_hundreds_has_its_share():
    case = Case("llama3_70b fsdp=64,tensor=8 seq=8192 batch=4 bf16 remat=full")
    config = replace(case.config, model=replace(case.config.model, layers=1))
    first, last = (trace_step(config, 512, rank).phases["update"].parameters for rank in (0, 511))
    assert first >= last > 0
    assert first == pytest.approx(4 * parameters(replace(case.job.model, layers=1)) / 512, rel=0.01)
