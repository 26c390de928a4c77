"""Choose the layout of a run whose degrees are open: planned where the chip is known, else by a rule. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.chips.load import load_catalogue
from orchestrator.config.batch_sizes import BatchSizes
from orchestrator.config.schema import ContextKind, LayoutConfig, RunConfig, Schedule
from orchestrator.hardware.fp8_support import check_fp8
from orchestrator.hardware.target import Target
from orchestrator.models.shapes import trained_share
from orchestrator.planner.degrees import CONTEXT_KINDS, SCHEDULES
from orchestrator.planner.estimate.optimizer_memory import optimizer_kind
from orchestrator.planner.explain import bound, layout_text
from orchestrator.planner.search import REMATS, Batch, Candidate, Space, search
from orchestrator.planner.spec import Cluster, JobSpec, ModelShape, ParallelPlan
from orchestrator.sharding.axes import MESH_AXES
from orchestrator.sharding.layout import VIRTUAL_STAGES, Layout, check_layout, resolve_layout
from orchestrator.sharding.pipeline import check_pipeline

# An automatic vocabulary is known when the data is, which is prepared after the plan: for that this one will do.
_NOMINAL_VOCABULARY = 32768


@dataclass(frozen=True)
class Settled:
    """What a run takes of a plan.

    Attributes:
        layout: the configuration's, with its open degrees filled in where they were planned.
        micro_batch: `train.micro_batch_size`, filled in likewise.
        remat: `train.remat`, filled in likewise.
        why: one line; empty where nothing was planned.
    """

    layout: LayoutConfig
    micro_batch: int | Literal["auto"]
    remat: Literal["none", "selective", "full"]
    why: str = ""


def settle_layout(config: RunConfig, target: Target, devices: int) -> Settled:
    """Plan the degrees that are `auto`, if there is a choice and the chip is in the catalogue.

    With one open degree there is nothing to choose; on an unknown chip, on a CPU and in a rehearsal `resolve_layout`
    fills them by its rule. The answer depends on the configuration, the chip and the number of devices alone: every
    process that an engine has started comes to the same one, once.

    Args:
        config: of the run.
        target: the hardware.
        devices: of the job.
    """
    train = config.train
    kept = Settled(config.layout, train.micro_batch_size, "none" if train.remat == "auto" else train.remat)
    fixed = _fixed(config, target)
    key = config.hardware.chip if config.hardware.chip != "auto" else target.probe().chip
    if len(fixed) > len(MESH_AXES) - 2 or key is None or target.name == "cpu" or config.hardware.simulate:
        return kept
    if config.model._target_ is not None:
        return replace(kept, why="not planned: what a model of your own needs is unknown; the plain rule fills it in")
    chip = load_catalogue().get(key)
    chips, rest = divmod(devices, chip.logical_devices_per_chip)
    slices = target.slices()
    if rest or chips % slices:
        return kept
    cluster = Cluster(chip, chips, domain_chips=chips // slices if slices > 1 else None)
    best = _best(config, cluster, _space(config, target, fixed, slices), devices)
    if best is None:
        return replace(kept, why=f"no layout is predicted to fit {devices} x {key}; the plain rule takes over")
    plan = best.plan
    layout = _layout(config, plan)
    why = f"planned for {devices} x {key}: {layout_text(plan)}; {bound(best, cluster)}"
    assert plan.remat != "offload", "the search has no such choice"
    return Settled(layout, plan.micro_batch, plan.remat, why)


def _fixed(config: RunConfig, target: Target) -> dict[str, int]:
    """Return the degrees that are no choice: set, or of an axis that the model or the strategy has no use for."""
    layout = config.layout
    fixed = {axis: degree for axis in MESH_AXES if (degree := getattr(layout, axis)) != "auto"}
    if not config.model.moe.experts:
        fixed.setdefault("expert", 1)
    if target.strategy == "xla":
        fixed.setdefault("pipeline", 1)
    return fixed


def _space(config: RunConfig, target: Target, fixed: Mapping[str, int], slices: int) -> Space:
    train, layout = config.train, config.layout
    kinds: tuple[ContextKind, ...] = CONTEXT_KINDS if layout.context_kind == "auto" else (layout.context_kind,)
    if target.strategy == "xla" and layout.context_kind == "auto":
        kinds = ("gather",)
    return Space(
        **fixed,
        micro_batch=None if train.micro_batch_size == "auto" else train.micro_batch_size,
        remats=REMATS if train.remat == "auto" else (train.remat,),
        zeros=(3,),
        whole=True,
        even=True,
        schedules=schedules_for(config) if layout.schedule == "auto" else (layout.schedule,),
        context_kinds=kinds,
        compiled=config.hardware.compile,
        copies=slices,
        reduce_gradients=train.reduce_gradients,
    )


def schedules_for(config: RunConfig) -> tuple[Schedule, ...]:
    """Return the schedules that a run may be planned with.

    Args:
        config: of the run.
    """
    drops = config.model.dropout > 0 or config.train.lora.dropout > 0
    if config.train.preference.loss is None or not drops:
        return SCHEDULES
    # Both passes of a step have to draw the same masks, which several stages of a rank do not.
    return tuple(one for one in SCHEDULES if VIRTUAL_STAGES[one] == 1)


def _job(config: RunConfig) -> JobSpec:
    train = config.train
    given = config.hardware.precision
    precision: Literal["fp32", "bf16", "fp8"] = "bf16" if given == "auto" else given
    return JobSpec(
        ModelShape.of(config.model, _NOMINAL_VOCABULARY),
        train.seq_len,
        0,
        precision=precision,
        stack="orchestrator",
        loss_chunk_tokens=train.loss_chunk_tokens,
        document_mask=config.data.document_mask,
        optimizer=optimizer_kind(config.optim),
        trained=trained_share(config.model, config.train.lora),
        average=train.ema.decay is not None,
        frozen_copy=train.preference.holds_copy(train.lora),
    )


def precision_of(config: RunConfig, target: Target) -> str:
    """Return the precision of the matrix products: the configured one, else what suits the target's devices.

    Args:
        config: of the run.
        target: the hardware.

    Raises:
        HardwareError: fp8 is asked for, and the devices do not have it.
        MissingExtraError: so is torchao.
    """
    chosen = config.hardware.precision
    if chosen == "fp8":
        check_fp8(target, config.hardware.fp8.recipe)
    return target.default_precision(target.probe()) if chosen == "auto" else chosen


def _layout(config: RunConfig, plan: ParallelPlan) -> LayoutConfig:
    degrees = {axis: getattr(plan, axis) for axis in MESH_AXES}
    return replace(config.layout, **degrees, schedule=plan.schedule, context_kind=plan.context_kind)


def _best(config: RunConfig, cluster: Cluster, space: Space, devices: int) -> Candidate | None:
    """Return the fastest layout that a run accepts: sizes that differ from layer to layer are no part of a shape."""
    sizes = BatchSizes.of(config.train)
    # What is best for the whole batch may not divide a smaller one, from which the batch grows.
    for searched in dict.fromkeys((sizes.last, min(sizes.all))):
        for candidate in search(_job(config), cluster, Batch(searched), space, domains=space.copies).ranked:
            layout = resolve_layout(_layout(config, candidate.plan), devices)
            if all(_accepts(config, layout, candidate.plan, tokens) for tokens in sizes.all):
                return candidate
    return None


def _accepts(config: RunConfig, layout: Layout, plan: ParallelPlan, tokens: int) -> bool:
    """Whether a step of so many tokens, such as one while the batch warms up, can be divided so."""
    length = config.train.seq_len
    share = max(1, tokens // length // layout.data_parallel)
    return not check_layout(layout, config.model, length, tokens) and not check_pipeline(
        layout, config.model, share, plan.micro_batch, config.hardware.compile, plan.remat
    )
