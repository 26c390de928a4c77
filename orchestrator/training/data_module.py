"""The product's LightningDataModule: the tokens of a configuration, in the order that a run has them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import lightning.pytorch as lightning

from orchestrator.config.batch_sizes import BatchSizes
from orchestrator.config.schema import RunConfig
from orchestrator.data.prepare import PreparedData, prepare
from orchestrator.data.skipping import merged
from orchestrator.data.stream import Batch, Position, StepLoader, TokenStream
from orchestrator.data.validation import ValidationData, validation_data
from orchestrator.data.validation_sets import ValidationBatches
from orchestrator.errors import CheckpointError
from orchestrator.strategies.parallel_strategy import ParallelStrategy, strategy_of
from orchestrator.training.resolved import settle_unplanned


class TokenDataModule(lightning.LightningDataModule):
    """The tokens of a configuration's `data`, in the order that a run of it has, and what it is evaluated on.

    Args:
        config: of the run: `data`, `seed`, and of `train` the batch, the length of sequences and the number of steps.
        prepared: the prepared data; None: the first process of each host prepares it, or finds it prepared.

    Attributes:
        position: from which training goes on.
        skipped: ranges of the training sequences that are left out: those of the configuration, and of the run so far.
    """

    def __init__(self, config: RunConfig, prepared: PreparedData | None = None):
        super().__init__()
        self.config = settle_unplanned(config)
        self.position, self.skipped = Position(), merged(config.data.skip)
        self._prepared = prepared

    @property
    def prepared(self) -> PreparedData:
        """The prepared stores and their tokenizer."""
        if self._prepared is None:
            self._prepared = prepare(self.config.data, progress=False, verify=False)
        return self._prepared

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, for `LanguageModule`."""
        return self.prepared.vocab_size

    @cached_property
    def stream(self) -> TokenStream:
        """The training sequences."""
        data, mask = self.prepared, self.config.data.document_mask
        train, chat = self.config.train, self.config.data.chat
        return TokenStream(data.stores, data.weights, "train", train.seq_len, self.config.seed, mask, chat=chat)

    @cached_property
    def validation(self) -> ValidationData:
        """What is held out of the sources, or given for validation."""
        return validation_data(self.config, self.prepared)

    @cached_property
    def held_out(self) -> TokenStream | None:
        """The sequences of an evaluation; None where there are none."""
        return self.validation.stream(self.config.data.document_mask)

    def steps(self, parallel: ParallelStrategy) -> StepLoader:
        """Return the loader of this process's share of the remaining steps.

        Args:
            parallel: the strategy.
        """
        train, (rank, shares) = self.config.train, parallel.step_share
        sequences, left = train.global_batch_tokens // train.seq_len, train.max_steps - self.position.step
        ahead = self.config.data.prefetch
        sizes = BatchSizes.of(train).divided(train.seq_len)
        return StepLoader(self.stream, sequences, rank, shares, self.position, left, ahead, self.skipped, sizes)

    def evaluation(self, parallel: ParallelStrategy) -> ValidationBatches | None:
        """Return this process's batches of an evaluation; None where there is no such data.

        Args:
            parallel: the strategy.
        """
        sets, (rank, shares) = self.validation.sets(self.config.data.document_mask), parallel.data_share
        if not sets:
            return None
        longest = max(len(one.indices) for one in sets)
        batch = min(micro_batch_size(self.config, parallel), -(-longest // shares))
        return ValidationBatches(sets, batch, rank, shares)

    # --- in a Trainer of the user's ---------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Prepare the stores; the other processes find them in the cache."""
        self.prepared  # noqa: B018 - the others find it in the cache

    def train_dataloader(self) -> _Steps:
        """Return the loader of this process's share of the remaining steps."""
        assert self.trainer is not None
        return _Steps(self.steps(strategy_of(self.trainer)), self.config.train.max_steps)

    def val_dataloader(self) -> ValidationBatches | list[Any]:
        """Return the validation batches of this process; none where there is no such data."""
        assert self.trainer is not None
        batches = self.evaluation(strategy_of(self.trainer))
        return [] if batches is None else batches

    def state_dict(self) -> dict[str, Any]:
        """Return what of the data was trained on, for a checkpoint."""
        assert self.trainer is not None
        step = self.trainer.global_step
        return {"step": step, **self.steps(strategy_of(self.trainer)).state(step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind what was trained on.

        Args:
            state_dict: as `state_dict` gives it.

        Raises:
            CheckpointError: it was other data, in which the position means nothing.
        """
        if state_dict["fingerprint"] != self.stream.fingerprint:
            raise CheckpointError(
                "the data is not what the checkpoint was trained on, so its position in it means nothing",
                got=f"fingerprint {self.stream.fingerprint[:12]}",
                allowed=f"fingerprint {state_dict['fingerprint'][:12]}",
                fix="give the same sources, weights, seed, train.seq_len and document mask",
            )
        sequence = state_dict["next_sequence"]
        # Checkpoints of the first version do not count tokens.
        tokens = state_dict.get("tokens", sequence * self.stream.seq_len)
        self.position = Position(state_dict["step"], sequence, tokens)
        self.skipped = merged([*self.config.data.skip, *state_dict.get("skipped", ())])


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


def micro_batch_size(config: RunConfig, parallel: ParallelStrategy) -> int:
    """Return the number of sequences of one backward pass of this process.

    Args:
        config: of the run, settled.
        parallel: the strategy.
    """
    train = config.train
    assert isinstance(train.micro_batch_size, int)
    # The size is per device; a process may drive several.
    ours = train.micro_batch_size * parallel.layout.data_parallel // parallel.data_share[1]
    return min(train.global_batch_tokens // train.seq_len // parallel.step_share[1], ours)
