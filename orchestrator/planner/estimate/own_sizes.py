"""Sizes of a step of the product's own strategies on one device, which `own_memory` adds up. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from orchestrator.planner.estimate.rank_parts import Part
from orchestrator.planner.estimate.work import layer_elements
from orchestrator.planner.evidence.calibration import COMPILED, Calibration
from orchestrator.planner.spec import JobSpec, ModelShape, ParallelPlan

FP32, INT64 = 4, 8
TPU_LANES = 128
XLA_BLOCK = 512  # queries whose scores exist at one time, as in `strategies/xla.py`


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step on one device, in elements and in bytes.

    Attributes:
        job: model, batch and precision.
        plan: the layout and its settings.
        constants: of the software stack.
        part: what this device has of the model.
    """

    job: JobSpec
    plan: ParallelPlan
    constants: Calibration
    part: Part

    # --- elements ---------------------------------------------------------------------------------

    @cached_property
    def shape(self) -> ModelShape:
        """The model's shape."""
        return self.job.model

    @cached_property
    def wide(self) -> int:
        """Bytes of an element of the residual stream and of gathered weights: fp32 under XLA's autocast."""
        return FP32 if self.compiled else self.narrow

    @cached_property
    def narrow(self) -> int:
        """Bytes of an element that the matrix products take."""
        return self.job.element_bytes

    @cached_property
    def compiled(self) -> bool:
        """Whether the XLA strategy runs this, and a compiler decides what is kept when."""
        return self.constants.vendor in COMPILED

    @cached_property
    def strip(self) -> float:
        """Scores and weights of one block of queries and the gradients of both, where no kernel does without them."""
        if not self.compiled:
            return 0.0
        heads, rows = self.shape.heads / self.plan.tensor, min(XLA_BLOCK, self.job.seq_len)
        return 4 * FP32 * self.plan.micro_batch * heads * rows * self.job.seq_len

    @cached_property
    def tokens(self) -> float:
        """Tokens of a micro-batch on this device."""
        return self.plan.micro_batch * self.job.seq_len / self.plan.context

    @cached_property
    def split(self) -> float:
        """Tokens of the residual stream. XLA's strategy leaves it whole over the tensor axis."""
        return self.tokens if self.compiled else self.tokens / self.plan.tensor

    @cached_property
    def wrapped(self) -> bool:
        """Whether parameters are split and gathered: not for a single device in fp32."""
        return self.plan.devices > 1 or self.wide < FP32

    @cached_property
    def head_dim(self) -> int:
        """With what fills the vector registers of a TPU, where arrays are laid out by heads."""
        width = self.shape.head_dim
        return math.ceil(width / TPU_LANES) * TPU_LANES if self.constants.vendor == "google" else width

    @cached_property
    def queries(self) -> float:
        """Width of the queries on this device."""
        return self.shape.heads * self.head_dim / self.plan.tensor

    @cached_property
    def keys(self) -> float:
        """Width of the keys on this device."""
        return self.shape.kv_heads * self.head_dim / self.plan.tensor

    @cached_property
    def hidden(self) -> float:
        """Inner width of a dense feed-forward on this device."""
        return self.shape.mlp_dim / self.plan.tensor

    @cached_property
    def vocabulary(self) -> float:
        """Elements of the embedding or of the head."""
        return self.shape.vocab * self.shape.dim / self.plan.tensor

    @cached_property
    def rows(self) -> float:
        """Tokens of experts: one for each choice. On every rank of the tensor axis a mixture sees whole sequences."""
        return self.tokens * self.shape.experts_per_token

    @cached_property
    def expert_hidden(self) -> float:
        """Inner width of an expert on this device."""
        return self.shape.expert_dim / self.plan.tensor

    @cached_property
    def shared_hidden(self) -> float:
        """Inner width of what every token goes through beside experts."""
        return self.shape.shared_width / self.plan.tensor

    def layer(self, sparse: bool) -> float:
        """Parameters of a layer before fsdp splits them, without its experts.

        Args:
            sparse: whether it has experts.
        """
        kind = layer_elements(self.shape, sparse)
        return (kind.attention + kind.mlp) / self.plan.tensor + kind.router + kind.norms

    @cached_property
    def experts(self) -> float:
        """Parameters of a layer's experts on a rank, before fsdp splits them."""
        return layer_elements(self.shape, True).experts / self.plan.tensor / self.plan.expert

    @cached_property
    def sparse(self) -> int:
        """Layers with experts, which are the last ones."""
        return self.part.layers[1]

    def over_layers(self, of: Callable[[bool], float]) -> float:
        """Sum something of a layer with experts, or without, over all of them.

        Args:
            of: what, of a layer with experts (true) or without.
        """
        dense = self.part.layers[0]
        return (self.sparse * of(True) if self.sparse else 0.0) + (dense * of(False) if dense else 0.0)

    @cached_property
    def outside(self) -> float:
        """Parameters outside of the layers."""
        first, last = self.part.first, self.part.last
        matrices = max(first, last) if self.shape.tied else first + last
        positions = first * self.shape.learned_positions * self.shape.dim / self.plan.tensor
        return matrices * self.vocabulary + positions + last * self.shape.dim

    @cached_property
    def dense(self) -> float:
        """Everything but experts."""
        return self.over_layers(self.layer) + self.outside

    @cached_property
    def whole(self) -> float:
        """Parameters before fsdp splits them."""
        return self.dense + self.sparse * self.experts

    @cached_property
    def owned(self) -> float:
        """Parameters of this device."""
        return self.dense / self.plan.shards + self.sparse * self.experts / self.plan.expert_shards

    # --- activations of a layer -------------------------------------------------------------------

    def _norm(self, width: float, tokens: float, fused: bool) -> float:
        """Return the bytes that a norm keeps: its input and, where no kernel fuses it, fp32 copy and result instead."""
        return tokens * width * (self.wide if fused else 2 * FP32)

    @cached_property
    def _fused(self) -> bool:
        return self.shape.layer_norm or self.constants.fused_norms or self.compiled

    def everything(self, sparse: bool) -> float:
        """Count what a layer keeps without remat: norms and what they give to the products, attention, feed-forward.

        Args:
            sparse: whether it has experts.
        """
        narrow, shape = self.narrow, self.shape
        size = 2 * self._norm(shape.dim, self.split, self._fused) + narrow * self.tokens * shape.dim
        if shape.qk_norm:
            size += self._norm(self.queries + self.keys, self.tokens, self._fused)
        size += narrow * self.tokens * (2 * self.queries + 2 * self.keys * self.plan.context) + self._statistics
        if sparse:
            return size + self._mixture
        return size + narrow * self.tokens * (shape.dim + self.hidden * (4 if shape.gated else 2))

    @cached_property
    def _mixture(self) -> float:
        """What a mixture of experts keeps: the router's input in fp32 and probabilities, rows, and their order.

        Of each row its input, its answer, and that with its weight; the two products, the activation and their product.
        """
        shape, narrow = self.shape, self.narrow
        router = FP32 * self.tokens * (shape.dim + shape.experts)
        order = INT64 * self.rows * (5 if self.plan.expert > 1 else 3)
        size = router + order + narrow * self.rows * (3 * shape.dim + 4 * self.expert_hidden)
        if self.shared_hidden:
            copy = 0 if narrow == FP32 else shape.dim
            size += narrow * self.tokens * (copy + 4 * self.shared_hidden)
        return size

    @cached_property
    def _statistics(self) -> float:
        """The logarithm of each query's sum that flash attention keeps."""
        return FP32 * self.tokens * self.shape.heads / self.plan.tensor

    def kept(self, sparse: bool) -> float:
        """Count what a layer keeps under the plan's remat.

        Args:
            sparse: whether it has experts.
        """
        entry, dim = self.wide * self.split * self.shape.dim, self.shape.dim
        if self.plan.remat == "none":
            return self.everything(sparse)
        if self.plan.remat == "full":
            return entry
        products = self.tokens * (2 * self.queries + 2 * self.keys + dim)
        if sparse:
            products += self.rows * (dim + 2 * self.expert_hidden)
            products += self.tokens * (dim + 2 * self.shared_hidden) if self.shared_hidden else 0.0
            entry += FP32 * self.tokens * self.shape.experts
        else:
            products += self.tokens * (dim + self._gates * self.hidden)
        return entry + self.narrow * products + self._statistics

    @cached_property
    def _gates(self) -> int:
        """Products on the way into a feed-forward."""
        return 2 if self.shape.gated else 1

    def again(self, sparse: bool) -> float:
        """Count what a layer's recomputation adds to what it has kept.

        Args:
            sparse: whether it has experts.
        """
        if self.plan.remat == "none":
            return 0.0
        if self.plan.remat == "full":
            return self.everything(sparse)
        # The experts' products are kept by themselves, and put together again.
        inner = 2 * self.shared_hidden if sparse else self._gates * self.hidden
        shared = self.queries + self.keys + inner
        return self.everything(sparse) - self.narrow * self.tokens * shared - self._statistics

    @cached_property
    def _shared(self) -> float:
        """What all layers use: the mask, which is there unless all is plainly causal, and the rotary tables."""
        job, shape, wide = self.job, self.shape, self.wide
        size = 0.0 if shape.learned_positions else 2 * FP32 * self.tokens * shape.head_dim
        windowed = shape.window is not None and shape.window < job.seq_len
        if not self.compiled and (job.document_mask or windowed or self.plan.context > 1):
            rows = self.plan.micro_batch if job.document_mask else 1
            size += wide * rows * job.seq_len**2 / self.plan.context
        return size
