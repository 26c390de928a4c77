"""An exponential moving average of the weights: one more tensor of each parameter's optimizer state, `ema`.

So it is split as the parameter is, travels in checkpoints as `optimizer.ema.NAME`, and moves between layouts and
engines like every other tensor of the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from orchestrator.checkpoint.averaged import AVERAGE, has_average
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.config.schema import EmaConfig
from orchestrator.models.protocol import ShardableModel
from orchestrator.optim.steps import store
from orchestrator.strategies.parallel_strategy import ParallelStrategy


class WeightAverage:
    """The average of the weights that an optimizer trains.

    Args:
        model: placed.
        optimizer: over its parameters, with its state; not yet placed by the strategy.
        parallel: the strategy.
        config: how it is averaged.
    """

    def __init__(
        self, model: ShardableModel, optimizer: torch.optim.Optimizer, parallel: ParallelStrategy, config: EmaConfig
    ):
        assert config.decay is not None
        self._model, self._optimizer, self._parallel = model, optimizer, parallel
        self._decay, self._every = config.decay, config.every_steps
        self._local = parallel.parts(model).local
        for parameter in self._parameters():
            optimizer.state[parameter][AVERAGE] = torch.zeros_like(parameter, requires_grad=False)

    def _parameters(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's part of each weight, and of its average."""
        for parameter in self._parameters():
            yield self._local(parameter), self._local(self._optimizer.state[parameter][AVERAGE])

    @torch.no_grad()
    def begin(self, restored: Checkpoint | None) -> None:
        """Begin with the weights as they are, unless the average was restored.

        Args:
            restored: the checkpoint that the run goes on from; None for a new run.
        """
        if restored is None or not has_average(restored):
            for weight, average in self._pairs():
                average.copy_(weight)

    @torch.no_grad()
    def update(self, step: int, bad: Tensor) -> None:
        """Take in the weights behind a step, where a period ends.

        Args:
            step: optimizer steps completed.
            bad: bool scalar on the device; where it is true the average stays to the bit as it is.
        """
        if step % self._every:
            return
        for weight, average in self._pairs():
            store(average, torch.lerp(weight, average, self._decay), bad)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averages for its weights, and the averages are these: both to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        self._parallel.release_gathered(self._model)
        for weight, average in self._pairs():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
