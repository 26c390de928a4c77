"""Enumerate parallel layouts, ranked by tokens per second.

A layout is a *frame* (tensor, context, pipeline, expert: who works on one sequence) and a *filling* of it (how the
data-parallel groups shard the state, micro-batch, remat, interleaving). The search has two rounds: every legal frame
with a few fillings, then the best frames with all of them. What is left out, and why:

- Remat: the least that fits is taken, since recomputation only adds time (exact).
- Micro-batch: powers of two until nothing fits; memory only grows with it.
- Frames whose weights and optimizer state alone do not fit are not filled (exact: the rest only adds).
- Tensor parallelism stays within a domain of fast links, and pipelines of a TPU within a slice (a rule of the field,
  not a theorem: it is what the links are for).
- Degrees are divisors of what they split, a few of an axis (`degrees`), evenly over the logarithm; and only the
  frames that lead after the first round are filled to the end (approximate; tests compare it with all layouts).
- Data parallelism takes the devices that are left and that the batch can use. Where the batch is free, up to 2% of them
  stay idle for the sake of degrees that divide well; idle devices are counted and shown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from orchestrator.config.schema import ContextKind, Schedule
from orchestrator.planner.degrees import (
    attends,
    chunk_counts,
    context_degrees,
    cuts_experts,
    divisors_of,
    expert_degrees,
    fills,
    pipeline_degrees,
    spread,
    tensor_degrees,
)
from orchestrator.planner.estimate.memory import device_capacity, estimate_memory
from orchestrator.planner.estimate.optimizer_memory import least_moments
from orchestrator.planner.estimate.time import estimate_time
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.evidence.calibration import COMPILED, calibration
from orchestrator.planner.spec import (
    Cluster,
    JobSpec,
    MemoryEstimate,
    ParallelPlan,
    Reduce,
    Remat,
    TimeEstimate,
)
from orchestrator.sharding.layout import VIRTUAL_STAGES
from orchestrator.sharding.pipeline import DIVIDED_BACKWARD

Memory = Callable[[JobSpec, Cluster, ParallelPlan], MemoryEstimate]
Time = Callable[[JobSpec, Cluster, ParallelPlan], TimeEstimate]

REMATS: tuple[Remat, ...] = ("none", "selective", "full")
_TENSORS = 7  # degrees of the axis
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
LEADERS = 8  # frames that are filled to the end
_ROUND = 0.98  # of the data-parallel groups that there could be: enough, if their number divides better


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
        even: all axes divide what they split (this product's rules); else heads may be copied.
        schedules: of this product's pipelines (compiled blocks have no zero bubble); empty: 1F1B, with any number of
            chunks interleaved.
        context_kinds: how the parts of a sequence may attend to each other.
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
    schedules: tuple[Schedule, ...] = ()
    context_kinds: tuple[ContextKind, ...] = ("gather",)
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


_Way = tuple[Schedule, int]  # of a pipeline: schedule, and chunks of a stage


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
        for tensor in self._tensors():
            for pipeline in _pick(space.pipeline, pipeline_degrees(shape, devices)):
                for context in _pick(space.context, self._contexts(tensor * pipeline)):
                    size = tensor * context * pipeline
                    if size > per_domain or (space.whole and devices % size) or self._job.seq_len % (tensor * context):
                        continue
                    most = per_domain // size * self._domains
                    for expert in _pick(space.expert, expert_degrees(shape, min(most, self._sequences))):
                        groups = self._groups(most, expert)
                        fits = groups and not size * groups % self._parts and not (shape.experts or 1) % expert
                        if fits and not (capacity and _least_state(self._job, self._cluster, size * groups) > capacity):
                            yield _Frame(tensor, context, pipeline, expert, groups)

    def best(self, frame: _Frame, thorough: bool) -> Candidate | None:
        """Return the fastest filling that fits."""
        found: Candidate | None = None
        for replicate, fsdp in self._shardings(frame, thorough):
            zeros = self._space.zeros if fsdp * frame.expert > 1 else self._space.zeros[:1]
            for zero, way, kind in itertools.product(zeros, self._ways(frame, thorough), self._kinds(frame, thorough)):
                for candidate in self._grow(frame, replicate, fsdp, zero, way, kind):
                    if found is None or candidate.tokens_per_second > found.tokens_per_second:
                        found = candidate
        return found

    def _ways(self, frame: _Frame, thorough: bool) -> list[_Way]:
        """Schedules of a pipeline."""
        space, layers = self._space, self._job.model.layers
        if frame.pipeline == 1:
            return [("1f1b", 1)]
        if not space.schedules:
            chunks = chunk_counts(layers, frame.pipeline, thorough)
            return [("interleaved" if count > 1 else "1f1b", count) for count in chunks]
        ways = [(one, VIRTUAL_STAGES[one]) for one in space.schedules if one == space.schedules[0] or thorough]
        return [
            (schedule, virtual)
            for schedule, virtual in ways
            if frame.pipeline * virtual <= layers and not (space.compiled and schedule in DIVIDED_BACKWARD)
        ]

    def _kinds(self, frame: _Frame, thorough: bool) -> list[ContextKind]:
        """Ways in which the parts of a sequence attend to each other."""
        kinds, job = self._space.context_kinds, self._job
        if frame.context == 1:
            return ["gather" if "gather" in kinds else kinds[0]]
        legal = [kind for kind in kinds if attends(kind, job.model, job.seq_len, frame.context, frame.tensor)]
        return legal if thorough else legal[:1]

    def _grow(
        self, frame: _Frame, replicate: int, fsdp: int, zero: int, way: _Way, kind: ContextKind
    ) -> Iterator[Candidate]:
        """Micro-batches from small to large, each with the least remat that fits."""
        share, (schedule, stages) = self._sequences // frame.groups, way
        for micro in _pick(self._space.micro_batch, _MICRO_BATCHES):
            if micro > share or (not self._batch.free and share % micro):
                return
            # A free batch is a whole number of micro-batches of every group.
            tokens = frame.groups * (share // micro) * micro * self._job.seq_len
            if self._space.schedules and frame.pipeline > 1:
                if not fills(schedule, frame.pipeline, share // micro):
                    continue
            elif stages > 1 and (share // micro) % frame.pipeline:
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
                schedule=schedule,
                context_kind=kind,
            )
            candidate = self._least_remat(job, plan)
            if candidate is None:
                return
            yield candidate

    def _least_remat(self, job: JobSpec, plan: ParallelPlan) -> Candidate | None:
        working = replace(self._cluster, chips=plan.devices // self._parts)
        divided = plan.schedule in DIVIDED_BACKWARD
        for remat in self._space.remats:
            if remat == "selective" and divided:
                continue  # its backward pass cannot be taken apart
            tried = replace(plan, remat=remat)
            memory = self._estimators.memory(job, working, tried)
            self.layouts += 1
            if memory.capacity is None or memory.total <= (1 - self._space.reserve) * memory.capacity:
                return Candidate(tried, job, memory, self._estimators.time(job, working, tried))
            if self.nearest is None or memory.total < self.nearest[1].total:
                self.nearest = (tried, memory)
        return None

    def _groups(self, most: int, expert: int) -> int:
        """Data-parallel groups: as many as the devices hold and the batch can feed."""
        space = self._space
        fixed = (space.replicate or 1) * (space.fsdp or 1) * expert
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
        groups, space = frame.groups // frame.expert, self._space
        if space.fsdp or space.replicate:
            fsdp = space.fsdp or groups // (space.replicate or 1)
            if not groups // fsdp % space.copies and self._cuts(frame, fsdp):
                yield groups // fsdp, fsdp
            return
        near = max(1, self._fast // (frame.tensor * frame.context * frame.expert))
        divisors = [divisor for divisor in divisors_of(groups // space.copies) if self._cuts(frame, divisor)]
        wanted = {groups, near, 4 * near, 16 * near, groups // self._domains}
        if thorough:
            wanted |= set(spread(divisors, 12)) | {1}
        seen = {max((divisor for divisor in divisors if divisor <= max(1, want)), default=0) for want in wanted}
        yield from ((groups // fsdp, fsdp) for fsdp in sorted(seen - {0}, reverse=True))

    def _cuts(self, frame: _Frame, fsdp: int) -> bool:
        return not self._space.even or cuts_experts(self._job.model, fsdp * frame.context, frame.tensor)

    def _tensors(self) -> list[int]:
        fixed = self._space.tensor
        degrees = tensor_degrees(self._job.model, self._job.seq_len, self._space.even)
        if fixed is not None:
            return [degree for degree in degrees if degree == fixed]
        return [degree for degree in degrees if degree <= self._fast][:_TENSORS]

    def _contexts(self, others: int) -> list[int]:
        """Parts of a sequence; small ones only where there are more devices than sequences, or groups."""
        space = self._space
        groups = space.replicate * space.fsdp if space.replicate and space.fsdp else self._sequences
        return context_degrees(self._job.seq_len, self._cluster.devices // others > groups)


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
