"""Check that a run fits the memory of its devices, by the planner's memory model, before anything is allocated.

No torch. On a CPU the processes of a host share its memory; on an accelerator each device has its own. The model is of
the torch-native step (docs/planner-accuracy-product.md says how close it is); for XLA `rehearse` asks the compiler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.errors import HardwareError
from orchestrator.hardware import host
from orchestrator.hardware.target import Target
from orchestrator.models.shapes import trained_share
from orchestrator.planner.estimate.optimizer_memory import optimizer_kind
from orchestrator.planner.estimate.own_memory import native_memory
from orchestrator.planner.evidence.calibration import Calibration
from orchestrator.planner.spec import JobSpec, MemoryEstimate, ModelShape, ParallelPlan
from orchestrator.runs.messages import warn
from orchestrator.training.resolved import Resolved

_GIB = 2**30
_PROCESS_BYTES = 0.4 * _GIB  # torch and the product, imported
_BYTES_PER_PARAMETER = 16  # weight, gradient and two moments in fp32
_BYTES_OF_A_SAVE = 12  # weight and two moments, kept in host memory until they are written
_REMATS: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Fit:
    """What a run needs of the memory that counts: of a host's, on a CPU, or of one device's.

    Attributes:
        needs: bytes.
        has: bytes.
        where: whose memory it is, in words.
        estimate: of one process.
    """

    needs: float
    has: float
    where: str
    estimate: MemoryEstimate

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.needs <= self.has


def check_memory(resolved: Resolved, target: Target, local: int) -> None:
    """Refuse a run that cannot fit the memory of this host or of its devices.

    Args:
        resolved: the run.
        target: that it runs on.
        local: processes of the job on this host.

    Raises:
        HardwareError: it needs more than there is; names what would fit.
    """
    config = resolved.config
    if target.strategy != "dtensor" or not config.hardware.check_memory:
        return
    if config.model._target_ is not None:
        warn("memory is not checked: what a model of your own needs is unknown")
        return
    fit = _fit(resolved, target, local)
    if fit is None or fit.fits:
        return
    parts = fit.estimate
    said = ", ".join(
        f"{name} {size / _GIB:,.1f}"
        for name, size in (
            ("weights", parts.parameters),
            ("gradients", parts.gradients),
            ("optimizer state", parts.optimizer),
            ("activations and logits", parts.activations + parts.logits),
        )
    )
    raise HardwareError(
        f"the run does not fit the memory of {fit.where}",
        got=f"needs about {fit.needs / _GIB:,.1f} GiB, has {fit.has / _GIB:,.1f} GiB (GiB per process: {said})",
        fix=f"{_remedy(resolved, target, local, fit)}; to try it all the same: hardware.check_memory=false",
    )


def _fit(resolved: Resolved, target: Target, local: int) -> Fit | None:
    """Return the memory that the run needs; None where that of the devices is not known."""
    estimate = _estimate(resolved, target)
    if target.name != "cpu":
        capacity = target.probe().device_memory_bytes
        return None if capacity is None else Fit(estimate.total, capacity, f"each {target.name} device", estimate)
    # An asynchronous save keeps a copy of weights and optimizer state until it is written.
    train = resolved.config.train
    saved = estimate.parameters / (1 + train.preference.holds_copy(train.lora)) + estimate.optimizer
    copy = saved if resolved.config.checkpoint.asynchronous else 0.0
    has = min(host.ram_bytes(), host.address_space_bytes() or math.inf)
    return Fit(local * (estimate.total + copy), has, f"this machine, for {local} processes", estimate)


def _estimate(resolved: Resolved, target: Target) -> MemoryEstimate:
    config, layout, train = resolved.config, resolved.layout, resolved.config.train
    share = train.global_batch_tokens // train.seq_len // layout.data_parallel
    plan = ParallelPlan(
        replicate=layout.replicate,
        fsdp=layout.fsdp,
        context=layout.context,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        expert=layout.expert,
        virtual_stages=layout.virtual_stages,
        schedule=layout.schedule,
        context_kind=layout.context_kind,
        micro_batch=max(1, min(share, resolved.micro_batch)),
        remat=resolved.remat,
        reduce_gradients=train.reduce_gradients,
        compiled=config.hardware.compile,
    )
    job = JobSpec(
        ModelShape.of(config.model),
        train.seq_len,
        train.global_batch_tokens,
        precision="fp32" if resolved.precision == "fp32" else "bf16",
        stack="orchestrator",
        loss_chunk_tokens=train.loss_chunk_tokens,
        document_mask=config.data.document_mask,
        optimizer=optimizer_kind(config.optim),
        trained=trained_share(config.model, config.train.lora),
        average=train.ema.decay is not None,
        frozen_copy=train.preference.holds_copy(train.lora),
    )
    overhead = _PROCESS_BYTES if target.name == "cpu" else Calibration("", "").context_bytes
    constants = Calibration("orchestrator", target.name, eager_kept=2.0, fused_norms=True, context_bytes=overhead)
    return native_memory(job, plan, constants, None)


def _remedy(resolved: Resolved, target: Target, local: int, fit: Fit) -> str:
    """Return the first change that fits, from the cheapest on; else how large a model may be here."""
    config, layout = resolved.config, resolved.layout
    for remat in _REMATS:
        for size in (config.train.micro_batch_size, 1):
            tried = replace(config, train=replace(config.train, remat=remat, micro_batch_size=size))
            found = _fit(replace(resolved, config=tried), target, local)
            if found is not None and found.fits:
                words = [f"train.micro_batch_size={size}"] if size != config.train.micro_batch_size else []
                words += [f"train.remat={remat}"] if remat != config.train.remat else []
                return f"fits with {' '.join(words)}"
    share = layout.replicate / layout.devices
    copies = local * share if target.name == "cpu" else share
    per_parameter = _BYTES_PER_PARAMETER + (_BYTES_OF_A_SAVE if target.name == "cpu" else 0)
    most = fit.has / per_parameter / copies / 1e9
    more = "" if target.name == "cpu" else "more devices with a larger layout.fsdp, or "
    return f"take {more}a model of fewer than {most:,.1f}B parameters"
