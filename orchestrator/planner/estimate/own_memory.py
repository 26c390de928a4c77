"""Bytes per device at the peak of a step of the product's own strategies.

Unlike `memory`, which stands for any software, this follows one program, moment by moment: the loss, where all
activations are alive and the logits are added; the backward pass of the last layer, of the first one, and of the
embedding; the optimizer. The fullest is the answer. `scripts/validate_planner_product` checks it against traces of
the real step (`rehearsal/memory_trace.py`). `tokens` are those of one micro-batch on this device; `split` of them are
left where sequence parallelism cuts the residual stream; widths are this device's share of the tensor axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from orchestrator.planner.estimate.optimizer_memory import optimizer_elements, update_bytes
from orchestrator.planner.estimate.own_sizes import FP32, Sizes
from orchestrator.planner.estimate.rank_parts import parts_of
from orchestrator.planner.evidence.calibration import Calibration
from orchestrator.planner.spec import JobSpec, MemoryEstimate, ParallelPlan


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
    # Beside frozen weights gradients and state are those of adapters. What is on its way is counted as ever.
    moments = [replace(moment, gradients=job.trained * moment.gradients) for moment in moments]
    fullest = max(moments, key=lambda moment: moment.total)
    adapters = job.trained if job.trained < 1.0 else 0.0
    return MemoryEstimate(
        parameters=FP32 * sizes.owned * (1.0 + adapters + job.frozen_copy),
        gradients=fullest.gradients,
        optimizer=FP32 * (optimizer_elements(job, plan, sizes.owned) + job.average * sizes.owned) * job.trained,
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
class _Sizes(Sizes):
    """The moments of a step, made of its sizes."""

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
