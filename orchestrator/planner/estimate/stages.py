"""Divide a model's layers among the stages of a pipeline, so that the busiest stage has least to do. No torch."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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

    def squared(stage: int, start: int, stop: int) -> float:
        size = cost(stage, start, stop)
        return size * size if size <= largest else math.inf

    largest, _ = _least(len(costs), stages, cost, max)
    return _least(len(costs), stages, squared, float.__add__)[1]


def _least(
    layers: int, stages: int, cost: Callable[[int, int, int], float], join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """Return the least joined cost of all divisions, and the layers of each stage in one that has it.

    Args:
        layers: to be divided.
        stages: among which; each has one layer at least.
        cost: of a stage with the layers from `start` to before `stop`.
        join: total of the stages before, and a stage's cost, into their total; grows with both.
    """
    found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        later = stages - stage - 1
        ends = range(stage + 1, layers - later + 1) if later else (layers,)
        found = {
            stop: min(
                (join(total, float(cost(stage, start, stop))), (*counts, stop - start))
                for start, (total, counts) in found.items()
                if start < stop
            )
            for stop in ends
        }
    return found[layers]
