"""The degrees and schedules that are legal for a model, by themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from orchestrator.config.schema import ContextKind, Schedule
from orchestrator.planner.spec import ModelShape
from orchestrator.sharding.layout import VIRTUAL_STAGES

SCHEDULES: tuple[Schedule, ...] = tuple(VIRTUAL_STAGES)
CONTEXT_KINDS: tuple[ContextKind, ...] = ("gather", "ring", "ulysses")
_DEGREES = 7  # of one axis
_EXPERT_DEGREES = 4
_UNEVEN = 1.1  # stages may have so many times the mean number of layers
_LEAST_PART = 2048  # tokens of a sequence that a context rank keeps, where devices are not too many


def tensor_degrees(shape: ModelShape, seq_len: int, even: bool) -> list[int]:
    """List the degrees of the tensor axis that divide the heads and widths, and that leave or copy heads of keys.

    Args:
        shape: of the model.
        seq_len: tokens of a sequence.
        even: whether everything that is cut has to divide.
    """

    def legal(degree: int) -> bool:
        if shape.heads % degree or shape.mlp_dim % degree or seq_len % degree:
            return False
        if even:
            sizes = (shape.kv_heads, shape.vocab, shape.learned_positions, shape.expert_dim, shape.shared_width)
            return not any(size % degree for size in sizes)
        return not (shape.kv_heads % degree and degree % shape.kv_heads)

    return [degree for degree in divisors_of(shape.heads) if legal(degree)]


def pipeline_degrees(shape: ModelShape, devices: int) -> list[int]:
    """List numbers of stages: divisors of the layers, and powers of two with stages that are not too uneven.

    Args:
        shape: of the model.
        devices: that there are.
    """
    most = min(shape.layers, devices)
    powers = [2**power for power in range(most.bit_length()) if 2**power <= most]
    legal = {p for p in powers if math.ceil(shape.layers / p) * p <= _UNEVEN * shape.layers}
    return spread(sorted(legal | {p for p in divisors_of(shape.layers) if p <= most}), _DEGREES + 2)


def context_degrees(seq_len: int, scarce: bool) -> list[int]:
    """List parts of a sequence, none of them small.

    Args:
        seq_len: tokens of a sequence.
        scarce: whether sequences are fewer than devices; then parts may be smaller.
    """
    least = _LEAST_PART // (4 if scarce else 1)
    legal = [degree for degree in divisors_of(seq_len) if degree & (degree - 1) == 0]
    return [degree for degree in legal if degree == 1 or seq_len // degree >= least][:_DEGREES]


def expert_degrees(shape: ModelShape, most: int) -> list[int]:
    """List into how many groups the experts may be divided.

    Args:
        shape: of the model.
        most: groups that see different sequences.
    """
    if not shape.experts:
        return [1]
    legal = [degree for degree in divisors_of(shape.experts) if degree & (degree - 1) == 0 and degree <= most]
    return spread(legal, _EXPERT_DEGREES)


def cuts_experts(shape: ModelShape, shards: int, tensor: int) -> bool:
    """Return whether the fsdp rule of this product cuts an expert's matrices in equal parts.

    Args:
        shape: of the model.
        shards: devices that share an expert: fsdp x context.
        tensor: degree of the axis.
    """
    return not shape.experts or not (shape.expert_dim % (shards * tensor) or shape.dim % shards)


def attends(kind: ContextKind, shape: ModelShape, seq_len: int, context: int, tensor: int) -> bool:
    """Return whether the parts of a sequence can attend to each other in this way.

    Args:
        kind: the way.
        shape: of the model.
        seq_len: tokens of a sequence.
        context: parts.
        tensor: degree of the tensor axis.
    """
    if kind == "ring":
        return not seq_len % (context * math.lcm(2, tensor))  # two chunks a rank
    if kind == "ulysses":
        keys = max(1, shape.kv_heads // tensor)
        return not (shape.heads % (context * tensor) or (keys % context and context % keys))
    return True


def fills(schedule: Schedule, pipeline: int, micro_batches: int) -> bool:
    """Return whether a step has as many micro-batches as a schedule takes.

    Args:
        schedule: of the pipeline.
        pipeline: degree of the axis.
        micro_batches: of the step.
    """
    if schedule == "dualpipe_v":
        return micro_batches >= 2 * pipeline
    if schedule in ("interleaved", "zero_bubble"):
        rounds = micro_batches // pipeline
        return rounds > 0 and micro_batches % rounds == 0
    return micro_batches >= pipeline


def chunk_counts(layers: int, pipeline: int, thorough: bool) -> list[int]:
    """List how many chunks of layers each stage may interleave.

    Args:
        layers: of the model.
        pipeline: degree of the axis.
        thorough: whether more than the least and the most are wanted.
    """
    if pipeline == 1 or layers % pipeline:
        return [1]
    chunks = divisors_of(layers // pipeline)
    return spread(chunks, 6) if thorough else sorted({chunks[0], chunks[-1]})


@functools.lru_cache(maxsize=4096)
def divisors_of(number: int) -> tuple[int, ...]:
    """Return all divisors, in order.

    Args:
        number: 1 or more.
    """
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if not number % divisor]
    return tuple(sorted({*small, *(number // divisor for divisor in small)}))


def spread(values: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of the values, first and last among them, evenly over the logarithm.

    Args:
        values: in order.
        count: 2 or more.
    """
    if len(values) <= count:
        return list(values)
    low, high = math.log(values[0]), math.log(values[-1])
    wanted = [math.exp(low + (high - low) * index / (count - 1)) for index in range(count)]
    return sorted({min(values, key=lambda value: abs(math.log(value / want))) for want in wanted})
