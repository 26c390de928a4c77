"""A layout: how many ways each mesh axis splits the job, and which part a rank holds.

Ranks are numbered row-major over (replicate, pipeline, fsdp, expert, context, tensor), so that the ranks of one
tensor group are neighbours, and so are those of one copy of the model.

The `expert` axis is of data parallelism, as `fsdp` is: its ranks read different sequences, and what is not an expert's
is sharded over it as over fsdp. An expert's matrices are on one rank of it, and tokens travel there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from orchestrator.config.schema import ContextKind, LayoutConfig, ModelConfig, Schedule
from orchestrator.errors import LayoutError
from orchestrator.sharding.axes import MESH_AXES

# Who takes the devices that the fixed degrees leave over, in this order.
_AUTO_PREFERENCE = ("fsdp", "replicate", "context", "tensor", "expert", "pipeline")

VIRTUAL_STAGES: dict[Schedule, int] = {"1f1b": 1, "interleaved": 2, "zero_bubble": 1, "dualpipe_v": 2}
"""Stages that each rank of a pipeline has, by its schedule, where nothing else is said."""


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh axes; their product is the number of devices.

    Attributes:
        replicate: copies of the model.
        pipeline: ranks among which the layers are divided.
        fsdp: shards of parameters, gradients and optimizer state.
        expert: groups of experts, and as many further shards of everything else.
        context: parts of each sequence.
        tensor: parts of each matrix.
        schedule: of the pipeline's micro-batches.
        context_kind: how the parts of a sequence attend to each other.
        virtual_stages: stages of each rank of a pipeline.
        stage_layers: layers of each stage; empty: divided evenly.
    """

    replicate: int = 1
    pipeline: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    schedule: Schedule = "1f1b"
    context_kind: ContextKind = "gather"
    virtual_stages: int = 1
    stage_layers: tuple[int, ...] = ()

    @property
    def devices(self) -> int:
        """Product of the degrees."""
        return math.prod(self.as_dict().values())

    @property
    def data_parallel(self) -> int:
        """Groups of devices that read different sequences."""
        return self.replicate * self.fsdp * self.expert

    @property
    def shards(self) -> int:
        """Parts into which the fsdp rule cuts a parameter: ranks of one sequence share in it."""
        return self.fsdp * self.expert * self.context

    @property
    def expert_shards(self) -> int:
        """Parts into which the fsdp rule cuts an expert's matrix."""
        return self.fsdp * self.context

    @property
    def sequence_chunks(self) -> int:
        """Chunks of consecutive positions that a rank holds of a sequence; two balance a causal mask's work."""
        return 2 if self.context > 1 and self.context_kind == "ring" else 1

    @property
    def sequence_split(self) -> int:
        """What must divide the length of a sequence, for `context` and between the blocks for `tensor`."""
        return self.context * math.lcm(self.sequence_chunks, self.tensor)

    @property
    def stages(self) -> int:
        """Stretches into which a pipeline divides the layers."""
        return self.pipeline * self.virtual_stages

    def degree(self, axis: str) -> int:
        """Return the degree of a mesh axis.

        Args:
            axis: its name.
        """
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of `rank` on each mesh axis."""
        result = {}
        for axis in reversed(MESH_AXES):
            rank, result[axis] = divmod(rank, self.degree(axis))
        return result

    def data_rank(self, rank: int) -> int:
        """Which of the `data_parallel` shares of a batch `rank` reads."""
        at = self.coordinates(rank)
        return (at["replicate"] * self.fsdp + at["fsdp"]) * self.expert + at["expert"]

    def groups(self, *axes: str) -> list[list[int]]:
        """List the groups of ranks that differ in their coordinates on `axes` alone, each in ascending order.

        Args:
            axes: of the mesh.
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.devices):
            at = self.coordinates(rank)
            found.setdefault(tuple(at[axis] for axis in MESH_AXES if axis not in axes), []).append(rank)
        return list(found.values())

    def as_dict(self) -> dict[str, int]:
        """Return the degree of each mesh axis, the outermost first."""
        return {axis: self.degree(axis) for axis in MESH_AXES}

    def __str__(self) -> str:
        parts = [f"{axis}={self.degree(axis)}" for axis in MESH_AXES if self.degree(axis) > 1]
        return " x ".join(parts) or "single device"


def resolve_layout(config: LayoutConfig, devices: int) -> Layout:
    """Fill the `auto` degrees so that the product is `devices`.

    Args:
        config: degrees, some of them `auto`.
        devices: of the job.

    Raises:
        LayoutError: a degree below 1, or degrees whose product cannot be the number of devices.
    """
    fixed = {axis: value for axis in MESH_AXES if (value := getattr(config, axis)) != "auto"}
    for axis, value in fixed.items():
        if value < 1:
            raise LayoutError(f"layout.{axis} is not a degree", got=value, allowed="1 or more, or auto")
    product = math.prod(fixed.values())
    shown = " x ".join(f"{axis} {value}" for axis, value in fixed.items() if value > 1) or "1"
    automatic = [axis for axis in _AUTO_PREFERENCE if axis not in fixed]
    if devices % product or (not automatic and product != devices):
        raise LayoutError(
            "the layout does not fit the devices",
            got=f"{shown} = {product} on {devices} device{'s' if devices != 1 else ''}",
            allowed=f"degrees whose product {'divides' if automatic else 'is'} {devices}",
            fix=f"set hardware.devices={product}" + ("" if automatic else ", or leave one degree auto"),
        )
    degrees = {**fixed, **dict.fromkeys(automatic, 1)}
    if automatic:
        degrees[automatic[0]] = devices // product
    schedule: Schedule = "1f1b" if config.schedule == "auto" else config.schedule
    kind: ContextKind = "gather" if config.context_kind == "auto" else config.context_kind
    layout = Layout(**degrees, schedule=schedule, context_kind=kind)
    if layout.pipeline == 1:
        return layout
    virtual = VIRTUAL_STAGES[schedule] if config.virtual_stages == "auto" else config.virtual_stages
    return replace(layout, virtual_stages=virtual, stage_layers=config.stage_layers)


def check_layout(layout: Layout, model: ModelConfig, seq_len: int, global_batch_tokens: int) -> list[LayoutError]:
    """List what the model and the batch do not allow of this layout, each with its arithmetic.

    Args:
        layout: degrees of the mesh axes.
        model: of the run.
        seq_len: tokens of a sequence.
        global_batch_tokens: of a step.
    """
    problems = []
    # Which sizes an own model has, its parameters say: `check_parts`.
    for field, size in _sizes(model):
        if size % layout.tensor:
            fix = f"lower layout.tensor to a divisor of {size}"
            if field == "vocab_size":
                fix += f", or pad: model.vocab_size={-(-size // layout.tensor) * layout.tensor}"
            problems.append(_indivisible(f"model.{field}", size, "layout.tensor", layout.tensor, fix))
    problems += _check_sequence(layout, model, seq_len)
    if model._target_ is None and model.positions == "learned" and model.max_seq_len % layout.tensor:
        fix = "lower layout.tensor, or set model.max_seq_len to a multiple of it"
        problems.append(_indivisible("model.max_seq_len", model.max_seq_len, "layout.tensor", layout.tensor, fix))
    problems += _check_experts(layout, model)
    sequences = global_batch_tokens // seq_len
    fitting = -(-sequences // layout.data_parallel) * layout.data_parallel
    if sequences % layout.data_parallel:
        problems.append(
            LayoutError(
                "the global batch does not divide over the data-parallel groups",
                got=f"{global_batch_tokens} tokens / {seq_len} = {sequences} sequences over "
                f"replicate {layout.replicate} x fsdp {layout.fsdp}"
                + (f" x expert {layout.expert}" if layout.expert > 1 else "")
                + f" = {layout.data_parallel} groups",
                allowed=f"a multiple of {layout.data_parallel} sequences",
                fix=f"set train.global_batch_tokens={fitting * seq_len}",
            )
        )
    return problems


def _sizes(model: ModelConfig) -> list[tuple[str, int]]:
    """List the sizes that the tensor axis divides, with their keys; of layers with other heads, each number once."""
    sizes: list[tuple[str, object]] = []
    if model._target_ is None:
        heads = [model.heads_of(layer) for layer in range(model.layers)]
        sizes += [("layer_heads" if model.layer_heads else "heads", one) for one in sorted({one for one, _ in heads})]
        keys = "layer_kv_heads" if model.layer_kv_heads else "kv_heads"
        sizes += [(keys, one) for one in sorted({one for _, one in heads})]
        sizes.append(("mlp_dim", model.mlp_dim))
    sizes.append(("vocab_size", model.vocab_size))
    return [(key, size) for key, size in sizes if isinstance(size, int)]


def _check_sequence(layout: Layout, model: ModelConfig, seq_len: int) -> list[LayoutError]:
    """List why a sequence cannot be cut: over the context axis, and between the blocks over the tensor axis too."""
    problems = []
    split = layout.sequence_split
    if seq_len % split:
        fix = f"set train.seq_len to a multiple of {split}"
        by = "layout.tensor x layout.context"
        if layout.sequence_chunks > 1:
            by = f"{split // layout.context} x layout.context (a ring's ranks hold two chunks each)"
        problems.append(_indivisible("train.seq_len", seq_len, by, split, fix))
    if layout.context == 1 or layout.context_kind == "gather":
        return problems
    if model.dropout > 0.0:
        problems.append(
            LayoutError(
                f"layout.context_kind={layout.context_kind} draws no dropout: its backward pass makes the scores again",
                got=f"model.dropout={model.dropout:g}",
                fix="set model.dropout=0, or layout.context_kind=gather",
            )
        )
    if layout.context_kind == "ulysses" and model._target_ is None:
        problems += _check_exchanged_heads(layout, model)
    return problems


def _check_exchanged_heads(layout: Layout, model: ModelConfig) -> list[LayoutError]:
    """Ulysses gives each rank of a sequence some of the heads that the tensor axis has left to it."""
    context = layout.context
    counts = dict.fromkeys(model.heads_of(layer) for layer in range(model.layers))
    for heads, kv_heads in counts:
        if heads % layout.tensor or kv_heads % layout.tensor:
            continue  # another problem says so
        ours, keys = heads // layout.tensor, kv_heads // layout.tensor
        if ours % context or (keys % context and context % keys):
            return [
                LayoutError(
                    "Ulysses cannot divide the heads over layout.context",
                    got=f"query heads {heads} / tensor {layout.tensor} = {ours}, / context {context} = "
                    f"{ours / context:g}; key heads {kv_heads} / tensor {layout.tensor} = {keys}",
                    allowed="a whole number of query heads; key heads a multiple or a divisor of layout.context",
                    fix=f"lower layout.context to a divisor of {ours}, or set layout.context_kind=ring",
                )
            ]
    return []


def _check_experts(layout: Layout, model: ModelConfig) -> list[LayoutError]:
    """Experts are divided whole; the fsdp rule cuts a matrix's output dim, in equal parts."""
    moe = model.moe
    if not moe.experts or model._target_:
        if layout.expert == 1:
            return []
        return [
            LayoutError(
                "the model has no experts to divide",
                got=f"layout.expert={layout.expert} with model {model.name}",
                fix="set layout.expert=1, or a model with model.moe.experts",
            )
        ]
    problems = []
    if moe.experts % layout.expert:
        fix = f"lower layout.expert to a divisor of {moe.experts}"
        problems.append(_indivisible("model.moe.experts", moe.experts, "layout.expert", layout.expert, fix))
    split = layout.tensor * layout.expert_shards
    name = "model.moe.mlp_dim" if isinstance(moe.mlp_dim, int) else "model.mlp_dim"
    for key, size, by, parts in (
        (name, moe.width(model), "layout.tensor x fsdp x context", split),
        ("model.dim", model.dim, "layout.fsdp x context", layout.expert_shards),
        ("model.moe.shared_mlp_dim", moe.shared_mlp_dim, "layout.tensor", layout.tensor),
    ):
        if size % parts:
            problems.append(_indivisible(key, size, by, parts, f"lower the degrees, or change {key}"))
    return problems


def _indivisible(name: str, size: int, by: str, degree: int, fix: str) -> LayoutError:
    return LayoutError(
        f"{name} does not divide by {by}",
        got=f"{size} / {degree} = {size / degree:g}",
        allowed="a whole number",
        fix=fix,
    )
