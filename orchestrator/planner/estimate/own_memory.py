"""Bytes per device at the peak of a step of the product's own strategies.

Unlike `memory`, which stands for any software, this follows one program, moment by moment: the loss, where all
activations are alive and the logits are added; the backward pass of the last layer, of the first one, and of the
embedding; the optimizer. The fullest is the answer. `scripts/validate_planner_product` checks it against traces of
the real step (`rehearsal/memory_trace.py`). `tokens` are those of one micro-batch on this device; `split` of them are
left where sequence parallelism cuts the residual stream; widths are this device's share of the tensor axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from orchestrator.planner.estimate.optimizer_memory import optimizer_elements, update_bytes
from orchestrator.planner.estimate.rank_parts import Part, parts_of
from orchestrator.planner.estimate.work import layer_elements
from orchestrator.planner.evidence.calibration import COMPILED, Calibration
from orchestrator.planner.spec import JobSpec, MemoryEstimate, ModelShape, ParallelPlan

FP32, INT64 = 4, 8
TPU_LANES = 128
XLA_BLOCK = 512  # queries whose scores exist at one time, as in `strategies/xla.py`


def covers(job: JobSpec, plan: ParallelPlan) -> bool:
    """Return whether this follows what the strategies do: no latent attention, no offloading, fully sharded states.

    Args:
        job: model, batch and precision.
        plan: the layout and its settings.
    """
    return not job.model.latent_kv and plan.zero == 3 and plan.remat != "offload"


def native_memory(job: JobSpec, plan: ParallelPlan, constants: Calibration, capacity: float | None) -> MemoryEstimate:
    """Estimate what a device needs at the fullest moment of a step.

    Args:
        job: model, batch and precision.
        plan: the layout and its settings.
        constants: of the software stack.
        capacity: bytes that a program may use of a device; None where unknown.
    """
    found = [_rank_memory(_Sizes(job, plan, constants, part), capacity) for part in parts_of(job, plan)]
    return max(found, key=lambda estimate: estimate.total)


def _rank_memory(sizes: _Sizes, capacity: float | None) -> MemoryEstimate:
    job, plan, constants = sizes.job, sizes.plan, sizes.constants
    moments = [sizes.last_layer(), sizes.first_layer(), sizes.update()]
    moments += [sizes.forward()] if sizes.sparse else []
    moments += [sizes.loss()] if sizes.part.last else []
    moments += [sizes.embedding()] if sizes.part.first else []
    moments += [sizes.reduction()] if plan.pipeline > 1 else []
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
    part: Part

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
    def rows(self) -> float:
        """Tokens of experts: one for each choice. On every rank of the tensor axis a mixture sees whole sequences."""
        return self.tokens * self.shape.experts_per_token

    @cached_property
    def expert_hidden(self) -> float:
        return self.shape.expert_dim / self.plan.tensor

    @cached_property
    def shared_hidden(self) -> float:
        return self.shape.shared_width / self.plan.tensor

    def layer(self, sparse: bool) -> float:
        """Parameters of a layer before fsdp splits them, without its experts."""
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
        """Sum something of a layer with experts, or without, over all of them."""
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
        return self.dense + self.sparse * self.experts

    @cached_property
    def owned(self) -> float:
        return self.dense / self.plan.shards + self.sparse * self.experts / self.plan.expert_shards

    # --- activations of a layer -------------------------------------------------------------------

    def _norm(self, width: float, tokens: float, fused: bool) -> float:
        """Return the bytes that a norm keeps: its input and, where no kernel fuses it, fp32 copy and result instead."""
        return tokens * width * (self.wide if fused else 2 * FP32)

    @cached_property
    def _fused(self) -> bool:
        return self.shape.layer_norm or self.constants.fused_norms or self.compiled

    def everything(self, sparse: bool) -> float:
        """Count what a layer keeps without remat: norms and what they give to the products, attention, feed-forward."""
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
        """Count what a layer keeps under the plan's remat."""
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
        """Count what a layer's recomputation adds to what it has kept."""
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

    # --- moments ----------------------------------------------------------------------------------

    @cached_property
    def _accumulated(self) -> float:
        """Gradients that earlier micro-batches have left, in fp32: cut as the parameters are, or whole.

        With a tensor axis the embedding's even has the rows of all ranks as long as it is whole.
        """
        if not self._several:
            return 0.0
        if self.plan.pipeline > 1:
            return FP32 * self.whole
        if self._whole_gradients:
            return FP32 * (self.whole + (self.plan.tensor - 1) * self.vocabulary)
        return FP32 * self.owned

    @cached_property
    def _several(self) -> bool:
        return self.plan.micro_batches(self.job) > 1

    @cached_property
    def _whole_gradients(self) -> bool:
        """Whether gradients are summed whole before they are reduced; a compiler cuts them always."""
        if self.plan.pipeline > 1:
            return self._several
        return self.plan.keeps_whole_gradients(self.job) and not (self.compiled and self.wrapped)

    @cached_property
    def _root(self) -> float:
        """Parameters that stay gathered from the first use to the last: a tied matrix and learned positions."""
        if not self.wrapped:
            return 0.0
        matrices = 0 if self.shape.tied else self.part.first + self.part.last
        return self.wide * (self.outside - matrices * self.vocabulary)

    @cached_property
    def flying(self) -> float:
        """What is kept of the micro-batches in flight; a pipeline keeps a stage's input and output, too."""
        ends = 2 * self.wide * self.split * self.shape.dim if self.plan.pipeline > 1 else 0.0
        return self.part.in_flight * (self.over_layers(self.kept) + ends)

    @cached_property
    def _gathered(self) -> float:
        """Parameters that stay gathered since an earlier backward pass: in a pipeline, all."""
        return self.wide * self.whole if self.plan.pipeline > 1 and self.wrapped else 0.0

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
            gathered = self._root + wide * (self._unit(True) if shape.tied else 2 * self.vocabulary)
        return _Moment(
            gradients=self._accumulated,
            activations=self.flying + final + self._shared,
            logits=logits + FP32 * self.vocabulary,
            communication=gathered,
        )

    def forward(self) -> _Moment:
        """In the forward pass of the last experts, which are gathered; the buffer that they came in is still there."""
        inner = 3 * self.shape.dim + 4 * self.expert_hidden if self.plan.remat != "none" else self.shape.dim
        stream = 2 * self.narrow * self.tokens * self.shape.dim
        working, moving = self.narrow * self.rows * inner, 0.0
        if self.wrapped:
            # They are copied once more on their way out of the buffer, before anything is computed.
            moving = self._root + self.wide * (self.layer(True) + 2 * self.experts)
            working = max(working, self.wide * self.experts)
        return _Moment(self._accumulated, self.flying + self._shared + stream + working, 0.0, moving)

    def _unit(self, last: bool) -> float:
        """Parameters of the last layer, or of the first one, that are gathered together: experts are by themselves."""
        sparse = self._is_sparse(last)
        return max(self.layer(sparse), self.experts if sparse else 0.0)

    def _is_sparse(self, last: bool) -> bool:
        return bool(self.sparse) and (last or not self.part.layers[0])

    def _moving(self, last: bool) -> float:
        """Return the bytes of a layer's gathered parameters, of those that come next, and of gradients on their way.

        Experts are gathered by themselves; of a layer that is computed again what comes next is not there yet.
        """
        sparse = self._is_sparse(last)
        blocks = 1 if sparse and self.plan.remat != "none" else 2
        moving = self._root + blocks * self.wide * self.layer(sparse)
        return moving + (self.wide + self.narrow / 3) * self.experts if sparse else moving

    def _experts_reduced(self, activations: float, gradients: float) -> _Moment:
        """While the gradients of experts are cast to fp32 in order to be reduced; what the mixture kept is free."""
        moving = self._root + self.wide * self.layer(True) + (self.narrow * 4 / 3 + FP32) * self.experts
        passing = (FP32 + 2 * self.narrow) * self.tokens * self.shape.dim  # the router's input, gradients of the stream
        return _Moment(gradients, activations - self._mixture + passing, 0.0, moving)

    def _working(self, sparse: bool) -> float:
        """Return the bytes that a layer's backward pass makes: in the feed-forward or in attention's gathering."""
        wide, dim = self.wide, self.shape.dim
        gathered = wide * self.tokens * dim
        if sparse:  # gradients of the experts' answers, or of their inner widths, when those are used up
            inner = max(4 * dim, 2 * (self.expert_hidden - dim))
            return self.narrow * self.rows * inner + 2 * gathered
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
            moving = self._moving(True)
        if not self._whole_gradients:
            gradients = self._reduced(False)
            if self.wrapped and not self.shape.tied and self.part.last:
                moving += FP32 * self.vocabulary
        sparse = self._is_sparse(True)
        activations = self.flying + self.again(sparse) + self._shared
        found = _Moment(gradients, activations + self._working(sparse), 0.0, moving)
        if sparse and self.wrapped:
            found = max(found, self._experts_reduced(activations, gradients), key=lambda moment: moment.total)
        return found

    def first_layer(self) -> _Moment:
        """In the backward pass of the layer that goes last, with the gradients of all others reduced."""
        moving, gradients, sparse = 0.0, self._accumulated, self._is_sparse(False)
        if self.wrapped:
            moving = self._moving(False)
        if not self._whole_gradients:
            gradients = self._reduced(True)
            if self.wrapped:
                moving += FP32 * self.layer(sparse)
        earlier = self.flying * (1 - 1 / self.part.in_flight)
        activations = earlier + self.kept(sparse) + self.again(sparse) + self._shared
        found = _Moment(gradients, activations + self._working(sparse), 0.0, max(moving, self._gathered))
        if sparse and self.wrapped:
            found = max(found, self._experts_reduced(activations, gradients), key=lambda moment: moment.total)
        return found

    def _reduced(self, rest: bool) -> float:
        """Gradients of the head and, if `rest`, of all layers but the first, added to what earlier ones left."""
        first = self._is_sparse(False)
        layers = self.over_layers(self.layer) - self.layer(first) if rest else 0.0
        experts = (self.sparse - first) * self.experts if rest else 0.0
        if not self.wrapped:
            return FP32 * (layers + experts + self.part.last * self.vocabulary)
        # A tied matrix's waits for the embedding's.
        waiting = self.wide * self.vocabulary if self.shape.tied and self.part.last else 0.0
        done = layers if self.shape.tied else layers + self.part.last * self.vocabulary
        done = done / self.plan.shards + experts / self.plan.expert_shards
        return max(self._accumulated, FP32 * done) + waiting

    def embedding(self) -> _Moment:
        """In the backward pass of the embedding, whose gradient is whole, and then reduced."""
        tied, words = self.shape.tied, self.vocabulary
        rows = words * self.plan.tensor  # torch cuts it to this rank's rows afterwards
        entry = self.wide * self.split * self.shape.dim
        done = FP32 * (self.owned - words / self.plan.shards)
        if not self.wrapped:
            return _Moment(done + FP32 * words * (2 if tied or self._several else 1), entry)
        # Of a tied matrix there are the head's gradient, the embedding's, and their sum.
        made = self.wide * (rows + (2 * words if tied else 0)) + max(self._root, self.wide * words)
        if self._whole_gradients:
            return _Moment(self._accumulated, entry, 0.0, made)
        reduced = self.wide * words + FP32 * words * (1 + 1 / self.plan.shards)
        return _Moment(
            max(done, self._accumulated), entry, 0.0, max(made + FP32 * self.layer(self._is_sparse(False)), reduced)
        )

    def reduction(self) -> _Moment:
        """At the end of a pipeline's step, when whole gradients are reduced: the largest unit has a copy."""
        largest = max(self._unit(True), self._unit(False), self.vocabulary)
        return _Moment(FP32 * (self.whole + self.owned), 0.0, 0.0, FP32 * largest + self._gathered)

    def update(self) -> _Moment:
        return _Moment(gradients=FP32 * self.owned, activations=update_bytes(self.job, self.plan))
