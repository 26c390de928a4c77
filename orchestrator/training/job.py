"""Build the job that trains from a resolved run. Read this file first: it is in the order of a run."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as lightning

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.signing import Trust
from orchestrator.checkpoint.storage import locate
from orchestrator.data.prepare import PreparedData
from orchestrator.data.skipping import merged
from orchestrator.data.source_figures import labels_of
from orchestrator.data.stream import StepLoader, TokenStream
from orchestrator.distributed.replica_group import rejoins, replica_group
from orchestrator.distributed.world import World
from orchestrator.errors import HardwareError
from orchestrator.hardware.target import Target
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.adapter_state import adapters_state
from orchestrator.training.data_module import TokenDataModule
from orchestrator.training.facts import provenance, run_facts
from orchestrator.training.host_snapshots import newer_snapshots, open_host_memory, restore_snapshot
from orchestrator.training.island_member import IslandMember, island_member
from orchestrator.training.module import LanguageModule
from orchestrator.training.preference_reference import settle_reference
from orchestrator.training.resolved import Resolved
from orchestrator.training.restore import data_position, data_skipped, open_together, restore_run, restore_weights
from orchestrator.training.watchers import Watchers, make_watchers


@dataclass(frozen=True)
class Job:
    """A run, built: what `launch.run` drives.

    Attributes:
        resolved: what it is.
        parallel: over which devices.
        module: one step of it.
        loader: its batches.
        trainer: Lightning's, whose loop asks the one for the other.
        watchers: what looks at it between the steps, and keeps it.
        restored: the checkpoint that it goes on from; None for a new run.
        facts: what is known of it before its first step.
        leg: what is known of this start of it.
        trusted: whose checkpoints are believed.
        island: this process's part in a run with islands; None: the run has none.
    """

    resolved: Resolved
    parallel: ParallelStrategy
    module: LanguageModule
    loader: StepLoader
    trainer: lightning.Trainer
    watchers: Watchers
    restored: Checkpoint | None
    facts: dict[str, Any]
    leg: dict[str, Any]
    trusted: Trust
    island: IslandMember | None = None

    @property
    def done(self) -> bool:
        """Whether no step is left to train."""
        if self.island is not None:
            return self.island.ended
        return self.module.step >= self.module.config.train.max_steps

    @property
    def say(self) -> Callable[[str], None]:
        """Prints a line of the run, in the one process that speaks."""
        return self.watchers.say


def make_strategy(resolved: Resolved, target: Target, world: World) -> ParallelStrategy:
    """Make the strategy of the target, for the resolved layout; `join` is called next.

    Args:
        resolved: the run.
        target: whose devices they are.
        world: this process among the job's.

    Raises:
        HardwareError: the target has no strategy.
    """
    config, layout, precision = resolved.config, resolved.layout, resolved.precision
    seconds = config.hardware.timeout_seconds
    if target.strategy == "xla":
        from orchestrator.strategies.xla import XlaStrategy

        return XlaStrategy(target, world, layout, precision, seconds)
    if target.strategy == "dtensor":
        options: dict[str, Any] = {
            "timeout_seconds": seconds,
            "reduce_gradients": config.train.reduce_gradients,
            "compile": config.hardware.compile,
            "fp8": config.hardware.fp8,
        }
        if config.launch.fault_tolerance == "torchft":
            from orchestrator.strategies.replica_groups import ReplicaGroupStrategy

            return ReplicaGroupStrategy(target, world, layout, precision, replica_group(os.environ), **options)
        from orchestrator.strategies.dtensor import DTensorStrategy

        return DTensorStrategy(target, world, layout, precision, **options)
    raise HardwareError(
        f"the target '{target.name}' has no strategy in this version", got=target.strategy, allowed="dtensor, xla"
    )


def build(
    resolved: Resolved,
    parallel: ParallelStrategy,
    data: PreparedData,
    leg: int,
    trusted: Trust = Trust(),
    opened: Checkpoint | None = None,
    legs: Sequence[Mapping[str, Any]] = (),
) -> Job:
    """Build the job of this process on a strategy that has joined the others.

    Args:
        resolved: the run, whose directory is open.
        parallel: the strategy.
        data: what `resolved.config.data` names.
        leg: which start of the run this is, from 0.
        trusted: whose checkpoints are believed.
        opened: the checkpoint that this process has opened already, if it has: the one to go on or to start from.
        legs: the starts of the run before this one.

    Raises:
        UserError: whatever of the data, the devices or the checkpoint does not fit.
    """
    config, resumes = resolved.config, resolved.place.resume_from is not None
    module = LanguageModule(config, parallel=parallel)
    module.configure_model()
    memory = open_host_memory(resolved, parallel)
    snapshots = newer_snapshots(memory, resolved, parallel)
    module.make_optimizer(restoring=resumes or bool(snapshots) or rejoins(os.environ))
    tokens = TokenDataModule(config, data)
    module.watch_sources(labels_of(data.names))
    snapshot = restore_snapshot(snapshots, resolved, module, tokens.stream, trusted, legs)
    if snapshots and snapshot is None and not resumes:
        module.make_optimizer()
    source = snapshot or fill(resolved, module, tokens.stream, trusted, opened)
    restored = source if resumes else snapshot
    if module.average is not None:
        module.average.begin(restored)
    if memory is not None:
        memory.keep_only(snapshot.directory.name if snapshot else None)
    tokens.position = data_position(restored, tokens.stream)
    tokens.skipped = merged([*tokens.skipped, *data_skipped(restored, tokens.stream)])
    module.step = tokens.position.step
    island = island_member(config, parallel, module, tokens, restored, trusted)
    loader = island.loader if island else tokens.steps(parallel)
    facts, mfu = run_facts(resolved, parallel, module.model, tokens)
    side = provenance(parallel) | adapters_state(config, source, trusted, parallel, resolved.place.checkpoints)
    side |= _reference_state(resolved, module, tokens, loader, source, restored, trusted)
    watchers = make_watchers(
        resolved,
        parallel,
        tokens,
        module,
        loader,
        leg=leg,
        source=source,
        restored=restored,
        provenance=side,
        mfu=mfu,
        memory=memory,
    )
    if island is not None:
        island.attach(watchers.checkpoints, watchers.evaluation, watchers.reference)
    trainer = make_trainer(parallel, watchers.callbacks(module.guard, island), config.train.deterministic)
    resumed_from = str(restored.directory) if restored else None
    about = {"leg": leg, "start_step": module.step, "resumed_from": resumed_from, "host": platform.node(), **side}
    if restored:
        about["restored_from"] = "memory" if restored.partial else "storage"
    return Job(resolved, parallel, module, loader, trainer, watchers, restored, facts, about, trusted, island)


def fill(
    resolved: Resolved, module: LanguageModule, stream: TokenStream, trusted: Trust, opened: Checkpoint | None = None
) -> Checkpoint | None:
    """Give the model its weights: those of the run so far, those of other training, or random ones of the seed.

    Args:
        resolved: the run; `place.resume_from` is where it goes on.
        module: with model and optimizer, placed.
        stream: the data.
        trusted: whose checkpoints are believed.
        opened: the checkpoint, if this process has opened it already.

    Returns:
        The checkpoint that they are from.
    """
    config, resume_from = resolved.config, resolved.place.resume_from
    parallel, model = module.parallel, module.model
    if resume_from is not None:
        return restore_run(resume_from, resolved, parallel, model, module.optimizer, stream, trusted, opened)
    if config.train.init_from is None:
        parallel.initialize(model, config.seed)
        return None
    source = open_together(locate(config.train.init_from), trusted, parallel, opened)
    restore_weights(source, config, parallel, model, trusted=trusted)
    return source


def _reference_state(
    resolved: Resolved,
    module: LanguageModule,
    tokens: TokenDataModule,
    loader: StepLoader,
    source: Checkpoint | None,
    restored: Checkpoint | None,
    trusted: Trust,
) -> dict[str, Any]:
    """Let the reference model of preferences score what it has not yet, by the weights of the beginning."""
    begin = replace(resolved, paths=replace(resolved.place, resume_from=None))
    return settle_reference(
        module,
        resolved.config,
        tokens,
        loader,
        source,
        restored,
        begin=lambda: fill(begin, module, tokens.stream, trusted),
        again=lambda: fill(resolved, module, tokens.stream, trusted),
        trusted=trusted,
    )


class RunTrainer(lightning.Trainer):
    """A Trainer that leaves signals to the run: Lightning's raises at the end of a batch, on one rank, unsaved."""

    @property
    def received_sigterm(self) -> bool:
        """Nothing, for Lightning's loops."""
        return False


def make_trainer(parallel: ParallelStrategy, callbacks: list[Any], deterministic: bool) -> lightning.Trainer:
    """Make Lightning's trainer, whose own logging, checkpoints and validation are off.

    The product's callbacks do these, on every strategy alike.

    Args:
        parallel: the strategy, joined.
        callbacks: in the order in which they see a step.
        deterministic: refuse operations without a deterministic implementation.
    """
    # With several Lightning would wait for the device at every batch, to ask whether rank 0 got SIGTERM.
    parallel.world_size = 1
    return RunTrainer(
        strategy=parallel,
        accelerator=parallel.trainer_accelerator,
        devices=1,
        max_epochs=1,
        callbacks=callbacks,
        deterministic=deterministic or None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
