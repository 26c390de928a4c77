"""Find where a run's numbers stopped being finite: recompute the step and watch every layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.finite import finite_flags
from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.pairs import RESPONSES
from orchestrator.distributed.exchange import exchange, new_topic
from orchestrator.models.protocol import ShardableModel
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.parallel_strategy import ParallelStrategy, StepHooks
from orchestrator.training.divergence import nonfinite_parts
from orchestrator.training.module import LanguageModule

_NAMED = 4  # tensors that are listed


@dataclass(frozen=True)
class Diagnosis:
    """The result of recomputing a step that was not finite.

    Attributes:
        state: weights and optimizer state that were not finite before the step already.
        layer: the first one whose numbers are not finite: `embed`, `layers.3`, `norm` or `loss`.
        phase: `forward`: its output; `backward`: the gradient of its output; `weights`: the gradient of its weights,
            while that of its output is finite; `` where no layer was found.
        micro_batch: of the step, from 0.
        ranks: processes that saw it.
        gradients: parameters whose gradients are not finite, as they are summed over the processes.
        gradient_ranks: processes that hold such a part of them.
        met: what was not finite in the step itself, before anything was computed again, by name: `loss`, and
            parameters by their gradients; with the processes that had it.
        loss: of the second time; None where not finite.
        grad_norm: likewise.
    """

    state: tuple[str, ...] = ()
    layer: str = ""
    phase: str = ""
    micro_batch: int | None = None
    ranks: tuple[int, ...] = ()
    gradients: tuple[str, ...] = ()
    gradient_ranks: tuple[int, ...] = ()
    met: dict[str, list[int]] = field(default_factory=dict)
    loss: float | None = None
    grad_norm: float | None = None

    @property
    def reproduced(self) -> bool:
        """Whether the step is not finite the second time either."""
        return self.loss is None or self.grad_norm is None

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for JSON."""
        return {**asdict(self), "reproduced": self.reproduced}

    def lines(self, size: int) -> list[str]:
        """Return what was found, in sentences, for a job of `size` processes."""
        found = []
        if self.state:
            found.append(f"not finite before the step already: {_some(self.state)}")
        if self.layer:
            what = {"forward": "the output", "backward": "the gradient"}.get(self.phase, "the gradient of its weights")
            phase = "forward" if self.phase == "forward" else "backward"
            where = f"micro-batch {self.micro_batch}{_on(self.ranks, size)}"
            found.append(f"began in {self.layer}: {what} is not finite ({phase} pass, {where})")
        elif self.gradients:
            where = _on(self.gradient_ranks, size)
            found.append(f"gradients that are not finite when they are summed: {_some(self.gradients)}{where}")
        elif self.grad_norm is None and not self.state:
            found.append("every gradient is finite, but the sum of their squares is not: they are too large for fp32")
        if not self.reproduced:
            found.append("computed a second time the step is finite: suspect the hardware, or a race in a kernel")
            if "loss" in self.met:
                found.append(f"the first time the loss was not finite{_on(self.met['loss'], size)}")
            elif self.met:
                ranks = sorted({rank for one in self.met.values() for rank in one})
                found.append(f"the first time gradients were not: {_some(tuple(self.met))}{_on(ranks, size)}")
        return found


def _on(ranks: Sequence[int], size: int) -> str:
    """Return which ranks of a job of `size` it was, to follow on a sentence; nothing where there is one."""
    return f", rank {', '.join(map(str, ranks))} of {size}" if size > 1 else ""


def find_nonfinite(shards: Sequence[Shard], parallel: ParallelStrategy, copies: bool = False) -> list[str]:
    """List the tensors that are not finite on some rank, on all ranks. All ranks call it together.

    Args:
        shards: this rank's parts.
        parallel: the strategy.
        copies: look at those, too, that another rank owns.
    """
    mine = [shard for shard in shards if shard.owned or copies]
    flags = finite_flags([shard.data for shard in mine])
    names = {shard.name for shard, good in zip(mine, flags, strict=True) if not good}
    if not parallel.any_raised(bool(names)):
        return []
    return _union(names, parallel)


def diagnose(module: LanguageModule, batch: Mapping[str, Any], step: int, own: Sequence[str] = ()) -> Diagnosis:
    """Compute `step` again and find the first layer that is not finite. All ranks call it together.

    Weights and optimizer state must be those from before the step, and stay so; no gradients are left.

    Args:
        module: the module of the run.
        batch: this rank's share of the step, as the loader gives it.
        step: number of the step, from 1.
        own: what this rank had put into it that was not finite, as `Diverged` has it.
    """
    parallel, model = module.parallel, module.model
    state = find_nonfinite(parallel.state_shards(model, module.optimizer), parallel, copies=True)
    module.step = step - 1
    watch = _Watch(model)
    with torch.enable_grad(), watch.watching(), parallel.uncompiled():
        placed = parallel.prepare_batch({name: value for name, value in batch.items() if name != RESPONSES})
        targets = parallel.sum_over_data((placed["targets"] != IGNORE_INDEX).sum()).clamp(min=1)
        hooks = StepHooks(watch.begin(module.seed_dropout), watch.end_forward)
        total = parallel.forward_backward(model, placed, module.micro_batch, targets, hooks)
    loss, norm = parallel.reduce_and_clip(model, total, None)
    bad = _by_rank([name for name in nonfinite_parts(parallel.step_parts) if name != "loss"], parallel)
    module.optimizer.zero_grad()
    parallel.finish_step()
    measured = [value if math.isfinite(value) else None for value in parallel.fetch([loss, norm])]
    first, ranks = _first(watch.found(parallel), parallel)
    micro_batch, phase, layer = first or (None, "", "")
    holders = tuple(sorted({rank for found in bad.values() for rank in found}))
    met = _by_rank(own, parallel)
    return Diagnosis(tuple(state), layer, phase, micro_batch, ranks, tuple(bad), holders, met, *measured)


class _Watch:
    """Flags of what the layers give and get, in the order in which it is computed."""

    def __init__(self, model: ShardableModel):
        self._units: list[tuple[str, nn.Module]] = [
            ("embed", model.embed),
            *((f"layers.{index}", block) for index, block in enumerate(model.blocks)),
            ("norm", model.norm),
        ]
        self._weights = [*self._units, ("head", model.head)]
        self._of, self._micro_batches = dict[int, str](), dict[str, int]()
        self._events: list[tuple[int, str, str]] = []
        self._flags: list[Tensor] = []
        self._micro_batch, self._forward = -1, False

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[Any] = [unit.register_forward_hook(self._hook(name)) for name, unit in self._units]
        # A strategy may put other tensors into the place of the parameters, whole ones, when the module is called.
        handles += [unit.register_forward_pre_hook(self._before(name, handles)) for name, unit in self._weights]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, seed: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Return what is called before a forward pass: it notes which micro-batch it is of, and calls `seed`."""

        def begin(micro_batch: int, part: int) -> None:
            self._micro_batch, self._forward = micro_batch, True
            seed(micro_batch, part)

        return begin

    def end_forward(self, loss: Tensor | None) -> None:
        if loss is not None:
            self._note(self._micro_batch, "forward", "loss", loss)
        # What is computed again in the backward pass, to save memory, was seen already.
        self._forward = False

    def found(self, parallel: ParallelStrategy) -> list[tuple[int, str, str]]:
        """Micro-batch, phase and layer of what is not finite on this rank, in the order of the computation."""
        good = parallel.fetch(self._flags)
        return [event for event, flag in zip(self._events, good, strict=True) if not flag]

    def _before(self, name: str, handles: list[Any]) -> Any:
        """Watch what a rank adds to the gradients of a module's weights, before it is summed over the ranks."""

        def note(weight: Tensor) -> None:
            if weight.grad is not None:
                self._note(self._micro_batches.get(name, self._micro_batch), "weights", name, weight.grad)

        def before(unit: nn.Module, args: tuple[Any, ...]) -> None:
            for weight in unit.parameters():
                if weight.requires_grad and id(weight) not in self._of:
                    self._of[id(weight)] = name
                    handles.append(weight.register_post_accumulate_grad_hook(note))

        return before

    def _hook(self, name: str) -> Any:
        def hook(unit: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._forward and isinstance(output, Tensor):
                number = self._micro_batch  # in a pipeline another one's forward pass may come before
                self._note(number, "forward", name, output)
                if output.requires_grad:
                    output.register_hook(lambda gradient: backward(number, gradient))

        def backward(number: int, gradient: Tensor) -> None:
            self._micro_batches[name] = number
            self._note(number, "backward", name, gradient)

        return hook

    def _note(self, micro_batch: int, phase: str, name: str, value: Tensor) -> None:
        self._events.append((micro_batch, phase, name))
        self._flags.append(_local(value).isfinite().all())


def _first(
    mine: Sequence[tuple[int, str, str]], parallel: ParallelStrategy
) -> tuple[tuple[int, str, str] | None, tuple[int, ...]]:
    """Return the earliest of what the ranks found, and which of them found it."""

    def earliest(told: list[str]) -> str:
        found = [json.loads(text) for text in told]
        best = min((event for events in found for event in events), key=_order, default=None)
        return json.dumps([best, [rank for rank, events in enumerate(found) if best in events]])

    text = exchange(parallel, parallel.broadcast(new_topic()), json.dumps(list(mine)), earliest)
    event, ranks = json.loads(text)
    return (tuple(event) if event else None), tuple(ranks)


def _order(event: Sequence[Any]) -> tuple[int, int, int, int]:
    """Sorts micro-batches, forward before backward, layers in the order of that pass, and a layer's weights last."""
    micro_batch, phase, layer = event
    kind, _, number = layer.partition(".")
    at = {"embed": -1, "norm": 1 << 30, "head": 1 << 31, "loss": 1 << 32}.get(kind, int(number or 0))
    return micro_batch, int(phase != "forward"), at if phase == "forward" else -at, int(phase == "weights")


def _by_rank(names: Sequence[str], parallel: ParallelStrategy) -> dict[str, list[int]]:
    """Gather what the ranks name, with the ranks that name it."""

    def merge(told: list[str]) -> str:
        found: dict[str, list[int]] = {}
        for rank, text in enumerate(told):
            for name in json.loads(text):
                found.setdefault(name, []).append(rank)
        return json.dumps(dict(sorted(found.items())))

    topic = parallel.broadcast(new_topic())
    result: dict[str, list[int]] = json.loads(exchange(parallel, topic, json.dumps(list(names)), merge))
    return result


def _union(names: set[str], parallel: ParallelStrategy) -> list[str]:
    def merge(told: list[str]) -> str:
        return json.dumps(sorted({name for text in told for name in json.loads(text)}))

    topic = parallel.broadcast(new_topic())
    result: list[str] = json.loads(exchange(parallel, topic, json.dumps(sorted(names)), merge))
    return result


def _local(value: Any) -> Tensor:
    tensor: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return tensor.detach()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
