"""Memory of the optimizers: state per parameter, and what an update allocates. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.schema import AdamWConfig, OptimConfig, OwnOptimConfig, SGDConfig
from orchestrator.planner.estimate.work import layer_elements, sparse_layers
from orchestrator.planner.spec import JobSpec, ModelShape, ParallelPlan

FP32 = 4
PLAIN_SGD = "sgd without momentum"
ADAMW_BF16, ADAMW_INT8 = "adamw bf16", "adamw int8"
# 8-bit codes have a scale in fp32 for each 64.
_COMPACT = {ADAMW_BF16: 2 * 2 / FP32, ADAMW_INT8: 2 * (1 + FP32 / 64) / FP32}
_LEAST = {"muon": 1.0, "adafactor": 0.0, "sgd": 1.0, PLAIN_SGD: 0.0, **_COMPACT}
_STRETCH, _STRETCH_BYTES = 1 << 22, 64  # elements that are updated at one time, and what exists for each meanwhile
_AT_ONE_TIME = 8  # matrices of the largest size, while it is gathered, iterated and handed back
_TEMPORARIES = 3  # parts of the largest size, while a part is updated without a fused kernel


def optimizer_kind(config: OptimConfig) -> str:
    """Return what `JobSpec.optimizer` says of a configuration. Of a user's own it is not known: it counts as AdamW.

    Args:
        config: of the optimizer.
    """
    if isinstance(config, OwnOptimConfig):
        return "adamw"
    if isinstance(config, AdamWConfig) and config.state_dtype != "fp32":
        return {"bf16": ADAMW_BF16, "int8": ADAMW_INT8}[config.state_dtype]
    return PLAIN_SGD if isinstance(config, SGDConfig) and not config.momentum else config.name


def least_moments(job: JobSpec) -> float:
    """Return what is kept of each parameter at least, in moments of its size: AdamW keeps 2.

    Args:
        job: model, batch and precision.
    """
    return _LEAST.get(job.optimizer, 2.0)


def optimizer_elements(job: JobSpec, plan: ParallelPlan, owned: float) -> float:
    """Return the numbers that one device keeps.

    Args:
        job: the work.
        plan: the layout.
        owned: parameters of this device.
    """
    shape = job.model
    if job.optimizer == "muon":
        sparse = sparse_layers(shape)
        matrices = sum(
            count * ((kind.attention + kind.mlp) / plan.shards + kind.experts / plan.expert / plan.expert_shards)
            for count, kind in (
                (shape.layers - sparse, layer_elements(shape, False)),
                (sparse, layer_elements(shape, True)),
            )
        )
        return 2 * owned - matrices / plan.tensor
    if job.optimizer == "adafactor":
        vectors = (shape.layers * layer_elements(shape, False).norms + shape.dim) / plan.shards
        return vectors + sum(count * (rows + columns) for count, rows, columns in _parts(shape, plan))
    return least_moments(job) * owned


def update_bytes(job: JobSpec, plan: ParallelPlan) -> float:
    """Return the bytes of what exists only while parameters are updated, without fused kernels.

    Args:
        job: model, batch and precision.
        plan: the layout and its settings.
    """
    if job.optimizer == "muon":
        whole = [rows * columns * plan.shards * plan.tensor for count, rows, columns in _blocks(job.model, plan)]
        return FP32 * _AT_ONE_TIME * max(whole)
    if job.optimizer == "adafactor":
        return FP32 * _TEMPORARIES * max(rows * columns for _, rows, columns in _parts(job.model, plan))
    if job.optimizer in _COMPACT:
        return _STRETCH_BYTES * min(_STRETCH, max(rows * columns for _, rows, columns in _parts(job.model, plan)))
    return 0.0


def _parts(shape: ModelShape, plan: ParallelPlan) -> Iterator[tuple[int, float, float]]:
    """Count, rows and columns of one device's part of every matrix."""
    yield from _blocks(shape, plan)
    yield from _experts(shape, plan)
    rows = shape.vocab / plan.shards / plan.tensor
    yield 1 if shape.tied else 2, rows, shape.dim
    if shape.learned_positions:
        yield 1, shape.learned_positions / plan.shards / plan.tensor, shape.dim


def _blocks(shape: ModelShape, plan: ParallelPlan) -> Iterator[tuple[int, float, float]]:
    """Yield the same of the blocks' matrices alone."""
    shards, tensor, layers = plan.shards, plan.tensor, shape.layers
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield layers, queries / shards / tensor, shape.dim
    yield 2 * layers, keys / shards / tensor, shape.dim
    yield layers, shape.dim / shards, queries / tensor
    sparse, gates = sparse_layers(shape), 2 if shape.gated else 1
    for count, width in ((layers - sparse, shape.mlp_dim), (sparse, shape.shared_width)):
        if count and width:
            yield gates * count, width / shards / tensor, shape.dim
            yield count, shape.dim / shards, width / tensor


def _experts(shape: ModelShape, plan: ParallelPlan) -> Iterator[tuple[int, float, float]]:
    """Yield the same of the experts' matrices, which are stacked."""
    count = sparse_layers(shape) * shape.experts // plan.expert
    if count:
        width, parts = shape.expert_dim / plan.tensor, plan.expert_shards
        yield 2 * count, width / parts, shape.dim
        yield count, shape.dim / parts, width
