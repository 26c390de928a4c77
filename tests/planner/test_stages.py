"""Layers of a pipeline's stages: the least of the largest, against all divisions."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planner.estimate.stages import balance_stages, stage_costs
from orchestrator.planner.estimate.work import model_flops_per_token
from tests.planner.shapes import DEEPSEEK_V3, LLAMA_8B, MIXTRAL


def totals(counts, costs, first, last):
    stops = list(itertools.accumulate(counts))
    sums = [sum(costs[stop - count : stop]) for count, stop in zip(counts, stops, strict=True)]
    sums[0] += first
    sums[-1] += last
    return sums


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(0, 20), st.integers(0, 20), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_no_division_has_a_smaller_largest_stage(costs, first, last, stages):
    stages = min(stages, len(costs))
    found = balance_stages(costs, first, last, stages)
    assert sum(found) == len(costs)
    assert min(found) >= 1
    bounds = [(0, *inner, len(costs)) for inner in itertools.combinations(range(1, len(costs)), stages - 1)]
    divisions = [[stop - start for start, stop in itertools.pairwise(one)] for one in bounds]
    measures = [
        (max(sums), sum(size * size for size in sums))
        for sums in (totals(counts, costs, first, last) for counts in divisions)
    ]
    sums = totals(found, costs, first, last)
    assert (max(sums), sum(size * size for size in sums)) == min(measures)


@pytest.mark.parametrize("shape", [LLAMA_8B, MIXTRAL, DEEPSEEK_V3], ids=lambda shape: shape.name)
def test_costs_are_those_of_the_whole_model(shape):
    costs = stage_costs(shape, 4096)
    assert sum(costs.layers) + costs.first + costs.last == pytest.approx(model_flops_per_token(shape, 4096))
    counts = balance_stages(*costs, stages=4)
    assert counts[-1] <= min(counts[:-1]), "the head takes the place of layers"


def test_what_cannot_be_divided_and_what_is_deep():
    with pytest.raises(ValueError, match="3 layers cannot be divided among 4 stages"):
        balance_stages([1, 1, 1], 0, 0, 4)
    start = time.process_time()
    assert sum(balance_stages([1.0] * 128, 0.0, 2.5, 64)) == 128
    assert time.process_time() - start < 2
