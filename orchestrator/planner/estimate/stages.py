"""Divide a model's layers among the stages of a pipeline, so that the busiest stage has least to do. No torch."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from orchestrator.config.schema import Schedule
from orchestrator.planner.estimate.work import layer_flops_per_token
from orchestrator.planner.spec import ModelShape


class StageCosts(NamedTuple):
    """What the parts of a model cost a stage that has them, in one unit.

    Attributes:
        layers: of each layer, in order.
        first: of the embedding.
        last: of the head.
    """

    layers: tuple[float, ...]
    first: float
    last: float


@functools.lru_cache(maxsize=256)
def stage_costs(shape: ModelShape, seq_len: int) -> StageCosts:
    """Return the costs of a model's parts: floating-point operations per token, forward and backward.

    The lookup of the embedding multiplies nothing and costs nothing here.

    Args:
        shape: of the model.
        seq_len: tokens of a sequence.
    """
    layers = tuple(layer_flops_per_token(shape, seq_len, layer >= shape.dense_layers) for layer in range(shape.layers))
    return StageCosts(layers, 0.0, 6.0 * shape.vocab * shape.dim)


@functools.lru_cache(maxsize=256)
def balanced(shape: ModelShape, seq_len: int, stages: int) -> tuple[int, ...]:
    """Return the layers of each stage by `stage_costs`.

    Args:
        shape: of the model.
        seq_len: tokens of a sequence.
        stages: their number, counting each chunk of an interleaved schedule.
    """
    return balance_stages(*stage_costs(shape, seq_len), stages=stages)


@functools.lru_cache(maxsize=1024)
def layers_of_ranks(
    shape: ModelShape, seq_len: int, pipeline: int, virtual: int, schedule: Schedule
) -> tuple[tuple[range, ...], ...]:
    """Return the layers of each stage that each rank of a pipeline has.

    Args:
        shape: of the model.
        seq_len: tokens of a sequence.
        pipeline: ranks.
        virtual: stages of each rank.
        schedule: that deals the stages out; DualPipeV goes there and back, others in rounds.
    """
    stops = list(itertools.accumulate(balanced(shape, seq_len, pipeline * virtual), initial=0))
    ranks: list[list[range]] = [[] for _ in range(pipeline)]
    for stage, (start, stop) in enumerate(itertools.pairwise(stops)):
        turn, at = divmod(stage, pipeline)
        ranks[pipeline - 1 - at if schedule == "dualpipe_v" and turn % 2 else at].append(range(start, stop))
    return tuple(map(tuple, ranks))


@functools.lru_cache(maxsize=1024)
def busiest_rank(
    shape: ModelShape, seq_len: int, pipeline: int, virtual: int, schedule: Schedule
) -> tuple[float, bool]:
    """Return the layers of the rank that has most to do, and whether it has the head, too; as `layers_of_ranks`.

    Args:
        shape: of the model.
        seq_len: tokens of a sequence.
        pipeline: ranks.
        virtual: stages of each rank.
        schedule: that deals the stages out.
    """
    costs, found = stage_costs(shape, seq_len), []
    for stages in layers_of_ranks(shape, seq_len, pipeline, virtual, schedule):
        layers = [layer for stage in stages for layer in stage]
        head = layers[-1] == shape.layers - 1
        found.append((sum(costs.layers[layer] for layer in layers) + head * costs.last, len(layers), head))
    _, layers_of, has_head = max(found)
    return float(layers_of), has_head


def balance_stages(costs: Sequence[float], first: float, last: float, stages: int) -> tuple[int, ...]:
    """Return how many consecutive layers each stage has, one at least, so that the costliest stage costs least.

    Of all divisions that reach this, it is one with the least sum of squares: the other stages are as even as can be.

    Args:
        costs: of each layer, in order.
        first: what the first stage has beside its layers.
        last: what the last stage has beside its layers.
        stages: their number, counting each chunk of an interleaved schedule.

    Raises:
        ValueError: there are fewer layers than stages, or no stage.
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot be divided among {stages} stages")
    before = [0.0, *itertools.accumulate(costs)]

    def cost(stage: int, start: int, stop: int) -> float:
        ends = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        return before[stop] - before[start] + ends

    return _evenest(len(costs), stages, cost, _least_largest(len(costs), stages, cost))


_Cost = Callable[[int, int, int], float]  # of a stage with the layers from `start` to before `stop`


def _least_largest(layers: int, stages: int, cost: _Cost) -> float:
    """Return the cost of the costliest stage in the best division: the least of all sums for which filling up works."""
    spans = [(start, stop) for start in range(layers) for stop in range(start + 1, layers + 1)]
    kinds = {0, stages - 1, stages // 2}  # with and without the ends
    sums = sorted({cost(stage, start, stop) for stage in kinds for start, stop in spans})
    return sums[bisect.bisect_left(sums, True, key=lambda limit: _fits(layers, stages, cost, limit))]


def _fits(layers: int, stages: int, cost: _Cost, limit: float) -> bool:
    """Return whether no stage costs more than `limit` when each takes as many layers as it can."""
    start = 0
    for stage in range(stages):
        stop, last = start + 1, layers - (stages - stage - 1)
        while stop < last and cost(stage, start, stop + 1) <= limit:
            stop += 1
        if cost(stage, start, stop) > limit:
            return False
        start = stop
    return start == layers


def _evenest(layers: int, stages: int, cost: _Cost, limit: float) -> tuple[int, ...]:
    """Return the layers of each stage with the least sum of squared costs, none of them above `limit`."""
    # Of each stage: where it ends -> sum of squares up to there, and where it starts.
    found: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for stage in range(stages):
        reached: dict[int, tuple[float, int]] = {}
        for stop in range(stage + 1, layers - (stages - stage - 1) + 1):
            for start in range(stop - 1, stage - 1, -1):
                size = cost(stage, start, stop)
                if size > limit:
                    break
                if start in found[-1]:
                    total = found[-1][start][0] + size * size
                    reached[stop] = min(reached.get(stop, (math.inf, 0)), (total, start))
        found.append(reached)
    counts, stop = [], layers
    for reached in reversed(found[1:]):
        start = reached[stop][1]
        counts.append(stop - start)
        stop = start
    return tuple(reversed(counts))
