"""Enumerate parallel layouts, ranked by tokens per second.

A layout is a *frame* (tensor, context, pipeline, expert: who works on one sequence) and a *filling* of it (how the
data-parallel groups shard the state, micro-batch, remat, interleaving). The search has two rounds: every legal frame
with a few fillings, then the best frames with all of them. What is left out, and why:

- Remat: the least that fits is taken, since recomputation only adds time (exact).
- Micro-batch: powers of two until nothing fits; memory only grows with it.
- Frames whose weights and optimizer state alone do not fit are not filled (exact: the rest only adds).
- Tensor parallelism stays within a domain of fast links, and pipelines of a TPU within a slice (a rule of the field,
  not a theorem: it is what the links are for).
- Degrees are divisors of what they split, at most `_DEGREES` of an axis, evenly over the logarithm; and only the
  frames that lead after the first round are filled to the end (approximate; tests compare it with all layouts).
- Data parallelism takes the devices that are left and that the batch can use. Where the batch is free, up to 2% of them
  stay idle for the sake of degrees that divide well; idle devices are counted and shown.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from orchestrator.planner.estimate.memory import device_capacity, estimate_memory
from orchestrator.planner.estimate.optimizer_memory import least_moments
from orchestrator.planner.estimate.time import estimate_time
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.evidence.calibration import COMPILED, calibration
from orchestrator.planner.spec import (
    Cluster,
    JobSpec,
    MemoryEstimate,
    ModelShape,
    ParallelPlan,
    Reduce,
    Remat,
    TimeEstimate,
)

Memory = Callable[[JobSpec, Cluster, ParallelPlan], MemoryEstimate]
Time = Callable[[JobSpec, Cluster, ParallelPlan], TimeEstimate]

REMATS: tuple[Remat, ...] = ("none", "selective", "full")
_DEGREES = 7  # of one axis
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
LEADERS = 8  # frames that are filled to the end
_UNEVEN = 1.1  # stages may have so many times the mean number of layers
_ROUND = 0.98  # of the data-parallel groups that there could be: enough, if their number divides better
_LEAST_PART = 2048  # tokens of a sequence that a context rank keeps, where devices are not too many


@dataclass(frozen=True)
class Estimators:
    """The functions that estimate memory and time of a layout.

    Attributes:
        memory: bytes per device of a layout.
        time: seconds of a step.
    """

    memory: Memory = estimate_memory
    time: Time = estimate_time


@dataclass(frozen=True)
class Batch:
    """Tokens per step: fixed, or a maximum, below which a layout takes what suits it.

    Attributes:
        tokens: of the step, or the most of it.
        free: whether a layout may take fewer.
    """

    tokens: int
    free: bool = False


@dataclass(frozen=True)
class Space:
    """The choices of the search. None leaves an axis open.

    Attributes:
        replicate: degree of the axis, like the next ones; None: to be searched.
        fsdp: degree.
        context: degree.
        tensor: degree.
        pipeline: degree.
        expert: degree.
        micro_batch: sequences; None: to be searched.
        remats: policies to try.
        zeros: what fsdp may shard, as `ParallelPlan.zero`.
        whole: every device works, as a training run of this product wants it.
        even: all axes divide what they split (this product's rules); else heads may be copied and stages be uneven.
        compiled: as in a plan.
        copies: replicate is a multiple of it.
        reduce_gradients: as in a plan. Compilers for TPU and Trainium cut gradients always, whatever it says.
        reserve: share of a device's memory that stays free: the memory model is not better than that.
    """

    replicate: int | None = None
    fsdp: int | None = None
    context: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    expert: int | None = None
    micro_batch: int | None = None
    remats: tuple[Remat, ...] = REMATS
    zeros: tuple[Literal[1, 2, 3], ...] = (3, 1)
    whole: bool = False
    even: bool = False
    compiled: bool = True
    copies: int = 1
    reduce_gradients: Reduce = "each"
    reserve: float = 0.05


@dataclass(frozen=True)
class Candidate:
    """One layout with its estimates.

    Attributes:
        plan: the layout and its settings.
        job: with the batch that this layout takes.
        memory: bytes per device.
        time: of a step.
    """

    plan: ParallelPlan
    job: JobSpec
    memory: MemoryEstimate
    time: TimeEstimate

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job."""
        return self.job.global_batch_tokens / self.time.step


@dataclass
class SearchResult:
    """The result of the search.

    Attributes:
        ranked: layouts that fit, the fastest first, one per frame.
        nearest: where none fits, the one that needs least; its layout and memory.
        layouts: that were looked at.
    """

    ranked: list[Candidate] = field(default_factory=list)
    nearest: tuple[ParallelPlan, MemoryEstimate] | None = None
    layouts: int = 0

    @property
    def best(self) -> Candidate | None:
        """The first of the ranked layouts; None where none fits."""
        return self.ranked[0] if self.ranked else None


@dataclass(frozen=True)
class _Frame:
    """Who works on one sequence; `groups` such groups see different ones."""

    tensor: int
    context: int
    pipeline: int
    expert: int
    groups: int

    @property
    def devices(self) -> int:
        return self.tensor * self.context * self.pipeline


def search(
    job: JobSpec,
    cluster: Cluster,
    batch: Batch,
    space: Space = Space(),
    estimators: Estimators = Estimators(),
    domains: int = 1,
    keep: int = 6,
    leaders: int = LEADERS,
) -> SearchResult:
    """Rank the layouts of a job on a cluster.

    Args:
        job: its `global_batch_tokens` gives way to `batch`.
        cluster: chips and links.
        batch: the batch sizes to try.
        space: the layouts and settings to try.
        estimators: of memory and time.
        domains: slices; each has whole data-parallel groups.
        keep: layouts in the result, of different frames.
        leaders: frames that are filled to the end.
    """
    walk = _Walk(job, cluster, batch, space, estimators, domains)
    first = [(walk.best(frame, thorough=False), frame) for frame in walk.frames()]
    found = sorted(((best, frame) for best, frame in first if best), key=lambda pair: -pair[0].tokens_per_second)
    ranked = [best for best, _ in found]
    for index, (_, frame) in enumerate(found[:leaders]):
        ranked[index] = walk.best(frame, thorough=True) or ranked[index]
    ranked.sort(key=lambda best: -best.tokens_per_second)
    return SearchResult(ranked[:keep], None if ranked else walk.nearest, walk.layouts)


class _Walk:
    """The frames and fillings of one search, and the account of what was looked at."""

    def __init__(
        self, job: JobSpec, cluster: Cluster, batch: Batch, space: Space, estimators: Estimators, domains: int
    ):
        self._job, self._cluster, self._batch = job, cluster, batch
        self._estimators, self._space, self._domains = estimators, space, domains
        self._sequences = max(1, batch.tokens // job.seq_len)
        self._reduce: Reduce = "each" if cluster.chip.vendor in COMPILED else space.reduce_gradients
        self._fast, self._parts = _fast_devices(cluster), cluster.chip.logical_devices_per_chip
        self.layouts = 0
        self.nearest: tuple[ParallelPlan, MemoryEstimate] | None = None

    def frames(self) -> Iterator[_Frame]:
        """Legal frames whose share of the state can fit."""
        shape, space, devices = self._job.model, self._space, self._cluster.devices
        per_domain = devices // self._domains
        capacity = device_capacity(self._cluster)
        for tensor in self._tensors(shape):
            for pipeline in _pick(space.pipeline, self._pipelines(shape)):
                for context in _pick(space.context, self._contexts(tensor * pipeline)):
                    size = tensor * context * pipeline
                    if size > per_domain or (space.whole and devices % size) or self._job.seq_len % (tensor * context):
                        continue
                    groups = self._groups(per_domain // size * self._domains)
                    if (
                        not groups
                        or size * groups % self._parts
                        or (capacity and _least_state(self._job, self._cluster, size * groups) > capacity)
                    ):
                        continue
                    for expert in _pick(space.expert, self._experts(shape, groups, tensor)):
                        yield _Frame(tensor, context, pipeline, expert, groups)

    def best(self, frame: _Frame, thorough: bool) -> Candidate | None:
        """Return the fastest filling that fits."""
        found: Candidate | None = None
        for replicate, fsdp in self._shardings(frame, thorough):
            zeros = self._space.zeros if fsdp > 1 else self._space.zeros[:1]
            for zero, stages in itertools.product(zeros, self._interleavings(frame, thorough)):
                for candidate in self._grow(frame, replicate, fsdp, zero, stages):
                    if found is None or candidate.tokens_per_second > found.tokens_per_second:
                        found = candidate
        return found

    def _grow(self, frame: _Frame, replicate: int, fsdp: int, zero: int, stages: int) -> Iterator[Candidate]:
        """Micro-batches from small to large, each with the least remat that fits."""
        share = self._sequences // frame.groups
        for micro in _pick(self._space.micro_batch, _MICRO_BATCHES):
            if micro > share or (not self._batch.free and share % micro):
                return
            # A free batch is a whole number of micro-batches of every group.
            tokens = frame.groups * (share // micro) * micro * self._job.seq_len
            if stages > 1 and (share // micro) % frame.pipeline:
                continue  # interleaving takes the micro-batches in rounds of one per stage
            job = replace(self._job, global_batch_tokens=tokens)
            plan = ParallelPlan(
                replicate=replicate,
                fsdp=fsdp,
                context=frame.context,
                tensor=frame.tensor,
                pipeline=frame.pipeline,
                expert=frame.expert,
                micro_batch=micro,
                zero=cast(Literal[1, 2, 3], zero),
                virtual_stages=stages,
                compiled=self._space.compiled,
                reduce_gradients=self._reduce,
            )
            candidate = self._least_remat(job, plan)
            if candidate is None:
                return
            yield candidate

    def _least_remat(self, job: JobSpec, plan: ParallelPlan) -> Candidate | None:
        working = replace(self._cluster, chips=plan.devices // self._parts)
        for remat in self._space.remats:
            tried = replace(plan, remat=remat)
            memory = self._estimators.memory(job, working, tried)
            self.layouts += 1
            if memory.capacity is None or memory.total <= (1 - self._space.reserve) * memory.capacity:
                return Candidate(tried, job, memory, self._estimators.time(job, working, tried))
            if self.nearest is None or memory.total < self.nearest[1].total:
                self.nearest = (tried, memory)
        return None

    def _groups(self, most: int) -> int:
        """Data-parallel groups: as many as the devices hold and the batch can feed."""
        space = self._space
        fixed = (space.replicate or 1) * (space.fsdp or 1)
        if space.replicate and space.fsdp:
            fits = fixed == most if space.whole else fixed <= most
            return fixed if fits and not self._sequences % fixed else 0
        if space.whole:
            return most if not self._sequences % most and not most % fixed else 0
        limit = min(most, self._sequences)
        unit = math.lcm(fixed, self._domains)
        unit = unit if unit <= limit else fixed
        if self._batch.free:
            rounded = [limit // (unit * factor) * unit * factor for factor in (64, 8, 1)]
            return next((groups for groups in rounded if groups >= _ROUND * limit), rounded[-1])
        fitting = [groups for groups in divisors_of(self._sequences) if groups <= limit and not groups % unit]
        return fitting[-1] if fitting else 0

    def _shardings(self, frame: _Frame, thorough: bool) -> Iterator[tuple[int, int]]:
        """(replicate, fsdp) of the groups."""
        groups, space = frame.groups, self._space
        if space.fsdp or space.replicate:
            fsdp = space.fsdp or groups // (space.replicate or 1)
            if not groups // fsdp % space.copies:
                yield groups // fsdp, fsdp
            return
        near = max(1, self._fast // (frame.tensor * frame.context))
        divisors = divisors_of(groups // space.copies)
        wanted = {groups, near, 4 * near, 16 * near, groups // self._domains}
        if thorough:
            wanted |= set(_spread(divisors, 12)) | {1}
        seen = {max(divisor for divisor in divisors if divisor <= max(1, want)) for want in wanted}
        yield from ((groups // fsdp, fsdp) for fsdp in sorted(seen, reverse=True))

    def _tensors(self, shape: ModelShape) -> list[int]:
        def legal(degree: int) -> bool:
            if shape.heads % degree or shape.mlp_dim % degree or self._job.seq_len % degree:
                return False
            if self._space.even:
                return not (shape.kv_heads % degree or shape.vocab % degree or shape.learned_positions % degree)
            return not (shape.kv_heads % degree and degree % shape.kv_heads)

        fixed = self._space.tensor
        degrees = [degree for degree in divisors_of(shape.heads) if legal(degree)]
        if fixed is not None:
            return [degree for degree in degrees if degree == fixed]
        return [degree for degree in degrees if degree <= self._fast][:_DEGREES]

    def _pipelines(self, shape: ModelShape) -> list[int]:
        if self._space.even:
            return [1]
        most = min(shape.layers, self._cluster.devices)
        powers = [2**power for power in range(most.bit_length()) if 2**power <= most]
        legal = {p for p in powers if math.ceil(shape.layers / p) * p <= _UNEVEN * shape.layers}
        return _spread(sorted(legal | {p for p in divisors_of(shape.layers) if p <= most}), _DEGREES + 2)

    def _contexts(self, others: int) -> list[int]:
        """Parts of a sequence; small ones only where there are more devices than sequences, or groups."""
        seq_len, space = self._job.seq_len, self._space
        groups = space.replicate * space.fsdp if space.replicate and space.fsdp else self._sequences
        least = _LEAST_PART // (4 if self._cluster.devices // others > groups else 1)
        legal = [degree for degree in divisors_of(seq_len) if degree & (degree - 1) == 0]
        return [degree for degree in legal if degree == 1 or seq_len // degree >= least][:_DEGREES]

    def _experts(self, shape: ModelShape, groups: int, tensor: int) -> list[int]:
        if not shape.experts:
            return [1]
        legal = [degree for degree in divisors_of(math.gcd(shape.experts, groups)) if degree & (degree - 1) == 0]
        return _spread(legal, 4)

    def _interleavings(self, frame: _Frame, thorough: bool) -> list[int]:
        layers = self._job.model.layers
        if frame.pipeline == 1 or layers % frame.pipeline:
            return [1]
        chunks = divisors_of(layers // frame.pipeline)
        return _spread(chunks, 6) if thorough else sorted({chunks[0], chunks[-1]})


@functools.lru_cache(maxsize=4096)
def divisors_of(number: int) -> tuple[int, ...]:
    """Return all divisors, in order.

    Args:
        number: 1 or more.
    """
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if not number % divisor]
    return tuple(sorted({*small, *(number // divisor for divisor in small)}))


def _fast_devices(cluster: Cluster) -> int:
    """Devices that the fast links join."""
    topology = cluster.chip.topology
    chips = cluster.domain_chips or topology.domain_chips or topology.chips_per_host or 1
    return min(chips, cluster.chips) * cluster.chip.logical_devices_per_chip


def _least_state(job: JobSpec, cluster: Cluster, devices: int) -> float:
    """Bytes of weights and moments of one device when all devices share them."""
    constants = calibration(cluster.chip, job.stack)
    return (
        (constants.weight_bytes + constants.optimizer_bytes * least_moments(job) / 2) * parameters(job.model) / devices
    )


def _pick(fixed: int | None, free: Sequence[int]) -> Sequence[int]:
    return free if fixed is None else [fixed]


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the ordered values, first and last among them, evenly over the logarithm."""
    if len(values) <= count:
        return list(values)
    low, high = math.log(values[0]), math.log(values[-1])
    wanted = [math.exp(low + (high - low) * index / (count - 1)) for index in range(count)]
    return sorted({min(values, key=lambda value: abs(math.log(value / want))) for want in wanted})
