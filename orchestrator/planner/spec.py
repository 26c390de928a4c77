"""Input of the planner: a model's shape, the job, the cluster, and the layout.

Pure data, without torch: the estimators (`memory`, `time`), the search and the reports all speak in these terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.chips.chip import Chip
from orchestrator.config.schema import GATED, ContextKind, ModelConfig, Schedule

Remat = Literal["none", "selective", "full", "offload"]
Precision = Literal["fp32", "bf16", "fp8"]
Reduce = Literal["each", "last"]

COMPUTE_OPTIMAL = "compute-optimal"
"""The name of a model whose sizes a scaling law has chosen."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes, dense or mixture of experts.

    Attributes:
        name: of the model.
        layers: decoder layers.
        dim: width of the residual stream.
        mlp_dim: hidden width of a dense feed-forward block.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocab: tokens of the vocabulary.
        gated: three matrices per feed-forward block (SwiGLU) instead of two.
        tied: the output head shares the embedding's weight.
        experts: routed experts per sparse layer; 0 for a dense model.
        experts_per_token: routed experts that each token goes through.
        shared_experts: experts that every token goes through, beside the routed ones.
        shared_dim: hidden width of a block that every token goes through beside the routed experts; 0: that of
            `shared_experts` experts.
        expert_dim: hidden width of one expert.
        dense_layers: leading layers with a dense block in a model that has experts.
        window: tokens that a position sees, itself included; None for all before it.
        global_layers: layers that see everything before them in a model that has a window.
        learned_positions: rows of a position table; 0: none.
        latent_q: rank of the queries in multi-head latent attention; 0: ordinary attention.
        latent_kv: rank of keys and values in it.
        rope_dim: width of a head's rotary part in it.
        qk_norm: queries and keys are normalised.
        layer_norm: norms with a shift instead of RMS norms.
    """

    name: str
    layers: int
    dim: int
    mlp_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0
    shared_experts: int = 0
    shared_dim: int = 0
    expert_dim: int = 0
    dense_layers: int = 0
    window: int | None = None
    global_layers: int = 0
    learned_positions: int = 0
    latent_q: int = 0
    latent_kv: int = 0
    rope_dim: int = 0
    qk_norm: bool = False
    layer_norm: bool = False

    @property
    def shared_width(self) -> int:
        """Hidden width of what every token goes through in a sparse layer."""
        return self.shared_dim or self.shared_experts * self.expert_dim

    def width(self, sparse: bool) -> int:
        """Hidden width, all blocks together, that one token goes through in a layer.

        Args:
            sparse: whether the layer has routed experts.
        """
        return self.experts_per_token * self.expert_dim + self.shared_width if sparse else self.mlp_dim

    @classmethod
    def of(cls, config: ModelConfig, vocab: int | None = None) -> ModelShape:
        """Return the shape of a configured model; `vocab` where the configuration leaves it to the tokenizer.

        Args:
            config: of the model.
            vocab: tokens of the vocabulary; None: as the configuration says.
        """
        size = vocab if config.vocab_size == "auto" else config.vocab_size
        windows = [config.window_of(layer) for layer in range(config.layers)]
        narrow = [window for window in windows if window is not None]
        mla = config.mla
        assert isinstance(size, int), "the vocabulary is known before planning"
        moe = config.moe
        experts = moe.experts if config._target_ is None else 0
        return cls(
            config.name,
            config.layers,
            config.dim,
            config.mlp_dim,
            config.heads,
            config.kv_heads,
            mla.nope_head_dim if mla.kv_lora_rank else config.head_width,
            size,
            gated=config.activation in GATED,
            tied=config.tied_embeddings,
            experts=experts,
            experts_per_token=moe.top_k if experts else 0,
            shared_dim=moe.shared_mlp_dim if experts else 0,
            expert_dim=moe.width(config) if experts else 0,
            dense_layers=moe.dense_layers if experts else 0,
            window=max(narrow, default=None),
            global_layers=len(windows) - len(narrow) if narrow else 0,
            learned_positions=config.max_seq_len if config.positions == "learned" else 0,
            latent_q=(mla.q_lora_rank or 0) if mla.kv_lora_rank else 0,
            latent_kv=mla.kv_lora_rank,
            rope_dim=mla.rope_head_dim if mla.kv_lora_rank else 0,
            qk_norm=config.qk_norm,
            layer_norm=config.norm.startswith("layer"),
        )


@dataclass(frozen=True)
class JobSpec:
    """The job: model, batch and number of tokens.

    Attributes:
        model: the model's shape.
        seq_len: tokens of a sequence.
        global_batch_tokens: per optimizer step, over all devices.
        total_tokens: of the whole run; None where only a step is asked for.
        precision: of the matrix products; master weights and optimizer state are fp32.
        stack: software whose calibration applies (a key of `calibration.yaml`), or `auto`: the chip's vendor's.
        loss_chunk_tokens: tokens whose logits are alive at one time; None for what the stack does.
        document_mask: attention does not cross documents, which takes a mask of every pair of positions.
        optimizer: `adamw`, `adamw bf16` or `adamw int8` (of its moments), `muon`, `adafactor`, `sgd`, or
            `sgd without momentum`.
        trained: share of the weights' number that is trained, where these are adapters beside frozen weights; 1: all
            weights are.
        average: a moving average of the weights is kept beside them.
        frozen_copy: a second model of these weights lies beside the first, never trained.
    """

    model: ModelShape
    seq_len: int
    global_batch_tokens: int
    total_tokens: float | None = None
    precision: Precision = "bf16"
    stack: str = "auto"
    loss_chunk_tokens: int | None = None
    document_mask: bool = False
    optimizer: str = "adamw"
    trained: float = 1.0
    average: bool = False
    frozen_copy: bool = False

    @property
    def element_bytes(self) -> int:
        """Of activations, and of weights on their way to the products."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Cluster:
    """Chips of one kind that work together. Devices are what the axes count: a chip may have several.

    Attributes:
        chip: of the catalogue.
        chips: as sold.
        inter_bandwidth: bytes/s one way and chip between hosts or domains; None takes the catalogue's first
            deployment, and stays unknown where it has none.
        domain_chips: chips that the fast links join; None takes the catalogue's.
    """

    chip: Chip
    chips: int
    inter_bandwidth: float | None = None
    domain_chips: int | None = None

    @property
    def devices(self) -> int:
        """Logical devices of all chips."""
        return self.chips * self.chip.logical_devices_per_chip


@dataclass(frozen=True)
class ParallelPlan:
    """One way to lay a job over a cluster; the product of the degrees is the number of devices.

    The axes are those of `sharding.layout`: `expert` is a data axis as `fsdp` is, over which experts are divided whole
    and everything else is sharded.

    Attributes:
        replicate: whole copies (or copies of fsdp groups).
        fsdp: shards of parameters, gradients and optimizer state.
        context: parts of each sequence.
        tensor: parts of each matrix.
        pipeline: stages; `virtual_stages` chunks of each are interleaved.
        expert: groups of experts, and as many further shards of everything else.
        micro_batch: sequences of one forward pass per data-parallel group.
        remat: what is recomputed in backward.
        zero: what fsdp shards: 3 all, 2 gradients and optimizer, 1 the optimizer only.
        sequence_parallel: activations between the tensor-parallel regions are split along the sequence.
        compiled: kernels between the matrix products are fused.
        attention: `flash` never holds the scores (`flash1`: its first version, half as fast); `fused` holds them
            and fuses mask and softmax; `eager` holds every step of it.
        reduce_gradients: the micro-batches whose gradients are reduce-scattered over `fsdp`; with `last` those of
            the others are summed whole on every device. Copies are summed once a step either way.
        schedule: in which the micro-batches pass the pipeline.
        context_kind: how the parts of a sequence attend to each other.
    """

    replicate: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    micro_batch: int = 1
    remat: Remat = "none"
    zero: Literal[1, 2, 3] = 3
    virtual_stages: int = 1
    sequence_parallel: bool = True
    compiled: bool = True
    attention: Literal["flash", "flash1", "fused", "eager"] = "flash"
    reduce_gradients: Reduce = "each"
    schedule: Schedule = "1f1b"
    context_kind: ContextKind = "gather"

    @property
    def devices(self) -> int:
        """Product of the degrees."""
        return self.data_parallel * self.context * self.tensor * self.pipeline

    @property
    def shards(self) -> int:
        """Devices that share one copy of the state: the context axis shards it too, since all see the same weights."""
        return self.fsdp * self.expert * self.context

    @property
    def expert_shards(self) -> int:
        """Devices that share one copy of an expert's state."""
        return self.fsdp * self.context

    @property
    def data_parallel(self) -> int:
        """Groups that see different sequences."""
        return self.replicate * self.fsdp * self.expert

    def micro_batches(self, job: JobSpec) -> int:
        """Return the forward passes per optimizer step and data-parallel group; 0 where the batch does not divide.

        Args:
            job: model, batch and precision.
        """
        sequences, rest = divmod(job.global_batch_tokens, job.seq_len)
        per_step = self.data_parallel * self.micro_batch
        return 0 if rest or sequences % per_step else sequences // per_step

    def keeps_whole_gradients(self, job: JobSpec) -> bool:
        """Return whether earlier micro-batches leave gradients that nothing has split.

        Args:
            job: model, batch and precision.
        """
        split = self.reduce_gradients == "each" and self.shards > 1
        return self.micro_batches(job) > 1 and not split


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device at the peak of a step, by what they are for.

    Attributes:
        parameters: the working copy of the weights.
        gradients: of this device.
        optimizer: state, and a master copy.
        activations: kept for backward, and the working memory of a layer.
        logits: at the peak of the loss.
        communication: buffers of collectives.
        overhead: of the runtime and the allocator.
        capacity: what the runtime lets a program use; None where the chip's memory is unknown.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    communication: float
    overhead: float
    capacity: float | None

    @property
    def total(self) -> float:
        """Bytes on one device."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.communication
            + self.overhead
        )

    @property
    def fits(self) -> bool | None:
        """None where the capacity is unknown."""
        return None if self.capacity is None else self.total <= self.capacity


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of one optimizer step, by what a device waits for; the parts add up to the step.

    Attributes:
        compute: matrix products and attention, recomputation included.
        memory_bound: element-wise kernels, norms, optimizer: limited by the memory's bandwidth.
        tensor: communication of the tensor axis that no computation hides.
        context: the same of the context axis.
        expert: the same of the expert axis.
        fsdp: the same of the fsdp axis.
        replicate: the same of the replicate axis.
        pipeline: the same of the pipeline axis.
        bubble: idle stages of the pipeline.
        other: fixed costs of a step, input, stragglers.
        unknown: what could not be counted, for want of a figure (such as `inter_bandwidth`); then the step is a
            lower bound and everything shown of it says so.
        estimated: figures of the chip that were not measured and are replaced by constants.
    """

    compute: float
    memory_bound: float
    tensor: float
    context: float
    expert: float
    fsdp: float
    replicate: float
    pipeline: float
    bubble: float
    other: float
    unknown: tuple[str, ...] = ()
    estimated: tuple[str, ...] = ()

    @property
    def step(self) -> float:
        """Seconds of one optimizer step."""
        return (
            self.compute
            + self.memory_bound
            + self.tensor
            + self.context
            + self.expert
            + self.fsdp
            + self.replicate
            + self.pipeline
            + self.bubble
            + self.other
        )

    @property
    def bound_by(self) -> str:
        """The largest part."""
        parts = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        return max(parts, key=lambda name: parts[name])
