"""One small training on a strategy, by the product's own step, optimizer and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.certify.fixture import STEPS, Batches, batch
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reader import Reader, read_into
from orchestrator.checkpoint.writer import Contents, save
from orchestrator.config.convert import to_dict
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.facts import provenance
from orchestrator.training.handover_check import reference_files
from orchestrator.training.job import make_trainer
from orchestrator.training.module import LanguageModule
from orchestrator.training.resolved import Resolved

REFERENCE_ROWS = 8
"""Sequences of the handover check."""
Place = tuple[str, tuple[tuple[int, int], ...]]
"""Name of a tensor, and the part of it."""


class Trial:
    """A model with its optimizer, placed and initialised; all ranks make it together.

    Args:
        resolved: the training, with its layout.
        parallel: the strategy, joined.
        seed: of the initial weights; None: the training's.
        micro_batch: sequences of a backward pass of this process; None: its whole share.
        skips: a step that is not finite is left out, and the training goes on; else it stops.

    Attributes:
        parallel: the strategy.
        model: placed.
        optimizer: over its parameters, with state.
        module: the step.
        losses: of the steps so far.
        norms: of the gradients of the steps so far.
    """

    def __init__(
        self,
        resolved: Resolved,
        parallel: ParallelStrategy,
        *,
        seed: int | None = None,
        micro_batch: int | None = None,
        skips: bool = False,
    ):
        train = replace(resolved.config.train, on_nonfinite="skip" if skips else "stop")
        self._resolved = replace(resolved, config=replace(resolved.config, train=train))
        config = self._resolved.config
        self.parallel = parallel
        self.module = LanguageModule(config, parallel=parallel)
        self.module.configure_model()
        self.model, self.optimizer = self.module.model, self.module.make_optimizer()
        parallel.initialize(self.model, config.seed if seed is None else seed)
        if micro_batch is not None:
            self.module.micro_batch = micro_batch
        self._rows: list[dict[str, Any]] = []
        self.module.record = lambda **values: self._rows.append(values)
        self.losses: list[float] = []
        self.norms: list[float] = []

    @property
    def seed(self) -> int:
        """Of the training's initial weights."""
        return self._resolved.config.seed

    def run(self, count: int) -> None:
        """Train so many steps more.

        Args:
            count: of steps.

        Raises:
            Diverged: a step was not finite, on all ranks.
        """
        steps = range(self.module.step, min(self.module.step + count, STEPS))
        trainer = make_trainer(self.parallel, [self.module.guard], deterministic=False)
        self._rows.clear()
        try:
            trainer.fit(self.module, Batches(steps, *self.parallel.data_share))
        finally:
            values = self.parallel.fetch([row[name] for name in ("loss", "grad_norm") for row in self._rows])
            self.losses += values[: len(self._rows)]
            self.norms += values[len(self._rows) :]

    # --- state ------------------------------------------------------------------------------------

    def shards(self) -> list[Shard]:
        """Return this process's parts of weights and optimizer state, as the strategy has them now."""
        return self.parallel.state_shards(self.model, self.optimizer)

    def state(self) -> dict[Place, Tensor]:
        """Return copies of them on the host."""
        return {place_of(shard): shard.data.detach().cpu().clone() for shard in self.shards()}

    def save(self, parent: Path) -> Path:
        """Write a checkpoint, with a reference batch for handovers. All ranks call it together.

        Args:
            parent: the directory of checkpoints.
        """
        rows = {name: array[:REFERENCE_ROWS] for name, array in batch(STEPS).items()}
        files = reference_files(self.model, self.parallel, rows)
        contents = Contents(provenance(self.parallel), to_dict(self._resolved.config), files)
        return Path(str(save(parent, self.module.step, self.shards(), self.parallel, contents)))

    def load(self, directory: Path) -> Checkpoint:
        """Fill weights and optimizer from a checkpoint of any layout, and go on after its step.

        Args:
            directory: of the checkpoint.
        """
        checkpoint, shards = Checkpoint(directory, look=False), self.shards()
        read_into(checkpoint, shards, check=self.parallel)
        self.parallel.adopt(self.model, self.optimizer, shards)
        self.module.step = checkpoint.step
        return checkpoint


def place_of(shard: Shard) -> Place:
    """Return which part of which tensor a shard is.

    Args:
        shard: of a strategy.
    """
    return shard.name, tuple((part.start, part.stop) for part in shard.slices)


def stored(directory: Path, places: Sequence[Place]) -> dict[Place, Tensor]:
    """Read parts of a checkpoint's tensors into host memory, past the strategy.

    Args:
        directory: of the checkpoint.
        places: the parts.
    """
    reader = Reader(Checkpoint(directory, look=False))
    return {place: reader.tensor(place[0], tuple(slice(*bounds) for bounds in place[1])) for place in places}


def differing(one: Mapping[Place, Tensor], other: Mapping[Place, Tensor]) -> list[str]:
    """List the tensors whose bits differ, or that only one side has.

    Args:
        one: parts of tensors on the host.
        other: the same parts.
    """
    names = {name for name, _ in one.keys() ^ other.keys()}
    names |= {place[0] for place in one.keys() & other.keys() if not _same_bits(one[place], other[place])}
    return sorted(names)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pair = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return bool(torch.equal(*pair))
