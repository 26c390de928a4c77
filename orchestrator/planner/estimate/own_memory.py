"""Bytes per device at the peak of a step of the product's own strategies.

Unlike `memory`, which stands for any software, this follows one program, moment by moment: the loss, where all
activations are alive and the logits are added; the backward pass of the last layer, of the first one, and of the
embedding; the optimizer. The fullest is the answer. `scripts/validate_planner_product` checks it against traces of
the real step (`rehearsal/memory_trace.py`). `tokens` are those of one micro-batch on this device; `split` of them are
left where sequence parallelism cuts the residual stream; widths are this device's share of the tensor axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from orchestrator.planner.estimate.optimizer_memory import optimizer_elements, update_bytes
from orchestrator.planner.estimate.work import layer_elements
from orchestrator.planner.evidence.calibration import COMPILED, Calibration
from orchestrator.planner.spec import JobSpec, MemoryEstimate, ModelShape, ParallelPlan

FP32 = 4
TPU_LANES = 128
XLA_BLOCK = 512  # queries whose scores exist at one time, as in `strategies/xla.py`


def covers(job: JobSpec, plan: ParallelPlan) -> bool:
    """Return whether the strategies can do this: no experts, no pipeline, no offloading, fully sharded states.

    Args:
        job: model, batch and precision.
        plan: the layout and its settings.
    """
    known = not job.model.experts and not job.model.latent_kv
    return known and plan.pipeline == 1 and plan.zero == 3 and plan.remat != "offload"


def native_memory(job: JobSpec, plan: ParallelPlan, constants: Calibration, capacity: float | None) -> MemoryEstimate:
    """Estimate what a device needs at the fullest moment of a step.

    Args:
        job: model, batch and precision.
        plan: the layout and its settings.
        constants: of the software stack.
        capacity: bytes that a program may use of a device; None where unknown.
    """
    sizes = _Sizes(job, plan, constants)
    moments = (sizes.loss(), sizes.last_layer(), sizes.first_layer(), sizes.embedding(), sizes.update())
    fullest = max(moments, key=lambda moment: moment.total)
    return MemoryEstimate(
        parameters=FP32 * sizes.owned,
        gradients=fullest.gradients,
        optimizer=FP32 * optimizer_elements(job, plan, sizes.owned),
        activations=fullest.activations,
        logits=fullest.logits,
        communication=fullest.communication,
        overhead=constants.context_bytes + constants.fragmentation * (fullest.activations + fullest.logits),
        capacity=capacity,
    )


@dataclass(frozen=True)
class _Moment:
    """Bytes beside the parameters and the moments of the optimizer."""

    gradients: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    communication: float = 0.0

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.logits + self.communication


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a step on one device, in elements and in bytes, and its moments made of them."""

    job: JobSpec
    plan: ParallelPlan
    constants: Calibration

    # --- elements ---------------------------------------------------------------------------------

    @cached_property
    def shape(self) -> ModelShape:
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
        return self.shape.heads * self.head_dim / self.plan.tensor

    @cached_property
    def keys(self) -> float:
        return self.shape.kv_heads * self.head_dim / self.plan.tensor

    @cached_property
    def hidden(self) -> float:
        return self.shape.mlp_dim / self.plan.tensor

    @cached_property
    def vocabulary(self) -> float:
        """Elements of the embedding or of the head."""
        return self.shape.vocab * self.shape.dim / self.plan.tensor

    @cached_property
    def layer(self) -> float:
        """Parameters of a layer before fsdp splits them."""
        kind = layer_elements(self.shape, False)
        return (kind.attention + kind.mlp) / self.plan.tensor + kind.norms

    @cached_property
    def outside(self) -> float:
        """Parameters outside of the layers."""
        positions = self.shape.learned_positions * self.shape.dim / self.plan.tensor
        return (1 if self.shape.tied else 2) * self.vocabulary + positions + self.shape.dim

    @cached_property
    def whole(self) -> float:
        return self.shape.layers * self.layer + self.outside

    @cached_property
    def owned(self) -> float:
        return self.whole / self.plan.shards

    # --- activations of a layer -------------------------------------------------------------------

    def _norm(self, width: float, tokens: float, fused: bool) -> float:
        """Return the bytes that a norm keeps: its input and, where no kernel fuses it, fp32 copy and result instead."""
        return tokens * width * (self.wide if fused else 2 * FP32)

    @cached_property
    def _fused(self) -> bool:
        return self.shape.layer_norm or self.constants.fused_norms or self.compiled

    @cached_property
    def everything(self) -> float:
        """What a layer keeps without remat: norms and what they give to the products, attention, feed-forward."""
        narrow, shape = self.narrow, self.shape
        size = 2 * self._norm(shape.dim, self.split, self._fused) + 2 * narrow * self.tokens * shape.dim
        if shape.qk_norm:
            size += self._norm(self.queries + self.keys, self.tokens, self._fused)
        size += narrow * self.tokens * (2 * self.queries + 2 * self.keys * self.plan.context) + self._statistics
        return size + narrow * self.tokens * self.hidden * (4 if shape.gated else 2)

    @cached_property
    def _statistics(self) -> float:
        """The logarithm of each query's sum that flash attention keeps."""
        return FP32 * self.tokens * self.shape.heads / self.plan.tensor

    @cached_property
    def kept(self) -> float:
        """What a layer keeps under the plan's remat."""
        entry = self.wide * self.split * self.shape.dim
        if self.plan.remat == "none":
            return self.everything
        if self.plan.remat == "full":
            return entry
        products = 2 * self.queries + 2 * self.keys + 2 * self.shape.dim + (2 if self.shape.gated else 1) * self.hidden
        return entry + self.narrow * self.tokens * products + self._statistics

    @cached_property
    def again(self) -> float:
        """What a layer's recomputation adds to what it has kept."""
        if self.plan.remat == "none":
            return 0.0
        if self.plan.remat == "full":
            return self.everything
        shared = self.queries + self.keys + (2 if self.shape.gated else 1) * self.hidden
        return self.everything - self.narrow * self.tokens * shared - self._statistics

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

    # --- moments ----------------------------------------------------------------------------------

    @cached_property
    def _accumulated(self) -> float:
        """Gradients that earlier micro-batches have left, in fp32: cut as the parameters are, or whole.

        With a tensor axis the embedding's even has the rows of all ranks as long as it is whole.
        """
        if not self._several:
            return 0.0
        if self._whole_gradients:
            return FP32 * (self.whole + (self.plan.tensor - 1) * self.vocabulary)
        return FP32 * self.owned

    @cached_property
    def _several(self) -> bool:
        return self.plan.micro_batches(self.job) > 1

    @cached_property
    def _whole_gradients(self) -> bool:
        """Whether gradients are summed whole before they are reduced; a compiler cuts them always."""
        return self.plan.keeps_whole_gradients(self.job) and not (self.compiled and self.wrapped)

    @cached_property
    def _root(self) -> float:
        """Parameters that stay gathered from the first use to the last: a tied matrix and learned positions."""
        if not self.wrapped:
            return 0.0
        return self.wide * (self.outside - (0 if self.shape.tied else 2 * self.vocabulary))

    def loss(self) -> _Moment:
        """In the last chunk of the loss: all activations, the gradients of head and hidden states, the logits."""
        wide, shape = self.wide, self.shape
        final = self._norm(shape.dim, self.split, self._fused) + 2 * wide * self.tokens * shape.dim
        chunk_tokens = self.job.loss_chunk_tokens or self.constants.loss_chunk or math.inf
        chunk, narrow = min(self.tokens, chunk_tokens) * shape.vocab / self.plan.tensor, self.narrow
        if narrow == FP32:
            logits = FP32 * chunk
        else:
            logits = max((FP32 + narrow) * chunk, narrow * (chunk + self.vocabulary))
        gathered = 0.0
        if self.wrapped:
            # The buffer of the last gather lives until the next one.
            gathered = self._root + wide * (self.layer if shape.tied else 2 * self.vocabulary)
        return _Moment(
            gradients=self._accumulated,
            activations=shape.layers * self.kept + final + self._shared,
            logits=logits + FP32 * self.vocabulary,
            communication=gathered,
        )

    def _working(self) -> float:
        """Return the bytes that a layer's backward pass makes: in the feed-forward or in attention's gathering."""
        wide, dim = self.wide, self.shape.dim
        gathered = wide * self.tokens * dim
        inner = self.narrow * (2 * self.tokens * self.hidden + self.hidden * dim)
        if self.plan.tensor == 1:
            return max(inner, self.strip) + gathered
        # The gathered gradient is received, in one piece, and laid out; by then the feed-forward's part is free.
        free = self.narrow * self.tokens * self.hidden * (4 if self.shape.gated else 2)
        return wide * self.split * dim + max(inner + gathered, 3 * gathered - free, self.strip)

    def last_layer(self) -> _Moment:
        """In the backward pass of the layer that goes first, while the head's gradient is being reduced."""
        moving, gradients = 0.0, self._accumulated
        if self.wrapped:
            moving = self._root + 2 * self.wide * self.layer
        if not self._whole_gradients:
            gradients = self._reduced(0.0)
            if self.wrapped and not self.shape.tied:
                moving += FP32 * self.vocabulary
        activations = self.shape.layers * self.kept + self.again + self._shared + self._working()
        return _Moment(gradients, activations, 0.0, moving)

    def first_layer(self) -> _Moment:
        """In the backward pass of the layer that goes last, with the gradients of all others reduced."""
        moving, gradients = 0.0, self._accumulated
        if self.wrapped:
            moving = self._root + 2 * self.wide * self.layer
        if not self._whole_gradients:
            gradients = self._reduced((self.shape.layers - 1) * self.layer)
            if self.wrapped:
                moving += FP32 * self.layer
        return _Moment(gradients, self.kept + self.again + self._shared + self._working(), 0.0, moving)

    def _reduced(self, layers: float) -> float:
        """Gradients of the head and of so many elements of layers, added to what earlier micro-batches left."""
        if not self.wrapped:
            return FP32 * (layers + self.vocabulary)
        # A tied matrix's waits for the embedding's.
        waiting = self.wide * self.vocabulary if self.shape.tied else 0.0
        done = layers if self.shape.tied else layers + self.vocabulary
        return max(self._accumulated, FP32 * done / self.plan.shards) + waiting

    def embedding(self) -> _Moment:
        """In the backward pass of the embedding, whose gradient is whole, and then reduced."""
        tied, words = self.shape.tied, self.vocabulary
        rows = words * self.plan.tensor  # torch cuts it to this rank's rows afterwards
        entry = self.wide * self.split * self.shape.dim
        done = FP32 * (self.whole - words) / self.plan.shards
        if not self.wrapped:
            return _Moment(done + FP32 * words * (2 if tied or self._several else 1), entry)
        # Of a tied matrix there are the head's gradient, the embedding's, and their sum.
        made = self.wide * (rows + (2 * words if tied else 0)) + max(self._root, self.wide * words)
        if self._whole_gradients:
            return _Moment(self._accumulated, entry, 0.0, made)
        reduced = self.wide * words + FP32 * words * (1 + 1 / self.plan.shards)
        return _Moment(max(done, self._accumulated), entry, 0.0, max(made + FP32 * self.layer, reduced))

    def update(self) -> _Moment:
        return _Moment(gradients=FP32 * self.owned, activations=update_bytes(self.job, self.plan))
