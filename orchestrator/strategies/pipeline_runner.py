"""Runs the stages of a pipeline that a rank has.

Every rank of a pipeline reads the same batch, so that positions, documents and targets are everywhere and only the
residual stream and its gradients travel. Gradients of a step stay on the rank, summed over the micro-batches, and are
reduced over the ranks that have the same stages once, at its end; FSDP2's units stay gathered until then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from orchestrator.errors import LayoutError
from orchestrator.models.protocol import ShardableModel, run_on
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.pipeline import Stage, rank_of_stage
from orchestrator.strategies import pipeline_schedule as schedule
from orchestrator.strategies.sharded_parts import local_part

if TYPE_CHECKING:
    from orchestrator.strategies.parallel_strategy import Batch, StepHooks

_Key = tuple[int, int]  # stage and micro-batch
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Pipeline:
    """The stages of a model on this rank. Takes the place of the model's `forward`.

    Args:
        model: with this rank's stages alone.
        stages: of this rank.
        layout: of the job.
        rank: this process.
        group: of the ranks of the pipeline.
        width: D of the residual stream.
        dtype: of the residual stream.
        device: of this rank.
    """

    def __init__(
        self,
        model: ShardableModel,
        stages: Sequence[Stage],
        layout: Layout,
        rank: int,
        group: dist.ProcessGroup,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.stages, self.layout = {stage.index: stage for stage in stages}, layout
        self._model, self._group, self._device, self._dtype, self._width = model, group, device, dtype, width
        self._me = layout.coordinates(rank)["pipeline"]
        self._ranks = dist.get_process_group_ranks(group)
        self._parts = {stage.index: number for number, stage in enumerate(stages)}
        ends = {rank_of_stage(layout, 0), rank_of_stage(layout, layout.stages - 1)}
        tied = model.config.tied_embeddings and len(ends) == 2 and self._me in ends
        self._tied_with = self._ranks[(ends - {self._me}).pop()] if tied else None
        model.forward = self._forward  # type: ignore[method-assign]

    @property
    def copies(self) -> frozenset[str]:
        """Names of parameters that an earlier stage has, too, and owns."""
        return frozenset({"embed.weight"} if self._tied_with is not None and 0 not in self.stages else ())

    # --- one stage --------------------------------------------------------------------------------

    def _forward(
        self, tokens: Tensor | None = None, *, stage: Stage | None = None, stream: Tensor | None = None, **batch: Any
    ) -> Any:
        """Run a stage; or, called as the model is, all stages of all ranks, which call it together."""
        assert tokens is not None
        if batch.get("positions") is None:
            batch["positions"] = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        if stage is not None:
            return self._run(stage, stream, tokens, **batch)
        if torch.is_grad_enabled():
            raise LayoutError(
                "a model on a pipeline computes gradients in the strategy's schedule alone",
                got="a call of the model with gradients",
                fix="call strategy.forward_backward, or set layout.pipeline=1",
            )
        return self._evaluate(tokens, **batch)

    def _run(
        self,
        stage: Stage,
        stream: Tensor | None,
        tokens: Tensor,
        positions: Tensor,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
        **generating: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the stream behind the stage, or what the model gives; and the loss of its routers."""
        cached = {"cache": generating["cache"]} if "cache" in generating else {}
        wanted = {"at": generating["at"]} if "at" in generating else {}
        x = self._model.begin(tokens, positions) if stream is None else stream
        x, routing_loss = self._model.through(stage.layers, x, positions, documents, **cached)
        return (self._model.end(x, targets, **wanted) if stage.last else x), routing_loss

    def stream_like(self, tokens: Tensor) -> Tensor:
        """Allocate the residual stream of `tokens` [B, T], as this rank has it between two layers."""
        rows, length = tokens.shape
        shape = (rows, length // self.layout.tensor, self._width)
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _peer(self, stage: int) -> int:
        """Return the global rank that has a stage of this pipeline."""
        return self._ranks[rank_of_stage(self.layout, stage)]

    def elsewhere(self, stage: int) -> bool:
        """Whether another rank has the `stage` of this number; none has those before the first and behind the last."""
        return 0 <= stage < self.layout.stages and stage not in self.stages

    def part_of(self, stage: Stage) -> int:
        """Return which of this rank's stages `stage` is."""
        return self._parts[stage.index]

    def send(self, tensor: Tensor, stage: int) -> Any:
        """Start sending `tensor` to the rank that has the `stage` of this number; returns what is waited for."""
        return dist.isend(tensor, self._peer(stage), group=self._group)

    def receive(self, tensor: Tensor, stage: int) -> Any:
        """Start receiving `tensor` from the rank that has the `stage` of this number; returns what is waited for."""
        return dist.irecv(tensor, self._peer(stage), group=self._group)

    # --- without gradients ------------------------------------------------------------------------

    def _evaluate(self, tokens: Tensor, **batch: Any) -> Tensor:
        stream: Tensor | None = None
        result: Tensor | None = None
        for index in sorted(self.stages):
            if self.elsewhere(index - 1):
                stream = self.stream_like(tokens)
                dist.recv(stream, self._peer(index - 1), group=self._group)
            out, _ = self._run(self.stages[index], stream, tokens, **batch)
            if self.stages[index].last:
                result = out
            elif self.elsewhere(index + 1):
                dist.send(out.contiguous(), self._peer(index + 1), group=self._group)
            stream = out
        return self.tell(result)

    def tell(self, result: Tensor | None) -> Tensor:
        """Give what the rank of the last stage has, of three dims at most, to all ranks of the pipeline.

        Args:
            result: None on the other ranks.
        """
        source = self._peer(self.layout.stages - 1)
        head = torch.zeros(5, dtype=torch.int64)
        if result is not None:
            head[: 2 + result.dim()] = torch.tensor([_DTYPES.index(result.dtype), result.dim(), *result.shape])
        head = head.to(self._device)
        dist.broadcast(head, source, group=self._group)
        kind, dims, *shape = head.tolist()
        if result is None:
            result = torch.empty(shape[:dims], dtype=_DTYPES[kind], device=self._device)
        result = result.contiguous()
        dist.broadcast(result, source, group=self._group)
        return result

    # --- a step -----------------------------------------------------------------------------------

    def forward_backward(self, parts: Sequence[Batch], divisor: Tensor, hooks: StepHooks) -> Tensor:
        """Compute the gradients of a step's micro-batches, in the order of the schedule.

        Args:
            parts: the micro-batches.
            divisor: of the sum of the losses.
            hooks: called on the way; `backward` is not.

        Returns:
            The loss of this rank's stages: of the head, and of routers.
        """
        self._accumulate()
        step = _Step(self, parts, divisor, hooks)
        for action in schedule.actions_of(self.layout, self._me, len(parts)):
            step.take(action)
        step.finish()
        self._reduce()
        return step.total

    def _accumulate(self) -> None:
        if isinstance(self._model, FSDPModule):
            self._model.set_is_last_backward(False)
            self._model.set_reshard_after_backward(False)
            self._model.set_requires_gradient_sync(False)

    def _reduce(self) -> None:
        """Reduce the gradients over the ranks that have the same stages, as torch's pipelines do it."""
        model = self._model
        if isinstance(model, FSDPModule):
            model.set_is_last_backward(True)
            model.set_reshard_after_backward(True)
            model.set_requires_gradient_sync(True)
            state = fully_shard.state(model)  # type: ignore[attr-defined]
            for unit in state._state_ctx.all_states:
                for group in unit._fsdp_param_groups:
                    group.post_backward()
            state._root_post_backward_final_callback()
        if self._tied_with is not None:
            self._add_tied(self._tied_with)

    def _add_tied(self, peer: int) -> None:
        """Add the gradients of both ends: the sum of two numbers has the same bits on both."""
        if not self._model.embed.weight.requires_grad:
            return
        grad = self._model.embed.weight.grad
        assert grad is not None
        mine = local_part(grad)
        other = torch.empty_like(mine)
        operations = [dist.P2POp(dist.isend, mine, peer, self._group), dist.P2POp(dist.irecv, other, peer, self._group)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        mine.add_(other)

    @property
    def model(self) -> ShardableModel:
        """The model, of which this rank has its stages."""
        return self._model


def pipeline_of(model: nn.Module) -> Pipeline | None:
    """Return the pipeline that runs `model`; None where there is none."""
    runner = getattr(model.forward, "__self__", None)
    return runner if isinstance(runner, Pipeline) else None


class _Step:
    """What a rank holds while it works off a step."""

    def __init__(self, pipeline: Pipeline, parts: Sequence[Batch], divisor: Tensor, hooks: StepHooks):
        self._pipeline, self._parts, self._divisor, self._hooks = pipeline, parts, divisor, hooks
        self._inputs: dict[_Key, Tensor] = {}  # streams that have come in
        self._outputs: dict[_Key, list[Tensor]] = {}  # the stream or the loss, and routers' losses
        self._seeds: dict[_Key, list[Tensor]] = {}  # gradients of outputs, of passes that wait
        self._groups: dict[_Key, Any] = {}  # what is left to do for the weights
        self._results: dict[_Key, Tensor] = {}  # gradients of inputs, that go back
        self._arriving: dict[tuple[str, _Key], tuple[Tensor, Any]] = {}
        self._leaving: dict[_Key, tuple[Tensor, Any]] = {}
        self._gradients_leaving: deque[tuple[Tensor, Any]] = deque()
        self.total = torch.zeros((), device=divisor.device)

    def take(self, action: schedule.Action) -> None:
        """Do what `action` says."""
        _DO[action.kind](self, (action.stage, action.micro_batch))

    def finish(self) -> None:
        """Wait until everything has left."""
        for _, work in (*self._leaving.values(), *self._gradients_leaving):
            work.wait()
        left = [self._inputs, self._outputs, self._seeds, self._groups, self._results, self._arriving]
        assert not any(left), "a schedule has left something undone"

    # --- messages ---------------------------------------------------------------------------------

    def _receive(self, key: _Key) -> None:
        self._expect(schedule.RECEIVE, key, key[0] - 1)

    def _receive_gradient(self, key: _Key) -> None:
        self._expect(schedule.RECEIVE_GRADIENT, key, key[0] + 1)

    def _expect(self, kind: str, key: _Key, source: int) -> None:
        tensor = self._pipeline.stream_like(self._parts[key[1]]["tokens"])
        self._arriving[kind, key] = (tensor, self._pipeline.receive(tensor, source))

    def _arrived(self, kind: str, key: _Key) -> Tensor:
        tensor, work = self._arriving.pop((kind, key))
        work.wait()
        return tensor

    def _send(self, key: _Key) -> None:
        stream = self._outputs[key][0].detach().contiguous()
        wanted = self._pipeline.stream_like(self._parts[key[1]]["tokens"])
        if (stream.shape, stream.dtype) != (wanted.shape, wanted.dtype):
            raise LayoutError(
                "a layer gives another residual stream than a pipeline can pass on",
                got=f"{list(stream.shape)} {stream.dtype} behind layer {self._pipeline.stages[key[0]].layers[-1]}",
                allowed=f"{list(wanted.shape)} {wanted.dtype}",
                fix="set layout.pipeline=1",
            )
        self._leaving[key] = (stream, self._pipeline.send(stream, key[0] + 1))

    def _send_gradient(self, key: _Key) -> None:
        gradient = self._results.pop(key).contiguous()
        while self._gradients_leaving and self._gradients_leaving[0][1].is_completed():
            self._gradients_leaving.popleft()
        self._gradients_leaving.append((gradient, self._pipeline.send(gradient, key[0] - 1)))

    # --- passes -----------------------------------------------------------------------------------

    def _forward(self, key: _Key) -> None:
        pipeline, (number, micro_batch) = self._pipeline, key
        stage = pipeline.stages[number]
        if pipeline.elsewhere(number - 1):
            self._inputs[key] = self._arrived(schedule.RECEIVE, key).requires_grad_()
        self._hooks.begin(micro_batch, pipeline.part_of(stage))
        part = self._parts[micro_batch]
        result, routing_loss = run_on(pipeline.model, part, stage=stage, stream=self._inputs.get(key))
        losses = [loss / self._divisor for loss in ([result] if stage.last else []) + _some(routing_loss)]
        for loss in losses:
            self.total += loss.detach()
        self._hooks.ran(losses[0] if stage.last else None)
        learnt = [loss for loss in losses if loss.requires_grad]
        self._outputs[key] = learnt if stage.last else [result, *learnt]
        if number + 1 in pipeline.stages:
            self._inputs[number + 1, micro_batch] = result.detach().requires_grad_()

    def _take_seeds(self, key: _Key) -> list[Tensor]:
        """Return the gradients of the outputs: that of the stream comes from the next stage, losses have one."""
        pipeline, (number, micro_batch) = self._pipeline, key
        seeds = [torch.ones_like(output) for output in self._outputs[key][0 if pipeline.stages[number].last else 1 :]]
        if pipeline.stages[number].last:
            return seeds
        if number + 1 in pipeline.stages:
            return [self._results.pop((number + 1, micro_batch)), *seeds]
        gradient = self._arrived(schedule.RECEIVE_GRADIENT, key)
        self._leaving.pop(key)[1].wait()  # what the next stage has answered, it has received
        return [gradient, *seeds]

    def _backward(self, key: _Key) -> None:
        torch.autograd.backward(self._outputs[key], self._seeds.pop(key, None) or self._take_seeds(key))
        del self._outputs[key]
        self._pass_back(key)

    def _pass_back(self, key: _Key) -> None:
        stream = self._inputs.pop(key, None)
        if stream is not None:
            assert stream.grad is not None
            self._results[key] = stream.grad

    def _backward_input(self, key: _Key) -> None:
        stage = self._pipeline.stages[key[0]]
        if stage.last:
            self._backward(key)  # the loss hands out its gradients once
        elif stage.first:
            self._seeds[key] = self._take_seeds(key)  # nobody waits for what comes in
        else:
            seeds = self._take_seeds(key)
            outputs = self._outputs.pop(key)
            _, self._groups[key] = stage_backward_input(outputs, seeds, [self._inputs[key]], self._weights(stage))
            self._pass_back(key)

    def _backward_weight(self, key: _Key) -> None:
        stage = self._pipeline.stages[key[0]]
        if stage.first:
            self._backward(key)
        elif not stage.last:
            stage_backward_weight(self._weights(stage), self._groups.pop(key))

    def _weights(self, stage: Stage) -> Iterator[nn.Parameter]:
        blocks = self._pipeline.model.blocks
        return (weight for number in stage.layers for weight in blocks[number].parameters() if weight.requires_grad)


def _some(value: Tensor | None) -> list[Tensor]:
    return [] if value is None else [value]


_DO: dict[str, Callable[[_Step, _Key], None]] = {
    schedule.FORWARD: _Step._forward,
    schedule.BACKWARD: _Step._backward,
    schedule.INPUT: _Step._backward_input,
    schedule.WEIGHT: _Step._backward_weight,
    schedule.SEND: _Step._send,
    schedule.RECEIVE: _Step._receive,
    schedule.SEND_GRADIENT: _Step._send_gradient,
    schedule.RECEIVE_GRADIENT: _Step._receive_gradient,
}
