"""The search: legal layouts only, the best of them, and few enough to look at for a million chips."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planner.degrees import divisors_of
from orchestrator.planner.estimate.memory import estimate_memory
from orchestrator.planner.estimate.time import estimate_time
from orchestrator.planner.explain import bound, layout_text, link_of, loses
from orchestrator.planner.search import REMATS, Batch, Space, search
from orchestrator.planner.spec import JobSpec, ParallelPlan
from tests.planner.fakes import EXPERTS, LLAMA_8B, LLAMA_70B, Counted, fleet_of

JOB = JobSpec(LLAMA_8B, 4096, 0)
FLEETS = ["h100x8", "h100x64", "tpu_v5px512", "trn2x128", "mi300xx72", "tpu_v6ex1024", "h100x3", "gb200x144"]


@pytest.mark.parametrize("name", FLEETS)
@pytest.mark.parametrize("batch", [Batch(2**21), Batch(3 * 2**19), Batch(2**22, free=True)], ids=str)
@pytest.mark.parametrize("shape", [LLAMA_8B, EXPERTS], ids=lambda shape: shape.name)
def test_every_layout_is_legal(name, batch, shape):
    fleet, job = fleet_of(name), replace(JOB, model=shape)
    result = search(job, fleet.cluster, batch, estimators=Counted().estimators, domains=fleet.domains)
    assert result.ranked
    fast = (fleet.cluster.domain_chips or fleet.cluster.chip.topology.domain_chips) * max(
        1, fleet.cluster.chip.logical_devices_per_chip
    )
    for found in result.ranked:
        plan, tokens = found.plan, found.job.global_batch_tokens
        assert plan.devices <= fleet.cluster.devices
        assert plan.micro_batches(found.job) >= 1
        assert tokens == batch.tokens if not batch.free else 0 < tokens <= batch.tokens
        assert not shape.heads % plan.tensor
        assert plan.tensor <= fast
        assert not shape.kv_heads % plan.tensor or not plan.tensor % shape.kv_heads
        assert math.ceil(shape.layers / plan.pipeline) * plan.pipeline <= 1.1 * shape.layers
        assert not job.seq_len % (plan.context * plan.tensor)
        assert not (shape.experts or 1) % plan.expert
        assert not plan.data_parallel % plan.expert
        assert plan.virtual_stages == 1 or not plan.micro_batches(found.job) % plan.pipeline
        assert found.memory.total <= 0.95 * found.memory.capacity
    speeds = [found.tokens_per_second for found in result.ranked]
    assert speeds == sorted(speeds, reverse=True)
    frames = [(f.plan.tensor, f.plan.context, f.plan.pipeline, f.plan.expert) for f in result.ranked]
    assert len(set(frames)) == len(frames), "one layout of a kind"


@pytest.mark.parametrize(("shape", "name", "seq_len"), [(LLAMA_8B, "h100x16", 8192), (LLAMA_8B, "tpu_v5ex32", 4096)])
def test_against_all_layouts(shape, name, seq_len):
    """What the two rounds leave out costs less than a hundredth, by the real estimators."""
    fleet, tokens = fleet_of(name), 2**20
    cluster, job = fleet.cluster, JobSpec(shape, seq_len, tokens)
    best = math.inf
    degrees = [d for d in divisors_of(cluster.devices) if d <= 16]
    for tensor, context, pipeline in product(degrees, degrees, degrees):
        groups, rest = divmod(cluster.devices, tensor * context * pipeline)
        if rest or not groups or shape.kv_heads % tensor or shape.layers % pipeline or (tokens // seq_len) % groups:
            continue
        share = tokens // seq_len // groups
        for fsdp, zero, micro, remat in product(divisors_of(groups), (1, 3), (1, 2, 4, 8), REMATS):
            if share % micro:
                continue
            for chunks in (1, 2, 4):
                if chunks > 1 and (pipeline == 1 or share // micro % pipeline or shape.layers // pipeline % chunks):
                    continue
                plan = ParallelPlan(groups // fsdp, fsdp, context, tensor, pipeline, 1, micro, remat, zero, chunks)
                memory = estimate_memory(job, cluster, plan)
                if memory.total <= 0.95 * memory.capacity:
                    best = min(best, estimate_time(job, cluster, plan).step)
    found = search(job, cluster, Batch(tokens), domains=fleet.domains).best
    assert found.time.step <= 1.01 * best


def test_the_least_remat_that_fits():
    """Remat is free in this estimator, so that only the order decides."""
    saved = {"none": 1.0, "selective": 0.5, "full": 0.1}
    fake = Counted(bytes_=lambda job, plan: 120e9 * saved[plan.remat] * plan.micro_batch)
    found = search(JOB, fleet_of("h100x8").cluster, Batch(2**20), estimators=fake.estimators).best
    assert found.plan.remat == "selective"
    assert found.plan.micro_batch == 1


@pytest.mark.parametrize("name", ["tpu_v5px1M", "tpu_v7xx1M", "trn2x400k", "h100x1M"])
@pytest.mark.parametrize("shape", [LLAMA_70B, EXPERTS], ids=lambda shape: shape.name)
def test_a_million_chips_take_few_looks(name, shape):
    """An estimate takes about 0.1 ms: 20,000 of them are two seconds of the five that a plan may take."""
    fleet, fake = fleet_of(name), Counted()
    result = search(
        replace(JOB, model=shape), fleet.cluster, Batch(2**26, True), estimators=fake.estimators, domains=fleet.domains
    )
    assert result.best.plan.devices > 0.5 * fleet.cluster.devices
    assert fake.calls < 20_000


def test_eight_chips_take_fewer():
    fake = Counted()
    search(JOB, fleet_of("h100x8").cluster, Batch(2**22, True), estimators=fake.estimators)
    assert fake.calls < 3000


@given(
    st.fixed_dictionaries(
        {axis: st.sampled_from((None, 1, 2, 4)) for axis in ("replicate", "fsdp", "context", "tensor")}
    ),
    st.sampled_from((None, 1, 2)),
)
@settings(max_examples=60, deadline=None)
def test_what_is_fixed_stays(degrees, micro):
    space = Space(**degrees, pipeline=1, micro_batch=micro, zeros=(3,), whole=True, even=True)
    result = search(JOB, fleet_of("h100x16").cluster, Batch(2**19), space, Counted().estimators)
    for found in result.ranked:
        assert found.plan.devices == 16
        assert found.plan.pipeline == 1
        assert all(getattr(found.plan, axis) == degree for axis, degree in degrees.items() if degree)
        assert micro is None or found.plan.micro_batch == micro
    if math.prod(degree or 1 for degree in degrees.values()) == 16 or not any(degrees.values()):
        assert result.ranked, "there is a layout of these degrees"


@pytest.mark.parametrize("degrees", [{"tensor": 3}, {"tensor": 64}, {"context": 3}, {"fsdp": 7, "replicate": 11}])
def test_what_is_fixed_and_illegal_gives_nothing(degrees):
    result = search(JOB, fleet_of("h100x64").cluster, Batch(2**20), Space(**degrees), Counted().estimators)
    assert (result.ranked, result.nearest, result.layouts) == ([], None, 0)


def test_a_free_batch_leaves_a_few_devices_for_degrees_that_divide():
    fleet = fleet_of("h100x8104")  # 1013 hosts, a prime
    best = search(
        JOB, fleet.cluster, Batch(2**26, True), Space(tensor=8, context=1, pipeline=1), Counted().estimators
    ).best
    assert best.plan.data_parallel == 1008
    assert best.plan.devices >= 0.98 * fleet.cluster.devices


def test_where_nothing_fits_it_says_what_needs_least():
    fake = Counted(bytes_=lambda job, plan: 100e9 / plan.devices * (1 if plan.remat == "full" else 2) + 90e9)
    result = search(JOB, fleet_of("h100x8").cluster, Batch(2**20), estimators=fake.estimators)
    assert result.best is None
    plan, memory = result.nearest
    assert plan.remat == "full"
    assert memory.total > memory.capacity


def test_words():
    fleet = fleet_of("h100x64")
    quick = search(JOB, fleet.cluster, Batch(2**20)).ranked
    best, other = quick[0], quick[1]
    assert loses(other, best).partition("% slower: ")[0].replace(".", "").isdigit()
    assert "matrix products" in bound(best, fleet.cluster)
    plan = ParallelPlan(replicate=2, fsdp=4, tensor=8, micro_batch=3, remat="full", zero=1)
    assert layout_text(plan) == "replicate 2 x fsdp 4 x tensor 8, zero-1, micro-batch 3, remat full"
    assert link_of("tensor", plan, fleet.cluster) == "NVLink"
    assert link_of("fsdp", plan, fleet.cluster) == "the network between hosts"
    slices = fleet_of("tpu_v6ex512")
    assert link_of("fsdp", plan, slices.cluster) == "ICI"
    assert link_of("replicate", replace(plan, fsdp=64), slices.cluster) == "the network between slices"
