"""Whether a run fits the memory of its devices, by the planner's memory model, before anything is made or loaded.

No torch. On a CPU the processes of a host share its memory; on an accelerator each device has its own. The model is of
the torch-native step (docs/planner-accuracy-product.md says how close it is); for XLA `rehearse` asks the compiler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.config.schema import RunConfig
from orchestrator.errors import HardwareError
from orchestrator.hardware import host
from orchestrator.hardware.target import Target
from orchestrator.planner.estimate.optimizer_memory import optimizer_kind
from orchestrator.planner.estimate.own_memory import native_memory
from orchestrator.planner.evidence.calibration import Calibration
from orchestrator.planner.spec import JobSpec, MemoryEstimate, ModelShape, ParallelPlan
from orchestrator.runs.messages import warn
from orchestrator.sharding.layout import Layout, resolve_layout
from orchestrator.training.layout_choice import precision_of, settle_layout

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
        return self.needs <= self.has


def check_memory(config: RunConfig, target: Target, devices: int, local: int, vocab_size: int) -> None:
    """Refuse a run that cannot fit the memory of this host or of its devices.

    Args:
        devices: of the job.
        local: processes of the job on this host.
        vocab_size: tokens of the tokenizer, for a model whose vocabulary follows it.

    Raises:
        HardwareError: it needs more than there is; names what would fit.
    """
    if target.strategy != "dtensor" or not config.hardware.check_memory:
        return
    if config.model._target_ is not None:
        warn("memory is not checked: what a model of your own needs is unknown")
        return
    fit = _fit(config, target, devices, local, vocab_size)
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
        fix=f"{_remedy(config, target, devices, local, vocab_size, fit)}; to try it all the same: "
        "hardware.check_memory=false",
    )


def _fit(config: RunConfig, target: Target, devices: int, local: int, vocab_size: int) -> Fit | None:
    """The memory that the run needs; None where that of the devices is not known."""
    layout = resolve_layout(config.layout, devices)
    estimate = _estimate(config, target, layout, vocab_size)
    if target.name != "cpu":
        capacity = target.probe().device_memory_bytes
        return None if capacity is None else Fit(estimate.total, capacity, f"each {target.name} device", estimate)
    # An asynchronous save keeps a copy of weights and optimizer state until it is written.
    copy = estimate.parameters + estimate.optimizer if config.checkpoint.asynchronous else 0.0
    has = min(host.ram_bytes(), host.address_space_bytes() or math.inf)
    return Fit(local * (estimate.total + copy), has, f"this machine, for {local} processes", estimate)


def _estimate(config: RunConfig, target: Target, layout: Layout, vocab_size: int) -> MemoryEstimate:
    train = config.train
    settled = settle_layout(config, target, layout.devices)
    share = train.global_batch_tokens // train.seq_len // layout.data_parallel
    micro_batch = share if settled.micro_batch == "auto" else min(share, settled.micro_batch)
    plan = ParallelPlan(
        replicate=layout.replicate,
        fsdp=layout.fsdp,
        context=layout.context,
        tensor=layout.tensor,
        micro_batch=max(1, micro_batch),
        remat=settled.remat,
        reduce_gradients=train.reduce_gradients,
        compiled=config.hardware.compile,
    )
    job = JobSpec(
        ModelShape.of(config.model, -(-vocab_size // 128) * 128),
        train.seq_len,
        train.global_batch_tokens,
        precision="fp32" if precision_of(config, target) == "fp32" else "bf16",
        stack="orchestrator",
        loss_chunk_tokens=train.loss_chunk_tokens,
        document_mask=config.data.document_mask,
        optimizer=optimizer_kind(config.optim),
    )
    overhead = _PROCESS_BYTES if target.name == "cpu" else Calibration("", "").context_bytes
    constants = Calibration("orchestrator", target.name, eager_kept=2.0, fused_norms=True, context_bytes=overhead)
    return native_memory(job, plan, constants, None)


def _remedy(config: RunConfig, target: Target, devices: int, local: int, vocab_size: int, fit: Fit) -> str:
    """The first change that fits, from the cheapest on; else how large a model may be here."""
    for remat in _REMATS:
        for size in (config.train.micro_batch_size, 1):
            tried = replace(config, train=replace(config.train, remat=remat, micro_batch_size=size))
            found = _fit(tried, target, devices, local, vocab_size)
            if found is not None and found.fits:
                words = [f"train.micro_batch_size={size}"] if size != config.train.micro_batch_size else []
                words += [f"train.remat={remat}"] if remat != config.train.remat else []
                return f"fits with {' '.join(words)}"
    layout = resolve_layout(config.layout, devices)
    copies = local / (devices / layout.replicate) if target.name == "cpu" else layout.replicate / devices
    per_parameter = _BYTES_PER_PARAMETER + (_BYTES_OF_A_SAVE if target.name == "cpu" else 0)
    most = fit.has / per_parameter / copies / 1e9
    more = "" if target.name == "cpu" else "more devices with a larger layout.fsdp, or "
    return f"take {more}a model of fewer than {most:,.1f}B parameters"
