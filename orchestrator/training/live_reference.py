"""The reference model of preferences, asked in every step (`train.preference.reference=live`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.config.schema import RunConfig
from orchestrator.models.lora import without_adapters
from orchestrator.models.protocol import ShardableModel
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.placed_model import build_placed


class LiveReference:
    """The model that a run began with: a second one on the devices, or the run's own without its adapters.

    Args:
        config: of the run, settled.
        parallel: the strategy, joined.

    Attributes:
        model: the second one, placed as the first; None where adapters are trained.
    """

    def __init__(self, config: RunConfig, parallel: ParallelStrategy):
        self.model: ShardableModel | None = None
        if config.train.preference.holds_copy(config.train.lora):
            self.model = build_placed(config, parallel).requires_grad_(False).eval()

    @contextmanager
    def asked(self, model: ShardableModel) -> Iterator[ShardableModel]:
        """Give the reference model, in evaluation.

        Args:
            model: that of the run; afterwards it is as before.
        """
        if self.model is not None:
            yield self.model
            return
        training = model.training
        model.eval()
        try:
            with without_adapters(model):
                yield model
        finally:
            model.train(training)
