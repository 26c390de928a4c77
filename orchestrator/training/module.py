"""The product's LightningModule: one optimizer step and one evaluation, the same on every strategy.

A run of the product drives it, and so can a Lightning Trainer of the user's: then Lightning keeps the loop, the
callbacks and the loggers, and the strategy the checkpoints, which are those of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import lightning.pytorch as lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from orchestrator.config.batch_sizes import BatchSizes
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.config.transfer import describe_transfer, settle_transfer
from orchestrator.constants import IGNORE_INDEX
from orchestrator.distributed import standing
from orchestrator.errors import ConfigError
from orchestrator.models.loss import SourceLosses
from orchestrator.models.moe import LOSS, STATISTICS, router_figures
from orchestrator.models.protocol import ShardableModel, run_on
from orchestrator.optim.own import OwnOptimizer
from orchestrator.optim.schedule import schedule_of
from orchestrator.optim.steps import evaluated
from orchestrator.strategies.parallel_strategy import Batch, ParallelStrategy, StepHooks, strategy_of
from orchestrator.strategies.trainer_checkpoint import BESIDE
from orchestrator.training.data_module import TokenDataModule, micro_batch_size
from orchestrator.training.divergence import FiniteGuard
from orchestrator.training.optimizer_setup import PEAK, build_optimizer
from orchestrator.training.parameter_groups import describe_groups, trained
from orchestrator.training.placed_model import build_placed, factors_of
from orchestrator.training.preference import FIGURES, Preferences
from orchestrator.training.resolved import settle_optimizer, settle_unplanned, settle_vocabulary
from orchestrator.training.weight_average import WeightAverage


class IslandStep(Protocol):
    """What the step of an island has otherwise.

    Attributes:
        name: of the island: its dropout is not that of the others.
    """

    name: str

    def at(self, step: int) -> int:
        """Return the step of the run that the learning rate of an inner step is that of.

        Args:
            step: inner steps completed.
        """
        ...

    def exchange_gradients(self, targets: Tensor) -> None:
        """Make the gradients those of all islands, where they exchange gradients.

        Args:
            targets: tokens that are in the gradients.
        """
        ...


class LanguageModule(lightning.LightningModule):
    """Trains a language model on any strategy.

    A batch is one optimizer step's share of this process; it is cut into micro-batches here, so that the
    number of target tokens of the whole step is known before the first backward pass: the loss is the mean
    over the global batch's target tokens, whatever the layout and the accumulation.

    In a Trainer of the user's, `configure_model` and `configure_optimizers` make model and optimizer, and
    `train_loss`, `grad_norm`, `lr` and `val_loss` are logged. A run of the product calls the same two before there
    is a Trainer: the facts of the run and the handover check need a model, and a run without steps left no Trainer.

    Args:
        config: of the run: model, optimizer, schedule, seed and `train`. What is still `auto` in it is settled without
            a plan: no remat, all sequences of a process in one backward pass.
        vocab_size: tokens of the tokenizer; None: `model.vocab_size` says it.
        parallel: the strategy, joined; None: the Trainer's. Who gives it attaches `guard` as the first callback.

    Attributes:
        config: the same, settled.
        step: optimizer steps completed.
        lr: learning rate of the last step.
        record: called with the numbers of each step.
        parallel: the strategy. Like the following ones it is there when the model is placed.
        model: the placed model.
        micro_batch: sequences per backward pass on this process.
        guard: keeps what is not finite from the weights.
        optimizer: of the parameters, with state; there when it is configured.
        average: of the weights; None where none is kept.
        groups: a line for each entry of `optim.groups`.
        preferences: the step of a run that learns from pairs; None in others.
        island: what an island of a run with islands does otherwise; None where there are none.
        targets: tokens that the last step has learned from, on all processes together.

    Raises:
        ConfigError: the vocabulary is not known, or too small for the tokenizer.
    """

    parallel: ParallelStrategy
    model: ShardableModel
    micro_batch: int
    guard: FiniteGuard
    optimizer: torch.optim.Optimizer

    def __init__(self, config: RunConfig, vocab_size: int | None = None, parallel: ParallelStrategy | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.config = settle_vocabulary(settle_unplanned(settle_transfer(config)), vocab_size)
        self.step, self.lr = 0, 0.0
        self.average: WeightAverage | None = None
        self._sources: tuple[str, ...] = ()
        self.groups: list[str] = []
        self.record: Callable[..., None] = lambda **values: None
        self._given = parallel
        self._schedule, self._batches = schedule_of(config), BatchSizes.of(config.train)
        self._totals = torch.zeros(0)
        self.preferences: Preferences | None = None
        self.island: IslandStep | None = None
        self.targets = torch.zeros(())
        self._set: Tensor | None = None  # of the validation batch under way, a row of a one-hot matrix

    # --- set-up -----------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[lightning.Callback]:
        """Return the callback that keeps steps that are not finite from the weights, in a Trainer of the user's."""
        return [] if self._given else [_Guarding()]

    def configure_model(self) -> None:
        """Place the model, and in a Trainer of the user's initialize it. Once: later calls change nothing."""
        if "model" in self._modules:
            return
        self.parallel = self._given or strategy_of(self.trainer)
        if self._given is None:
            self.parallel.refuse_own_trainer()
            _refuse_parts_of_runs(self.config)
        self.model = build_placed(self.config, self.parallel)
        self.micro_batch = micro_batch_size(self.config, self.parallel)
        self.guard = FiniteGuard(self.parallel, self.config.train)
        if self.config.train.preference.loss is not None:
            self.preferences = Preferences(self.config, self.parallel)
        if self._given is None:
            self.parallel.initialize(self.model, self.config.seed)
            every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
            self.guard.due = lambda step: step % max(1, every) == 0
            self.record = self._log_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; the configured one is made unless that was done."""
        return self.optimizer if hasattr(self, "optimizer") else self.make_optimizer()

    def make_optimizer(self, restoring: bool = False) -> torch.optim.Optimizer:
        """Make the configured optimizer over the placed parameters.

        Args:
            restoring: its state is to be filled from a checkpoint.

        Raises:
            ConfigError: an optimizer of the user's cannot be made, or keeps what cannot be saved.
        """
        parallel, device = self.parallel, self.parallel.root_device
        config = settle_optimizer(self.config.optim, on_cpu=device.type == "cpu")
        whole, factors = parallel.layout.pipeline == 1, factors_of(self.config, self.model)
        members = trained(self.model, config.groups, whole, factors)
        if parallel.any_raised(not members):
            raise ConfigError(
                "a process would have nothing to train: its stage of the pipeline has no adapter",
                got=f"train.lora.target_modules={list(self.config.train.lora.target_modules)} on {parallel.layout}",
                allowed="names that layers of every stage have",
                fix="name further modules, or set layout.pipeline=1",
            )
        self.groups = [*describe_transfer(config, self.config.model), *describe_groups(members)]
        parts, seed = parallel.parts(self.model), self.config.seed
        self.optimizer = build_optimizer(self.model, config, device, parts, restoring, members, seed)
        if self.config.train.ema.decay is not None:
            self.average = WeightAverage(self.model, self.optimizer, parallel, self.config.train.ema)
        parallel.prepare_optimizer(self.model, self.optimizer)
        if self.average is not None and self._given is None:
            self.average.begin(None)  # a Trainer's checkpoint is read behind this
        return self.optimizer

    def transfer_batch_to_device(self, batch: Mapping[str, Any], device: Any, dataloader_idx: int) -> Batch:
        """Place `batch` as the strategy says; `device` and `dataloader_idx` are Lightning's, and not used."""
        # Pairs are placed twice, with weights the second time.
        return dict(batch) if self.preferences is not None or not batch else self.parallel.prepare_batch(batch)

    # --- training ---------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one optimizer step on this process's share of a batch."""
        standing.mark()
        if not batch:
            return  # an island that does something else than train
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        if isinstance(self.optimizer, OwnOptimizer):
            self.optimizer.train()  # after a restore; otherwise it is
        self._set_learning_rate()
        self._drop_figures()
        loss, norm, routing, figures = self.parallel.settled(self.model, self.step, lambda: self._gradients(batch))
        if routing is not None:
            figures |= router_figures(routing, self.config.model.moe.top_k)
        figures |= self.parallel.figures(self._batches.at(self.step))
        bad = self.guard.judge(self.step + 1, loss, norm)
        with self.parallel.update_unless(self.model, self.optimizer, bad):
            optimizer.step()
            if self.average is not None:
                self.average.update(self.step + 1, bad)
            if routing is not None and self.config.train.lora.rank is None:
                self.model.balance_experts(routing, bad)
        optimizer.zero_grad()
        self.parallel.finish_step()
        self.step += 1
        self.record(step=self.step, loss=loss, grad_norm=norm, lr=self.lr, **figures)
        standing.reached(self.step)

    def _gradients(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        """Compute and clip the gradients. Returns the loss, their norm, what the routers did, and further figures."""
        hooks, figures = StepHooks(self.seed_dropout, backward=self.manual_backward), dict[str, Tensor]()
        if self.preferences is not None:
            step = self.preferences.forward_backward(self.model, batch, self.micro_batch, hooks)
            total, targets, figures = step
        else:
            targets = self.parallel.sum_over_data((batch["targets"] != IGNORE_INDEX).sum()).clamp(min=1)
            total = self.parallel.forward_backward(self.model, batch, self.micro_batch, targets, hooks)
        self.targets = targets
        if self.island is not None:
            self.island.exchange_gradients(targets)
        loss, norm = self.parallel.reduce_and_clip(self.model, total, self.config.optim.grad_clip)
        routing = self._routing()
        if routing is not None:
            loss = loss - routing[:, LOSS].sum() / targets
        if figures:
            loss, figures = figures["loss"], {name: figures[name] for name in FIGURES}
        if (z_loss := self._z_loss()) is not None:
            figures["z_loss"] = z_loss / targets
            loss = loss - figures["z_loss"]
        return loss, norm, routing, figures | self._losses_of_sources()

    def _drop_figures(self) -> None:
        """Forget what was summed outside of a step: one that diverges is computed again to find out why."""
        self.model.take_routing()
        for sums in (self.model.head.z_loss, self.model.head.source_losses):
            if sums is not None:
                sums.take()

    def watch_sources(self, labels: Sequence[str]) -> None:
        """Record a loss of each source of the data, where there are several: `loss/LABEL`.

        Args:
            labels: of the sources, in their order.
        """
        if len(labels) > 1:
            self._sources, self.model.head.source_losses = tuple(labels), SourceLosses(len(labels))

    def _losses_of_sources(self) -> dict[str, Tensor]:
        """Return the mean loss of each source in this step; NaN of one that has no target in it."""
        if self.model.head.source_losses is None:
            return {}
        sums = self._summed(self.model.head.source_losses.take(), len(self._sources), 2)
        return {f"loss/{label}": of[0] / of[1] for label, of in zip(self._sources, sums.unbind(), strict=True)}

    def _z_loss(self) -> Tensor | None:
        """Return the z-loss of this step, on all processes together; None where there is none."""
        if self.model.head.z_loss is None:
            return None
        return self._summed(self.model.head.z_loss.take())

    def _routing(self) -> Tensor | None:
        """Return what the routers did in this step, on all processes together; None without experts."""
        taken, moe = self.model.take_routing(), self.config.model.moe
        if taken is None and not moe.experts:
            return None
        return self._summed(taken, self.config.model.layers, STATISTICS + moe.experts)

    def _summed(self, taken: Tensor | None, *shape: int) -> Tensor:
        """Sum what was taken over the job. A pipeline's rank may have no part of it; others wait for its zeros."""
        own = torch.zeros(shape, device=self.parallel.root_device) if taken is None else taken
        return self.parallel.sum_of_parts(own)

    def _set_learning_rate(self) -> None:
        at = self.step if self.island is None else self.island.at(self.step)
        self.lr = self._schedule(at, self.config.optim.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self._schedule(at, group[PEAK])

    def seed_dropout(self, micro_step: int, part: int) -> None:
        """Make the masks of a forward pass a function of the position in the run: a resumed one draws the same.

        Args:
            micro_step: number of the micro-batch in the step.
            part: which of the parts of the model that are here.
        """
        if self.config.model.dropout > 0 or self.config.train.lora.dropout > 0:
            key = f"dropout/{self.config.seed}/{self.step}/{micro_step}"
            key += f"/{self.island.name}" if self.island is not None else ""
            self.parallel.seed_masks(f"{key}/{part}" if part else key)

    def _log_step(self, step: int, **values: Any) -> None:
        self.log("train_loss", values["loss"], prog_bar=True)
        self.log_dict({name: value for name, value in values.items() if name != "loss"})

    # --- validation -------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Any]], sets: Sequence[int] = ()) -> Tensor:
        """Return the mean loss over the target tokens of `batches`, in nats. Every rank brings as many batches.

        Args:
            batches: as the loaders give them.
            sets: the number of the set of each batch, from 0; empty: they are one set.

        Returns:
            fp64 of shape [1 + sets]: the mean over all target tokens, and over those of each set.
        """
        self.model.eval()
        if self.preferences is not None:
            with evaluated(getattr(self, "optimizer", None)):
                losses = self.preferences.evaluate(self.model, batches, sets)
                self.parallel.release_gathered(self.model)
            self.model.train()
            return losses
        self.on_validation_epoch_start()
        count = max(sets, default=0) + 1
        # Rows of data, and no constants of the program: a traced one then serves every set.
        rows = [torch.arange(count).eq(number).unsqueeze(-1) for number in range(count)]
        self._totals = self._totals.expand(count, 2).clone()
        with evaluated(getattr(self, "optimizer", None)):
            for number, batch in enumerate(batches):
                self._set = rows[sets[number]].to(self._totals.device) if count > 1 else None
                self.validation_step(self.parallel.prepare_batch(batch), number)
            # Where other weights than those of the training were evaluated, it must not go on with what was gathered.
            self.parallel.release_gathered(self.model)
        self._set = None
        self.model.train()
        return self._validation_losses()

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self._totals = torch.zeros(1, 2, dtype=torch.float64, device=self.parallel.root_device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch's loss and target tokens to the sums."""
        standing.mark()
        with self.parallel.forward_context():
            loss = run_on(self.model, batch).double()
        found = torch.stack((loss, (batch["targets"] != IGNORE_INDEX).sum().double()))
        self._totals += found if self._set is None else torch.where(self._set, found, torch.zeros_like(found))
        self.parallel.finish_step()

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over all target tokens, in nats."""
        self.log("val_loss", self._validation_losses()[0].float(), prog_bar=True)

    def _validation_losses(self) -> Tensor:
        totals = self.parallel.sum_over_data(self._totals)
        totals = torch.cat((totals.sum(0, keepdim=True), totals))
        return totals[:, 0] / totals[:, 1].clamp(min=1)

    # --- checkpoints of a Trainer -----------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add configuration and tokenizer to the checkpoint."""
        data = getattr(self.trainer, "datamodule", None)
        files = dict(data.prepared.tokenizer.files) if isinstance(data, TokenDataModule) else {}
        checkpoint[BESIDE] = {"config": to_dict(self.config), "files": files}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the number of completed steps."""
        self.step = checkpoint["global_step"]


def _refuse_parts_of_runs(config: RunConfig) -> None:
    """Refuse in a Trainer of the user's what needs a run: adapters, which lie beside a base, and a reference's scores.

    Raises:
        ConfigError: the configuration has one of them.
    """
    found = {"train.lora.rank": config.train.lora.rank, "train.preference.loss": config.train.preference.loss}
    if asked := [f"{key}={value}" for key, value in found.items() if value is not None]:
        raise ConfigError(
            "a Trainer of one's own trains whole weights, and on no preferences",
            got=", ".join(asked),
            fix="train by orchestrator.train or the command line",
        )


class _Guarding(lightning.Callback):
    """The module's guard, which is made when its model is."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        pl_module.guard.on_train_batch_end(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.guard.on_train_end(trainer, pl_module)
