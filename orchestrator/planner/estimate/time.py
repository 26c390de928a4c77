"""Seconds of one optimizer step, from the shapes alone.

Each matrix product and each attention is a roofline: its operations at the achievable rate, then the bytes that
it cannot hide. What lies between them is bound by the memory's bandwidth. Collectives come from `links`; what
computation hides of them is a constant of the stack. Pipelines: 1F1B and interleaved stages wait (p-1)/v
micro-batches (Narayanan et al. 2104.04473), those of a zero bubble and of DualPipeV part of that (`_waiting`);
sequence parallelism splits each all-reduce into a scatter and a gather
(Korthikanti et al. 2205.05198); ZeRO's traffic is that of Rajbhandari et al. 1910.02054.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.errors import ConfigError
from orchestrator.planner.estimate.links import Ring, ring
from orchestrator.planner.estimate.stages import busiest_rank
from orchestrator.planner.estimate.work import (
    Product,
    layer_elements,
    layer_products,
    mean_attended,
    score_width,
    sparse_layers,
)
from orchestrator.planner.evidence.calibration import Calibration, calibration
from orchestrator.planner.spec import Cluster, JobSpec, ParallelPlan, TimeEstimate

SCORE_BYTES = {"flash": 0, "flash1": 0, "fused": 22, "eager": 50}
"""Bytes per score that attention moves forward and backward where the scores exist: each step of masking, softmax
and dropout reads and writes them."""
FLASH_1 = 0.55
"""Speed of the first flash attention, relative to the second's (Dao 2023: about half)."""


@dataclass(frozen=True)
class Rates:
    """The rates of one device, per second.

    Attributes:
        products: FLOP/s of matrix products in the job's precision; `wide` in bf16 (head, attention).
        attention: FLOP/s of attention's products.
        memory: bytes/s.
        unknown: figures that the catalogue lacks.
        estimated: those of them that the vendor's constants stand for.
    """

    products: float
    wide: float
    attention: float
    memory: float
    unknown: tuple[str, ...]
    estimated: tuple[str, ...]


@dataclass(frozen=True)
class Rings:
    """The group of devices of each mesh axis, with the links between them."""

    tensor: Ring
    context: Ring
    expert: Ring
    fsdp: Ring
    replicate: Ring
    pipeline: Ring

    @property
    def unknown(self) -> tuple[str, ...]:
        """The links of any group that have no figure, each once."""
        found = [group.unknown for group in vars(self).values() if group.unknown]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Cost:
    """Seconds of a layer, or of the head, for one micro-batch forward and backward.

    Attributes:
        compute: matrix products and attention.
        memory: kernels limited by the memory's bandwidth.
        tensor: communication of the tensor axis.
        context: communication of the context axis.
        expert: communication of the expert axis.
    """

    compute: float
    memory: float
    tensor: float
    context: float
    expert: float

    def plus(self, other: Cost, weight: float = 1.0) -> Cost:
        """Return the sum with `weight` times `other`."""
        return Cost(
            self.compute + weight * other.compute,
            self.memory + weight * other.memory,
            self.tensor + weight * other.tensor,
            self.context + weight * other.context,
            self.expert + weight * other.expert,
        )

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.compute + self.memory + self.tensor + self.context + self.expert


def estimate_time(job: JobSpec, cluster: Cluster, plan: ParallelPlan) -> TimeEstimate:
    """Estimate how long one optimizer step takes, in parts that add up.

    Args:
        job: model, batch and precision.
        cluster: chips and links.
        plan: the layout and its settings.

    Raises:
        ConfigError: the batch does not divide over the plan, or the plan does not use the cluster's devices.
    """
    constants = calibration(cluster.chip, job.stack)
    return step_time(job, cluster, plan, constants)


def step_time(job: JobSpec, cluster: Cluster, plan: ParallelPlan, constants: Calibration) -> TimeEstimate:
    """Estimate time as `estimate_time`, with the constants given.

    Args:
        job: model, batch and precision.
        cluster: chips and links.
        plan: the layout and its settings.
        constants: of the software stack.
    """
    micro_batches = _check(job, cluster, plan)
    rates = device_rates(cluster, job.precision, constants)
    rings = plan_rings(cluster, plan, constants)
    shape, stages = job.model, plan.pipeline
    sparse = sparse_layers(shape)
    dense = _layer(job, plan, constants, rates, rings, False)
    layers = Cost(0, 0, 0, 0, 0).plus(dense, shape.layers - sparse)
    if sparse:
        layers = layers.plus(_layer(job, plan, constants, rates, rings, True), sparse)
    head = _head(job, plan, constants, rates, rings)
    busiest, has_head = _busiest_stage(job, plan, constants)
    stage = Cost(0, 0, 0, 0, 0).plus(layers, busiest / shape.layers).plus(head, 1.0 if has_head else 0.0)
    mean = layers.plus(head).total / stages
    fixed = micro_batches * busiest * constants.layer_seconds + constants.step_seconds
    bubble = (stages - 1) * _waiting(plan, constants) * (mean + busiest * constants.layer_seconds)
    fsdp, replicate = _data_parallel(job, plan, constants, rings, stage, busiest, micro_batches)
    update = _optimizer(job, plan, constants, rates)
    handed = plan.micro_batch * job.seq_len / plan.context * shape.dim * job.element_bytes
    handed /= plan.tensor if plan.sequence_parallel else 1
    pipeline = micro_batches * plan.virtual_stages * 2 * rings.pipeline.send(handed) * (1 - constants.pipeline_hidden)
    parts = {
        "compute": micro_batches * stage.compute,
        "memory_bound": micro_batches * stage.memory + update,
        "tensor": micro_batches * stage.tensor,
        "context": micro_batches * stage.context,
        "expert": micro_batches * stage.expert,
        "fsdp": fsdp,
        "replicate": replicate,
        "pipeline": pipeline,
        "bubble": bubble,
    }
    hosts = cluster.chips / (cluster.chip.topology.chips_per_host or 8)
    waiting = constants.straggler * math.log2(max(1.0, hosts)) * (sum(parts.values()) + fixed)
    return TimeEstimate(
        **parts, other=fixed + waiting, unknown=(*rates.unknown, *rings.unknown), estimated=rates.estimated
    )


def device_rates(cluster: Cluster, precision: str, constants: Calibration) -> Rates:
    """Return the achievable rates of one device; unknown peaks are named, and fp8's and fp32's then count as bf16's.

    Args:
        cluster: chips and links.
        precision: of the matrix products.
        constants: of the software stack.
    """
    chip, parts = cluster.chip, cluster.chip.logical_devices_per_chip
    unknown = [name for name in ("bf16_flops", "hbm_bandwidth") if not getattr(chip, name).known]
    estimated = []
    peak = math.inf if chip.bf16_flops.value is None else chip.bf16_flops.value
    share = constants.achievable
    if chip.achievable_bf16_flops.value is None:
        estimated.append("achievable_bf16_flops")
    elif math.isfinite(peak):
        share = chip.achievable_bf16_flops.value / peak
    products = wide = share * peak * constants.gemm * constants.sustained
    if precision == "fp8" and chip.fp8_flops.value is not None:
        if chip.achievable_fp8_flops.value is None:
            estimated.append("achievable_fp8_flops")
        rate = chip.achievable_fp8_flops.value or share * chip.fp8_flops.value
        products = rate * constants.gemm_fp8 * constants.sustained_fp8
    elif precision == "fp32" and chip.fp32_flops.value is not None:
        peak = chip.fp32_flops.value
        products = wide = constants.achievable * peak * constants.gemm
    elif precision != "bf16":
        unknown.append(f"{precision}_flops")
    attention = peak * constants.attention * constants.attention_scale
    memory = math.inf if chip.hbm_bandwidth.value is None else chip.hbm_bandwidth.value
    return Rates(products / parts, wide / parts, attention / parts, memory / parts, tuple(unknown), tuple(estimated))


def plan_rings(cluster: Cluster, plan: ParallelPlan, constants: Calibration) -> Rings:
    """Return the groups of the plan's axes, laid out as `sharding.axes.MESH_AXES`, the last one inside.

    Args:
        cluster: chips and links.
        plan: the layout and its settings.
        constants: of the software stack.
    """
    inner = plan.tensor * plan.context
    copy = inner * plan.expert * plan.fsdp
    return Rings(
        tensor=ring(cluster, constants, plan.tensor, 1),
        context=ring(cluster, constants, plan.context, plan.tensor),
        expert=ring(cluster, constants, plan.expert, inner),
        fsdp=ring(cluster, constants, plan.shards, plan.tensor),
        pipeline=ring(cluster, constants, plan.pipeline, copy),
        replicate=ring(cluster, constants, plan.replicate, copy * plan.pipeline),
    )


def fused_bytes(job: JobSpec, plan: ParallelPlan, tokens: float, sparse: bool) -> float:
    """Return the bytes that a layer's kernels between the products move forward and backward, fused.

    Per token, in elements: two norms with their residual sums move 8 d forward and 12 d backward; the
    rotation 4 per element of queries and keys; a gated activation 3 f and 6 f, another 2 f and 3 f; sending tokens
    to experts and back 8 d for each expert of a token.

    Args:
        job: model, batch and precision.
        plan: the layout and its settings.
        tokens: of the micro-batch on one device.
        sparse: whether the layer has routed experts.
    """
    shape, split = job.model, plan.tensor if plan.sequence_parallel else 1
    width = shape.width(sparse)
    moved = 20 * shape.dim / split
    if sparse:
        moved += 8 * shape.experts_per_token * shape.dim / split
    moved += 4 * (shape.heads + shape.kv_heads) * shape.head_dim / plan.tensor
    moved += (9 if shape.gated else 5) * width / plan.tensor
    return job.element_bytes * tokens * moved


def _check(job: JobSpec, cluster: Cluster, plan: ParallelPlan) -> int:
    if plan.devices != cluster.devices:
        raise ConfigError(
            "the plan's degrees do not multiply to the cluster's devices",
            got=plan.devices,
            allowed=str(cluster.devices),
        )
    micro_batches = plan.micro_batches(job)
    if not micro_batches:
        raise ConfigError(
            "the batch does not divide over the plan",
            got=f"{job.global_batch_tokens} tokens of sequences of {job.seq_len}",
            allowed=f"a multiple of {plan.data_parallel * plan.micro_batch} sequences",
        )
    return micro_batches


def _recomputed(plan: ParallelPlan, constants: Calibration) -> float:
    """Share of a layer's forward products that run a second time."""
    shares = {
        "none": 0.0,
        "selective": constants.selective_recompute,
        "full": 1.0,
        "offload": constants.offload_recompute,
    }
    return shares[plan.remat]


def _products_seconds(products: list[Product], rate: float, memory: float, traffic: float) -> float:
    flops = sum(product.flops for product in products)
    return flops / rate + traffic * sum(product.elements for product in products) / memory


def _layer(job: JobSpec, plan: ParallelPlan, constants: Calibration, rates: Rates, rings: Rings, sparse: bool) -> Cost:
    shape, again = job.model, _recomputed(plan, constants)
    tokens = plan.micro_batch * job.seq_len / plan.context
    products, grouped = layer_products(shape, tokens, plan.tensor, plan.expert, sparse)
    traffic = constants.gemm_traffic * job.element_bytes
    compute = _products_seconds(products, rates.products, rates.memory, traffic)
    compute += _products_seconds(grouped, rates.products * constants.expert_gemm, rates.memory, traffic)
    compute *= 3 + again
    scores = _attention_seconds(job, plan, constants, rates, tokens)
    unfused = 1.0 if plan.compiled else constants.eager
    forward_share = 0.35 if plan.remat != "none" else 0.0  # of the element-wise work, which runs again
    moved = fused_bytes(job, plan, tokens, sparse) * unfused * (1 + forward_share)
    moved += SCORE_BYTES[plan.attention] * tokens * job.seq_len * shape.heads / plan.tensor * (1 + forward_share)
    gathered = tokens * shape.dim * job.element_bytes
    passes = 8 + 4 * again
    tensor = passes * rings.tensor.gather(gathered) * (1 - constants.tensor_hidden)
    context = _context_seconds(job, plan, constants, rings, scores) if plan.context > 1 else 0.0
    expert = 0.0
    if sparse and plan.expert > 1:
        passes = 4 + 2 * again
        expert = passes * _exchange_seconds(job, plan, constants, rings, gathered) * (1 - constants.expert_hidden)
    cost = Cost(compute + scores, constants.elementwise * moved / rates.memory, tensor, context, expert)
    idle = constants.expert_seconds - cost.total if sparse else 0.0
    return cost if idle <= 0 else cost.plus(Cost(0, idle, 0, 0, 0))


def _exchange_seconds(job: JobSpec, plan: ParallelPlan, constants: Calibration, rings: Rings, gathered: float) -> float:
    """Return the seconds of one all-to-all of tokens.

    This product sends a row for each expert of a token, from every device of the tensor axis.
    """
    copies = job.model.experts_per_token
    if constants.own:
        return rings.expert.exchange(gathered * copies, 1)
    return rings.expert.exchange(gathered / (plan.tensor if plan.sequence_parallel else 1), copies)


def _context_seconds(job: JobSpec, plan: ParallelPlan, constants: Calibration, rings: Rings, scores: float) -> float:
    """Return the seconds of a layer's traffic between the parts of a sequence.

    Keys and values are gathered, and their gradients summed; or they travel on while attention works, which hides
    them; or queries, keys, values and results change places with heads.
    """
    shape, again = job.model, _recomputed(plan, constants)
    latent, tensor = bool(shape.latent_kv), plan.tensor
    keys = shape.latent_kv + shape.rope_dim if latent else 2 * shape.kv_heads * shape.head_dim / tensor
    sequence = plan.micro_batch * job.seq_len * job.element_bytes
    if plan.context_kind == "ulysses":
        moved = 2 * (shape.heads + shape.kv_heads) * shape.head_dim / tensor
        return (2 + again) * rings.context.gather(sequence / plan.context * moved)
    traffic = (3 + again) * rings.context.gather(sequence * keys)
    if plan.context_kind == "ring":
        return max(0.0, traffic - scores)
    return traffic * (1 - constants.context_hidden)


def _attention_seconds(job: JobSpec, plan: ParallelPlan, constants: Calibration, rates: Rates, tokens: float) -> float:
    """Return the seconds of the scores and their weighted sum.

    Backward takes 2.5 times as long as forward where flash attention computes the scores again (Dao 2023), twice as
    long where they were kept.
    """
    shape = job.model
    flash = plan.attention in ("flash", "flash1")
    # This product masks gathered keys, and computes all scores then.
    masked = constants.own and plan.context > 1 and plan.context_kind == "gather"
    seen = mean_attended(shape, job.seq_len, constants.causal and flash and not masked, constants.window_block)
    forward = 2 * tokens * seen * score_width(shape) / plan.tensor
    if not flash:
        again = 1.0 if plan.remat in ("full", "selective") else 0.0
        return forward * (3 + again) / rates.wide
    rate = rates.attention * min(1.0, shape.head_dim / 128) ** constants.narrow_heads
    rate *= FLASH_1 if plan.attention == "flash1" else 1.0
    return forward * (4.5 if plan.remat == "full" else 3.5) / rate


def _head(job: JobSpec, plan: ParallelPlan, constants: Calibration, rates: Rates, rings: Rings) -> Cost:
    """Logits and loss, with the lookup of the embedding."""
    shape = job.model
    tokens = plan.micro_batch * job.seq_len / plan.context
    columns = shape.vocab / plan.tensor
    product = Product(1, tokens, shape.dim, columns)
    compute = 3 * _products_seconds([product], rates.wide, rates.memory, constants.gemm_traffic * job.element_bytes)
    moved = tokens * (16 * (shape.vocab if constants.logits_gathered else columns) + 12 * shape.dim)
    tensor = 4 * rings.tensor.gather(tokens * shape.dim * job.element_bytes) * (1 - constants.tensor_hidden)
    return Cost(compute, constants.elementwise * moved / rates.memory, tensor, 0.0, 0.0)


def _waiting(plan: ParallelPlan, constants: Calibration) -> float:
    """Return the part of a stage's time for a micro-batch that each further stage makes the others wait.

    A backward pass takes two forward passes, one of them for the weights' gradients, and what is computed again. With
    F, B and W of a stage's, 1F1B waits F + B, and a zero bubble F + B - 2 W; the two half stages that a rank has in
    DualPipeV wait (F + B) + B - 3 W. Sources: Qi et al. 2401.10241, table 2; DeepSeek's repository DualPipe, README.
    """
    again = _recomputed(plan, constants)
    if plan.schedule == "zero_bubble":
        return (1 + again) / (3 + again)
    if plan.schedule == "dualpipe_v":
        return (2 + 2 * again) / 2 / (3 + again)
    return 1 / plan.virtual_stages


def _busiest_stage(job: JobSpec, plan: ParallelPlan, constants: Calibration) -> tuple[float, bool]:
    """Layers of the stage that all wait for, and whether it has the head too.

    This product balances its stages. Elsewhere, where the layers divide evenly the last stage has the head on top;
    otherwise the ends count as layers, as in Llama 3's 126 layers on 16 stages.
    """
    layers, stages = job.model.layers, plan.pipeline
    if stages == 1:
        return layers, True
    if constants.own:
        return busiest_rank(job.model, job.seq_len, stages, plan.virtual_stages, plan.schedule)
    if layers % stages == 0:
        return layers / stages, True
    return (layers + 2) / stages if (layers + 2) % stages == 0 else math.ceil(layers / stages), False


def stage_elements(job: JobSpec, plan: ParallelPlan, layers: float, ends: float) -> tuple[float, float]:
    """Return the parameters of one stage on one device before a data-parallel axis splits them.

    Args:
        job: the training job.
        plan: the layout.
        layers: of the stage.
        ends: embeddings and heads of the stage, in matrices of vocabulary x dim.

    Returns:
        Those of dense layers, and those of routed experts.
    """
    shape = job.model
    sparse = sparse_layers(shape)
    with_experts, without = layer_elements(shape, True), layer_elements(shape, False)
    dense = 0.0
    for share, kind in ((sparse / shape.layers, with_experts), (1 - sparse / shape.layers, without)):
        dense += layers * share * ((kind.attention + kind.mlp) / plan.tensor + kind.router + kind.norms)
    dense += ends * shape.vocab * shape.dim / plan.tensor
    experts = layers * sparse / shape.layers * with_experts.experts / plan.tensor / plan.expert
    return dense, experts


def _data_parallel(
    job: JobSpec,
    plan: ParallelPlan,
    constants: Calibration,
    rings: Rings,
    stage: Cost,
    layers: float,
    micro_batches: int,
) -> tuple[float, float]:
    """Seconds of fsdp's and of the replicas' traffic that computation does not hide."""
    dense, experts = stage_elements(job, plan, layers, (1 if job.model.tied else 2) / plan.pipeline)
    elements = dense + experts
    busy = stage.compute + stage.memory
    reduced = constants.reduced_bytes
    fsdp = replicate = 0.0
    if plan.shards > 1:
        gather, scatter = rings.fsdp.gather(job.element_bytes * elements), rings.fsdp.gather(reduced * elements)
        # A pipeline's stages keep their gathered weights and sum their gradients until the step's end.
        rounds = micro_batches if plan.zero == 3 and plan.pipeline == 1 else 1
        round_trip = (2 if plan.zero == 3 else 1) * gather
        round_trip += 2 * max(layers - 1, 0) * rings.fsdp.hops  # a collective per layer, not one
        scatters = 1 if plan.reduce_gradients == "last" else rounds
        hidden = constants.fsdp_hidden * busy
        seen = scatters * max(0.0, round_trip + scatter - hidden) + (rounds - scatters) * max(0.0, round_trip - hidden)
        fsdp = max((round_trip + scatter) / (layers + 1), seen)
    if plan.replicate > 1:
        traffic = rings.replicate.reduce(reduced * elements / plan.shards)
        replicate = max(traffic / (layers + 1), traffic - constants.replicate_hidden * busy * 2 / 3)
    return fsdp, replicate


def _optimizer(job: JobSpec, plan: ParallelPlan, constants: Calibration, rates: Rates) -> float:
    """AdamW reads gradient, weight and two moments and writes three of them, in fp32, then a copy in bf16."""
    dense, experts = stage_elements(
        job, plan, job.model.layers / plan.pipeline, (1 if job.model.tied else 2) / plan.pipeline
    )
    owned = dense / plan.shards + experts / plan.expert_shards
    return constants.optimizer * 30 * owned / rates.memory
