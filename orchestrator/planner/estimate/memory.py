"""Bytes per device at the peak of a step, from the shapes alone.

Activations follow Korthikanti et al. (2205.05198), with what today's decoders keep: no dropout, gated
feed-forward blocks, grouped keys, and flash attention, which keeps no scores. Sharded states follow Rajbhandari et
al. (1910.02054). In a pipeline the first stages hold the most micro-batches and the last holds the logits, so both
ends are looked at and the fuller one is the answer.
"""

from __future__ import annotations

import math

from orchestrator.planner.estimate.own_memory import covers, native_memory
from orchestrator.planner.estimate.time import stage_elements
from orchestrator.planner.estimate.work import layer_elements, sparse_layers
from orchestrator.planner.evidence.calibration import Calibration, calibration
from orchestrator.planner.spec import Cluster, JobSpec, MemoryEstimate, ModelShape, ParallelPlan

KEPT_SCORE_BYTES = {"flash": 0, "flash1": 0, "fused": 5, "eager": 11}
"""Bytes per score that attention keeps for backward: 5 for softmax's result and dropout's mask and result (2205.05198),
6 more for the masked scores and softmax's fp32 copy where nothing fuses them."""


def estimate_memory(job: JobSpec, cluster: Cluster, plan: ParallelPlan) -> MemoryEstimate:
    """Estimate what the fullest device needs at the peak of a step.

    Args:
        job: model, batch and precision.
        cluster: chips and links.
        plan: the layout and its settings.
    """
    return step_memory(job, cluster, plan, calibration(cluster.chip, job.stack))


def step_memory(job: JobSpec, cluster: Cluster, plan: ParallelPlan, constants: Calibration) -> MemoryEstimate:
    """Estimate memory as `estimate_memory`, with the constants given.

    Args:
        job: model, batch and precision.
        cluster: chips and links.
        plan: the layout and its settings.
        constants: of the software stack.
    """
    if constants.own and covers(job, plan):
        return native_memory(job, plan, constants, device_capacity(cluster))
    ends = {0, plan.pipeline - 1}
    estimates = [_stage(job, cluster, plan, constants, stage) for stage in sorted(ends)]
    return max(estimates, key=lambda estimate: estimate.total)


def device_capacity(cluster: Cluster) -> float | None:
    """Return the bytes that a program may use of one device: as the runtime reports, else the catalogue's memory.

    Args:
        cluster: chips and links.
    """
    chip = cluster.chip
    known = chip.hbm_runtime_bytes.value or chip.hbm_bytes.value
    return None if known is None else known / chip.logical_devices_per_chip


def layer_bytes(job: JobSpec, plan: ParallelPlan, tokens: float, sparse: bool) -> float:
    """Return the bytes of activations that one layer keeps for its backward pass without recomputation.

    Per token, in elements: inputs and results of two norms (4 d), queries and attention's result (2 h),
    keys and values, and of a gated block the two products, the activation and their product (4 f; 2 f ungated).

    Args:
        job: model, batch and precision.
        plan: the layout and its settings.
        tokens: of the micro-batch on one device.
        sparse: whether the layer has routed experts.
    """
    shape, split = job.model, plan.tensor if plan.sequence_parallel else 1
    width = shape.width(sparse)
    elements = 4 * shape.dim / split
    if sparse:
        elements += 2 * shape.experts_per_token * shape.dim / split
    elements += _attention_elements(shape) / plan.tensor
    elements += _activation_elements(shape, plan) * width / plan.tensor
    scores = KEPT_SCORE_BYTES[plan.attention] * job.seq_len * shape.heads / plan.tensor
    return tokens * (job.element_bytes * elements + scores)


def kept_bytes(job: JobSpec, plan: ParallelPlan, tokens: float, sparse: bool, constants: Calibration) -> float:
    """Return the bytes that one layer keeps of one micro-batch between forward and backward, under the plan's remat.

    Args:
        job: model, batch and precision.
        plan: the layout and its settings.
        tokens: of the micro-batch on one device.
        sparse: whether the layer has routed experts.
        constants: of the software stack.
    """
    shape, split = job.model, plan.tensor if plan.sequence_parallel else 1
    if plan.remat == "full":
        return job.element_bytes * tokens * shape.dim / split
    if plan.remat == "offload":
        return 0.0
    everything = _whole_layer(job, plan, tokens, sparse, constants)
    if plan.remat == "none":
        return everything
    if constants.selective_kept is not None:
        return everything * constants.selective_kept
    width = shape.width(sparse)
    products = 2 * shape.dim / split + _attention_elements(shape) / plan.tensor
    products += ((2 if shape.gated else 1) * width / plan.tensor) + shape.dim / split
    return job.element_bytes * tokens * products


def _whole_layer(job: JobSpec, plan: ParallelPlan, tokens: float, sparse: bool, constants: Calibration) -> float:
    size = constants.kept * layer_bytes(job, plan, tokens, sparse)
    if constants.keeps_gathered and plan.sequence_parallel:
        size += constants.kept * job.element_bytes * 2 * tokens * job.model.dim * (1 - 1 / plan.tensor)
    if not plan.compiled:
        split = plan.tensor if plan.sequence_parallel else 1
        size += constants.eager_kept * job.element_bytes * tokens * job.model.dim / split
    return size


def _attention_elements(shape: ModelShape) -> float:
    if shape.latent_kv:
        wide = shape.heads * (3 * shape.head_dim + 2 * shape.rope_dim)
        return wide + shape.heads * shape.head_dim + shape.latent_q + shape.latent_kv
    return 2 * (shape.heads + shape.kv_heads) * shape.head_dim


def _activation_elements(shape: ModelShape, plan: ParallelPlan) -> int:
    if shape.gated:
        return 3 if plan.compiled else 4
    return 2


def _stage(job: JobSpec, cluster: Cluster, plan: ParallelPlan, constants: Calibration, stage: int) -> MemoryEstimate:
    shape, stages = job.model, plan.pipeline
    layers = math.ceil(shape.layers / stages)
    first, last = stage == 0, stage == stages - 1
    ends = float(first) + float(last) if not shape.tied else float(first or last)
    dense, experts = stage_elements(job, plan, layers, ends)
    weights = _sharded(dense, experts, plan, plan.zero >= 3)
    # The stages of a pipeline sum whole gradients anyway: see `_buffers`.
    split = plan.zero >= 2 and not (plan.pipeline == 1 and plan.keeps_whole_gradients(job))
    gradients = _sharded(dense, experts, plan, split)
    moments = _sharded(dense, experts, plan, plan.zero >= 1)
    tokens = plan.micro_batch * job.seq_len / plan.context
    kept, working = _activations(job, plan, constants, tokens, layers, stage)
    logits = 0.0
    if last:
        chunk = job.loss_chunk_tokens or constants.loss_chunk
        alive = min(tokens, chunk) if chunk else tokens
        words = shape.vocab / plan.tensor
        words += shape.vocab if constants.logits_gathered and plan.tensor > 1 else 0
        logits = constants.logit_bytes * alive * words
        if chunk:  # the head's gradient is summed in fp32 while the chunks go by
            logits += 4.0 * words * shape.dim
    summed = constants.gradient_bytes * gradients * job.trained
    if not constants.gradients_stay and plan.micro_batches(job) == 1:
        # At the end of backward they are all there, when what was kept is not any more.
        summed = max(0.0, summed - kept - logits)
    # When a layer is at work backward, the logits are gone; when they are there, no layer is at work.
    working = max(0.0, working - logits)
    return MemoryEstimate(
        parameters=constants.weight_bytes * weights,
        gradients=summed,
        optimizer=(constants.optimizer_bytes + 4.0 * job.average) * moments * job.trained,
        activations=kept + working,
        logits=logits,
        communication=_buffers(job, plan, tokens, ends, dense + experts),
        overhead=constants.context_bytes + constants.fragmentation * (kept + working + logits),
        capacity=device_capacity(cluster),
    )


def _sharded(dense: float, experts: float, plan: ParallelPlan, split: bool) -> float:
    return dense / plan.shards + experts / plan.expert_shards if split else dense + experts


def _activations(
    job: JobSpec, plan: ParallelPlan, constants: Calibration, tokens: float, layers: int, stage: int
) -> tuple[float, float]:
    """Kept of the micro-batches in flight, and what the one layer needs that is at work."""
    shape = job.model
    sparse = sparse_layers(shape)
    kinds = [(sparse / shape.layers, True)] * bool(sparse) + [(1 - sparse / shape.layers, False)]
    per_layer = sum(share * kept_bytes(job, plan, tokens, kind, constants) for share, kind in kinds if share)
    kind, split = bool(sparse), plan.tensor if plan.sequence_parallel else 1
    # One layer's own while it is computed again, and the gradients of its widest tensors.
    working = _whole_layer(job, plan, tokens, kind, constants) if plan.remat != "none" else 0.0
    if plan.remat == "selective":
        working = max(0.0, working - kept_bytes(job, plan, tokens, kind, constants))
    width = shape.width(kind)
    passing = (3 if shape.gated else 2) * width / plan.tensor + 2 * shape.dim / split
    if stage == plan.pipeline - 1:
        passing += 2 * shape.dim / split  # around the last norm
    in_flight = _in_flight(plan, plan.micro_batches(job) or plan.pipeline, stage, constants.extra_in_flight)
    return in_flight * layers * per_layer, working + job.element_bytes * tokens * passing


def _in_flight(plan: ParallelPlan, micro_batches: int, stage: int, extra: int) -> float:
    """Micro-batches whose activations a stage holds: p - i under 1F1B, more when chunks interleave (2205.05198)."""
    stages = plan.pipeline
    if stages == 1:
        return 1.0
    if plan.virtual_stages == 1:
        return float(min(micro_batches, stages - stage + extra))
    warm = (stages - stage - 1) * 2 + (plan.virtual_stages - 1) * stages + 1
    return min(float(micro_batches), warm / plan.virtual_stages)


def _buffers(job: JobSpec, plan: ParallelPlan, tokens: float, ends: float, elements: float) -> float:
    """Return the bytes of buffers that collectives need.

    Under ZeRO 3: two gathered layers, one layer's gradients before and after their cast to fp32, and a matrix of the
    vocabulary, which stays gathered from its use forward to the one backward. The stages of a pipeline keep all their
    gathered weights, and their gradients in fp32, until the step's end. Then the gathered sequence.
    """
    shape, width = job.model, job.element_bytes
    size = 0.0
    if plan.shards > 1 and plan.zero == 3 and plan.pipeline > 1:
        size += (width + 4) * elements
    elif plan.shards > 1 and plan.zero == 3:
        kind = layer_elements(shape, bool(shape.experts))
        layer = (kind.attention + kind.mlp) / plan.tensor + kind.experts / plan.tensor / plan.expert
        size += (2 * width + width + 4) * layer
        size += width * shape.vocab * shape.dim / plan.tensor if ends else 0.0
    if plan.tensor > 1 and plan.sequence_parallel:
        size += 2 * width * tokens * shape.dim
    if plan.context > 1:
        size += 2 * width * plan.micro_batch * job.seq_len * 2 * shape.kv_heads * shape.head_dim / plan.tensor
    return size
