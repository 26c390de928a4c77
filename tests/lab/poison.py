"""A layer that gives NaN at chosen steps: the forward or the backward pass goes wrong in a place that is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from orchestrator.data.stream import StepLoader
from orchestrator.models.layers import Block
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.strategies.sharded_parts import local_part
from orchestrator.training.module import LanguageModule


@contextmanager
def poisoned(
    steps: Sequence[int], layer: int, phase: str, here: bool = True, first: int | None = None
) -> Iterator[None]:
    """Within it block `layer` spoils its output (`forward`) or the gradient of it (`backward`) at `steps`.

    Phase `weights` spoils what the rank adds to the gradient of one of the block's weights, and `summed` the rank's
    part of that gradient when it is summed.

    Args:
        steps: from 1; a step that is computed again is spoilt again.
        here: whether this rank takes part.
        first: only where the batch begins with this sequence of the stream: bad data, which can be left out.
    """
    spoilt, handles = list[Block](), list[Any]()
    seed, compute, forward = LanguageModule.seed_dropout, ParallelStrategy.forward_backward, Block.forward

    move, loaders = StepLoader.__init__, list[StepLoader]()

    def keep(self: StepLoader, *args: Any, **options: Any) -> None:
        move(self, *args, **options)
        loaders[:] = [self]

    def bad(step: int) -> bool:
        return step + 1 in steps and (first is None or loaders[0].first(step) == first)

    def begin(self: LanguageModule, *place: int) -> None:
        spoilt[:] = [self.model.blocks[layer]] if bad(self.step) else []
        seed(self, *place)

    def watched(self: ParallelStrategy, *args: Any, **options: Any) -> Any:
        result = compute(self, *args, **options)
        if phase == "summed" and here and any(True for _ in spoilt):
            for name, parameter in args[0].named_parameters():
                if name == f"layers.{layer}.mlp.up.weight":
                    local_part(parameter.grad).fill_(torch.nan)
        for handle in handles:
            handle.remove()
        handles.clear()
        spoilt.clear()
        return result

    def spoil(self: Block, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        if not here or not any(block is self for block in spoilt):
            return output
        if phase == "summed":
            return output
        if phase == "weights":
            handles.append(self.mlp.up.weight.register_hook(lambda gradient: gradient * torch.nan))
            return output
        if phase == "forward":
            # A block with experts gives what its router did, too.
            return (output[0] * torch.nan, *output[1:]) if isinstance(output, tuple) else output * torch.nan
        output = output.clone()
        output.register_hook(lambda gradient: gradient * torch.nan)
        return output

    with (
        mock.patch.object(StepLoader, "__init__", keep),
        mock.patch.object(LanguageModule, "seed_dropout", begin),
        mock.patch.object(ParallelStrategy, "forward_backward", watched),
        mock.patch.object(Block, "forward", spoil),
    ):
        yield


@contextmanager
def left_out(steps: Sequence[int]) -> Iterator[None]:
    """Within it the module does nothing at `steps` but count them: what a skipped step must be equal to."""
    training_step = LanguageModule.training_step

    def step(self: LanguageModule, batch: Any, index: int) -> None:
        if self.step + 1 not in steps:
            return training_step(self, batch, index)
        self._set_learning_rate()
        self.step += 1
        nothing = torch.zeros((), device=self.parallel.root_device)
        self.record(step=self.step, loss=nothing, grad_norm=nothing, lr=self.lr)
        return None

    with mock.patch.object(LanguageModule, "training_step", step):
        yield
