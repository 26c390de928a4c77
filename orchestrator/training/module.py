"""One optimizer step, the same on every strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from orchestrator.config.schema import RunConfig
from orchestrator.constants import IGNORE_INDEX
from orchestrator.models.protocol import ShardableModel
from orchestrator.optim.schedule import schedule_of
from orchestrator.strategies.parallel_strategy import Batch, ParallelStrategy
from orchestrator.training.divergence import FiniteGuard
from orchestrator.training.optimizer_setup import PEAK


class LanguageModule(lightning.LightningModule):
    """Trains a language model that is already placed on its devices; `TrainerLanguageModule` places its own.

    A batch is one optimizer step's share of this process; it is cut into micro-batches here, so that the
    number of target tokens of the whole step is known before the first backward pass: the loss is the mean
    over the global batch's target tokens, whatever the layout and the accumulation.

    Args:
        model: placed by `parallel.shard`; called with tokens, positions, documents and targets.
        optimizer: over its parameters, with state.
        parallel: the strategy.
        config: the run.
        micro_batch: sequences per backward pass on this process.
        step: optimizer steps completed.

    Attributes:
        guard: keeps what is not finite from the weights.
    """

    def __init__(
        self,
        model: ShardableModel,
        optimizer: torch.optim.Optimizer,
        parallel: ParallelStrategy,
        config: RunConfig,
        micro_batch: int,
        step: int,
    ):
        super().__init__()
        self._begin(config, step)
        self._take(model, parallel, micro_batch)
        self._optimizer = optimizer

    def _begin(self, config: RunConfig, step: int) -> None:
        self.automatic_optimization = False
        self.config, self.step = config, step
        self.lr = 0.0
        self.record: Callable[..., None] = lambda **values: None  # set by the metrics callback
        self._schedule = schedule_of(config)

    def _take(self, model: ShardableModel, parallel: ParallelStrategy, micro_batch: int) -> None:
        self.model, self.parallel, self.micro_batch = model, parallel, micro_batch
        self.guard = FiniteGuard(parallel, self.config.train)
        self._dropout = model.config.dropout > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that the module was given."""
        return self._optimizer

    def transfer_batch_to_device(self, batch: Mapping[str, Any], device: Any, dataloader_idx: int) -> Batch:
        """Place `batch` as the strategy says; `device` and `dataloader_idx` are Lightning's, and not used."""
        return self.parallel.prepare_batch(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one optimizer step on this process's share of a batch."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        self._set_learning_rate()
        targets = self.parallel.sum_over_data((batch["targets"] != IGNORE_INDEX).sum()).clamp(min=1)
        total = torch.zeros((), device=self.parallel.root_device)
        for part, last in self.micro_batches(batch):
            with self.parallel.backward_context(self.model, last):
                with self.parallel.forward_context():
                    loss = self.model(**part) / targets
                self.manual_backward(loss)
            total += loss.detach()
        loss, norm = self.parallel.reduce_and_clip(self.model, total, self.config.optim.grad_clip)
        bad = self.guard.judge(self.step + 1, loss, norm)
        with self.parallel.update_unless(self.model, self._optimizer, bad):
            optimizer.step()
        optimizer.zero_grad()
        self.parallel.finish_step()
        self.step += 1
        self.record(step=self.step, loss=loss, grad_norm=norm, lr=self.lr)

    def _set_learning_rate(self) -> None:
        self.lr = self._schedule(self.step, self.config.optim.lr)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule(self.step, group[PEAK])

    def micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, bool]]:
        """Yield the parts of a step's `batch`, and whether each is the last one; dropout is seeded for each."""
        size = batch["targets"].shape[0]
        for index, start in enumerate(range(0, size, self.micro_batch)):
            self._seed_dropout(index)
            part = {name: value[start : start + self.micro_batch] for name, value in batch.items()}
            yield part, start + self.micro_batch >= size

    def _seed_dropout(self, micro_step: int) -> None:
        # A function of the position in the run, so that a resumed run draws the same masks without saved state.
        if self._dropout:
            self.parallel.seed_masks(f"dropout/{self.config.seed}/{self.step}/{micro_step}")


@torch.no_grad()
def evaluate(model: ShardableModel, parallel: ParallelStrategy, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Compute the mean loss over the target tokens of `batches`, in nats. Every rank brings as many batches.

    Args:
        model: placed.
        parallel: the strategy.
        batches: as the loaders give them.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=parallel.root_device)
    for batch in batches:
        placed = parallel.prepare_batch(batch)
        with parallel.forward_context():
            totals[0] += model(**placed).double()
        totals[1] += (placed["targets"] != IGNORE_INDEX).sum()
        parallel.finish_step()
    model.train()
    totals = parallel.sum_over_data(totals)
    return totals[0] / totals[1].clamp(min=1)
