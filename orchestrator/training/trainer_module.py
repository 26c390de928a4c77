"""The product's own training in a Lightning Trainer of the user's: a module and a data module from one configuration.

`orchestrator.train` does more: it plans, checks memory, watches the processes and looks back. Here Lightning keeps the
loop, the callbacks and the loggers, and the strategy the checkpoints, which are those of the product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from orchestrator.config.convert import to_dict
from orchestrator.config.schema import MuonConfig, RunConfig
from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.prepare import PreparedData, prepare
from orchestrator.data.stream import Batch, Position, StepLoader, TokenStream, ValidationBatches, validation_batches
from orchestrator.data.validation import validation_data
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.strategies.trainer_checkpoint import BESIDE
from orchestrator.training.check import resolve_model
from orchestrator.training.module import LanguageModule
from orchestrator.training.optimizer_setup import build_optimizer
from orchestrator.training.placed_model import build_placed


def strategy_of(trainer: lightning.Trainer) -> ParallelStrategy:
    """Return the strategy of `trainer`.

    Raises:
        ConfigError: it is none of the product's.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy, ParallelStrategy):
        raise ConfigError(
            "this module and its data need a strategy of orchestrator's",
            got=type(strategy).__name__,
            fix="lightning.Trainer(strategy=orchestrator.DTensorStrategy.from_environment())",
        )
    return strategy


class TrainerLanguageModule(LanguageModule):
    """`LanguageModule` for a Trainer of the user's: it makes its model and its optimizer when Lightning asks for them.

    Logged are `train_loss`, `grad_norm` and `lr` at each step and `val_loss`. A batch is a step's, as `TokenDataModule`
    gives it: gradients are accumulated within it, by `train.micro_batch_size`.

    Args:
        config: of the run: model, optimizer, schedule, seed and `train`; what is `auto` in `train.remat` is none.
        vocab_size: tokens of the tokenizer; None: `model.vocab_size` says it.

    Raises:
        ConfigError: the vocabulary is not known, or too small for the tokenizer.
    """

    def __init__(self, config: RunConfig, vocab_size: int | None = None):
        lightning.LightningModule.__init__(self)
        self._begin(config, 0)
        if vocab_size is None and config.model.vocab_size == "auto":
            raise ConfigError(
                "the size of the vocabulary is not known",
                got="model.vocab_size=auto",
                fix="give TrainerLanguageModule the tokenizer's: vocab_size=data.vocab_size",
            )
        self._model_config = resolve_model(config.model, vocab_size) if vocab_size is not None else config.model
        self._totals = torch.zeros(0)

    def configure_callbacks(self) -> list[lightning.Callback]:
        """Return the callback that keeps steps that are not finite from the weights."""
        return [_Guarding()]

    def configure_model(self) -> None:
        """Build the model on the meta device, shard and initialize it."""
        if "model" in self._modules:
            return
        parallel, config = strategy_of(self.trainer), self.config
        remat = "none" if config.train.remat == "auto" else config.train.remat
        model = build_placed(self._model_config, config.train.loss_chunk_tokens, remat, parallel)
        parallel.initialize(model, config.seed)
        self._take(model, parallel, _micro_batch(config, parallel))
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        self.guard.due = lambda step: step % max(1, every) == 0
        self.record = self._log_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the configured optimizer over the sharded parameters."""
        parts = self.parallel.parts(self.model)
        optim = self.config.optim
        if isinstance(optim, MuonConfig) and optim.ns_dtype == "auto":
            optim = replace(optim, ns_dtype="fp32" if self.parallel.root_device.type == "cpu" else "bf16")
        optimizer = build_optimizer(self.model, optim, self.parallel.root_device, parts)
        self.parallel.prepare_optimizer(self.model, optimizer)
        self._optimizer = optimizer
        return optimizer

    def _log_step(self, step: int, **values: Any) -> None:
        self.log("train_loss", values["loss"], prog_bar=True)
        self.log_dict({"grad_norm": values["grad_norm"], "lr": values["lr"]})

    # --- validation -------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self._totals = torch.zeros(2, dtype=torch.float64, device=self.parallel.root_device)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add a batch's loss and target tokens to the sums."""
        with self.parallel.forward_context():
            self._totals[0] += self.model(**batch).double()
        self._totals[1] += (batch["targets"] != IGNORE_INDEX).sum()
        self.parallel.finish_step()

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over all target tokens, in nats."""
        totals = self.parallel.sum_over_data(self._totals)
        self.log("val_loss", (totals[0] / totals[1].clamp(min=1)).float(), prog_bar=True)

    # --- checkpoints ------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add configuration and tokenizer to the checkpoint."""
        config: dict[str, Any] = to_dict(self.config)
        config["model"]["vocab_size"] = self._model_config.vocab_size
        data = getattr(self.trainer, "datamodule", None)
        files = dict(data.prepared.tokenizer.files) if isinstance(data, TokenDataModule) else {}
        checkpoint[BESIDE] = {"config": config, "files": files}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the number of completed steps."""
        self.step = checkpoint["global_step"]


class _Guarding(lightning.Callback):
    """The module's guard, which is made when its model is."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        pl_module.guard.on_train_batch_end(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.guard.on_train_end(trainer, pl_module)


class TokenDataModule(lightning.LightningDataModule):
    """The tokens of a configuration's `data`, in the order that a run of it has, and what it is evaluated on.

    Args:
        config: of the run: `data`, `seed`, and of `train` the batch, the length of sequences and the number of steps.

    Attributes:
        prepared: the stores and the tokenizer; made by the first process of each host, or found.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config
        self._prepared: PreparedData | None = None
        self._position = Position()
        self._stream: TokenStream | None = None

    @property
    def prepared(self) -> PreparedData:
        """The prepared stores and their tokenizer."""
        if self._prepared is None:
            self._prepared = prepare(self.config.data, progress=False, verify=False)
        return self._prepared

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, for `TrainerLanguageModule`."""
        return self.prepared.vocab_size

    @property
    def _sequences(self) -> int:
        """Sequences of a step, of all processes."""
        return self.config.train.global_batch_tokens // self.config.train.seq_len

    def prepare_data(self) -> None:
        """Prepare the stores; the other processes find them in the cache."""
        self.prepared  # noqa: B018 - the others find it in the cache

    def setup(self, stage: str) -> None:
        """Make the stream of training sequences."""
        train, data = self.config.train, self.prepared
        mask = self.config.data.document_mask
        self._stream = TokenStream(data.stores, data.weights, "train", train.seq_len, self.config.seed, mask)

    def train_dataloader(self) -> _Steps:
        """Return the loader of this process's share of the remaining steps."""
        assert self._stream is not None
        assert self.trainer is not None
        rank, shares = strategy_of(self.trainer).data_share
        left = self.config.train.max_steps - self._position.step
        prefetch = self.config.data.prefetch
        loader = StepLoader(self._stream, self._sequences, rank, shares, self._position, left, prefetch)
        return _Steps(loader, self.config.train.max_steps)

    def val_dataloader(self) -> ValidationBatches | list[Any]:
        """Return the validation batches of this process; none where there is no such data."""
        assert self.trainer is not None
        data = validation_data(self.config, self.prepared)
        stream = data.stream(self.config.data.document_mask)
        if stream is None:
            return []
        parallel = strategy_of(self.trainer)
        rank, shares = parallel.data_share
        batch = min(_micro_batch(self.config, parallel), -(-data.sequences // shares))
        return validation_batches(stream, data.sequences, batch, rank, shares)

    def state_dict(self) -> dict[str, Any]:
        """Return what of the data was trained on, for a checkpoint."""
        assert self._stream is not None
        assert self.trainer is not None
        done = self.trainer.global_step - self._position.step
        return {
            "step": self.trainer.global_step,
            "next_sequence": self._position.sequence + done * self._sequences,
            "fingerprint": self._stream.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind what was trained on.

        Args:
            state_dict: as `state_dict` gives it.

        Raises:
            CheckpointError: it was other data, in which the position means nothing.
        """
        assert self._stream is not None
        if state_dict["fingerprint"] != self._stream.fingerprint:
            raise CheckpointError(
                "the data is not what the checkpoint was trained on, so its position in it means nothing",
                got=f"fingerprint {self._stream.fingerprint[:12]}",
                allowed=f"fingerprint {state_dict['fingerprint'][:12]}",
                fix="give the same sources, weights, seed, train.seq_len and document mask",
            )
        step, sequence = state_dict["step"], state_dict["next_sequence"]
        self._position = Position(step, sequence, sequence * self.config.train.seq_len)


class _Steps:
    """The steps that are left, as the end of the one epoch that Lightning sees: it counts those before, too."""

    def __init__(self, loader: StepLoader, total: int):
        self._loader, self._total = loader, total

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)

    # Lightning asks these of a loader that can go on in the middle; the position is the data module's.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _micro_batch(config: RunConfig, parallel: ParallelStrategy) -> int:
    """Sequences of one backward pass of this process."""
    shares = parallel.data_share[1]
    share = config.train.global_batch_tokens // config.train.seq_len // shares
    size = config.train.micro_batch_size
    return share if size == "auto" else min(share, size * parallel.layout.data_parallel // shares)
