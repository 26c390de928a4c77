"""The callbacks of a run's trainer, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as lightning
import numpy as np

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.host_memory import HostMemory
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.data.model_files import TOKENIZER_FILE
from orchestrator.data.prepare import PreparedData
from orchestrator.data.source_figures import SourceBook
from orchestrator.data.stream import StepLoader, TokenStream
from orchestrator.observe.history import History
from orchestrator.observe.metrics import Metrics
from orchestrator.observe.progress import Progress
from orchestrator.observe.sink import SideChannels
from orchestrator.runs import identity
from orchestrator.runs.messages import say, warn
from orchestrator.runs.origin import model_files
from orchestrator.runs.own_parts import own_callbacks, own_loggers
from orchestrator.runs.run_directory import read_history
from orchestrator.runs.stored_model import files_of
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.callbacks.checkpointing import Checkpoints, Keeps
from orchestrator.training.callbacks.copy_watch import CopyWatch
from orchestrator.training.callbacks.evaluation import Samples, Validation, opening
from orchestrator.training.callbacks.own_state import OwnStates
from orchestrator.training.callbacks.preemption import StopOnSignal
from orchestrator.training.callbacks.replica_check import ReplicaCheck
from orchestrator.training.callbacks.snapshots import Snapshots
from orchestrator.training.callbacks.spike_watch import SpikeWatch
from orchestrator.training.callbacks.sweep_pruning import SweepPruning
from orchestrator.training.callbacks.task_watch import TaskWatch
from orchestrator.training.data_module import TokenDataModule
from orchestrator.training.divergence import FiniteGuard
from orchestrator.training.handover_check import make_batch
from orchestrator.training.module import LanguageModule
from orchestrator.training.preference import Preferences
from orchestrator.training.reference_scores import FILE as REFERENCE_FILE
from orchestrator.training.resolved import Resolved


@dataclass(frozen=True)
class Watchers:
    """The callbacks of a run, and what they share.

    Attributes:
        channels: to whom metrics and samples go.
        history: the run so far.
        metrics: records steps and evaluations.
        progress: the bar, in the process that shows one.
        spikes: looks for loss spikes.
        replicas: compares what devices must have alike.
        evaluation: of the held-out data.
        pruning: ends a run of a sweep that falls behind.
        samples: of text.
        tasks: asks tasks of lm-eval's.
        own: the user's callbacks.
        sources: what was taken of each.
        checkpoints: saves.
        snapshots: in the memory of the hosts.
        stop: on a signal.
        copies: says which copies of the model take part.
        say: prints a line, in the process that speaks.
        reference: the batch of the handover check; None where it is off.
    """

    channels: SideChannels
    history: History
    metrics: Metrics
    progress: Progress | None
    spikes: SpikeWatch
    replicas: ReplicaCheck
    evaluation: Validation
    pruning: SweepPruning
    samples: Samples
    tasks: TaskWatch
    own: list[lightning.Callback]
    sources: SourceBook
    checkpoints: Checkpoints
    snapshots: Snapshots
    stop: StopOnSignal
    copies: CopyWatch
    say: Callable[[str], None]
    reference: Mapping[str, np.ndarray] | None

    def callbacks(self, guard: FiniteGuard, island: lightning.Callback | None = None) -> list[lightning.Callback]:
        """List the callbacks in the order in which they see a step: nothing of a step that was not finite is kept.

        Args:
            guard: sees every step first.
            island: of a run with islands; its weights are those of all before anything else looks at them.
        """
        bar = [self.progress] if self.progress else []
        first, savers = [guard, self.copies, self.metrics], [self.checkpoints, self.snapshots]
        first += [island] if island is not None else []
        guards = [self.spikes, self.replicas]
        return [
            *first,
            *bar,
            *guards,
            self.evaluation,
            self.pruning,
            self.samples,
            self.tasks,
            *self.own,
            *savers,
            self.stop,
        ]


def make_watchers(
    resolved: Resolved,
    parallel: ParallelStrategy,
    tokens: TokenDataModule,
    module: LanguageModule,
    loader: StepLoader,
    *,
    leg: int,
    source: Checkpoint | None,
    restored: Checkpoint | None,
    provenance: Mapping[str, Any],
    mfu: Callable[[float], float | None],
    memory: HostMemory | None = None,
) -> Watchers:
    """Make what looks at `module`.

    Args:
        resolved: the run.
        parallel: the strategy.
        tokens: its data.
        module: one step of it.
        loader: its batches.
        leg: which start of the run this is, from 0.
        source: the checkpoint that the weights are from.
        restored: the same, if the run goes on from it.
        provenance: where it runs.
        mfu: of tokens per second.
        memory: of this host, for snapshots; None: there are none.
    """
    config, place, main = resolved.config, resolved.place, parallel.rank == 0
    # Rank 0 alone writes what carries it; the run directory may not be there on other hosts.
    run_uuid = identity.uuid_of(place.run_dir) if main else ""
    history = History(read_history(restored)[1] if restored and main else ())
    channels = SideChannels(warn)
    sources = SourceBook(loader, tokens.prepared.names)
    metrics = _metrics(resolved, parallel, loader, sources, module.step, leg, run_uuid, history, channels, mfu)
    shows = parallel.speaks and config.logger.progress
    progress = Progress(metrics, module.step, config.train.max_steps) if shows else None
    tell = _speaker(parallel, progress.say if progress else say) if main else _silent
    _set_guard(resolved, module, tell)
    data, batches, shown = tokens.prepared, tokens.evaluation(parallel), tokens.held_out or tokens.stream
    own = own_callbacks(config)
    states = OwnStates(own, speaks=main)
    if restored:
        states.restore(restored)
    keeps = _keeps(resolved, data, source, shown, states, main, module.preferences)
    about = {**provenance, "run": run_uuid}
    checkpoints = Checkpoints(place, resolved.asked, parallel, loader, keeps, about, metrics, history, tell)
    spikes, replicas = _guards(config, parallel, module.step, restored, metrics, checkpoints, tell)
    evaluation = Validation(metrics, config.train.eval_every, batches, tell, progress)
    return Watchers(
        channels=channels,
        history=history,
        metrics=metrics,
        progress=progress,
        spikes=spikes,
        replicas=replicas,
        evaluation=evaluation,
        pruning=SweepPruning(parallel, evaluation, config.train.max_steps, tell),
        samples=Samples(parallel, data.tokenizer, config, place.run_dir, metrics, channels, opening(shown)),
        tasks=TaskWatch(config, parallel, data.tokenizer, place.run_dir, metrics, channels, tell),
        own=own,
        sources=sources,
        checkpoints=checkpoints,
        snapshots=Snapshots(memory, config, parallel, checkpoints, metrics, leg, tell),
        stop=StopOnSignal(parallel, tell),
        copies=CopyWatch(parallel, tell),
        say=tell,
        reference=keeps.reference,
    )


def _guards(
    config: RunConfig,
    parallel: ParallelStrategy,
    step: int,
    restored: Checkpoint | None,
    metrics: Metrics,
    checkpoints: Checkpoints,
    tell: Callable[[str], None],
) -> tuple[SpikeWatch, ReplicaCheck]:
    """Return what may find that steps before were bad already, and let the checkpoints that it needs be kept."""
    spikes = SpikeWatch(config, tell)
    if restored:
        spikes.restore(restored)
    every = config.train.check_replicas_every
    replicas = ReplicaCheck(parallel, every, step, parallel.open_lane() if every else None, tell)
    metrics.heard, checkpoints.beside = spikes.see, spikes.save
    doubted = (lambda: spikes.trusted_step, lambda: replicas.trusted_step)
    checkpoints.trusted_step = lambda: min((at for ask in doubted if (at := ask()) is not None), default=None)
    return spikes, replicas


def _metrics(
    resolved: Resolved,
    parallel: ParallelStrategy,
    loader: StepLoader,
    sources: SourceBook,
    step: int,
    leg: int,
    run_uuid: str,
    history: History,
    channels: SideChannels,
    mfu: Callable[[float], float | None],
) -> Metrics:
    config = resolved.config
    return Metrics(
        resolved.place.run_dir,
        config.logger,
        fetch=parallel.fetch,
        compilations=parallel.compilations,
        tokens_after=loader.tokens_after,
        sources=sources.row,
        mfu=mfu,
        memory=lambda: parallel.target.memory_bytes(parallel.root_device),
        main=parallel.rank == 0,
        speaks=lambda: parallel.speaks,
        leg=leg,
        start_step=step,
        run_config=to_dict(resolved.asked),
        run_uuid=run_uuid,
        history=history,
        channels=channels,
        skips=config.train.on_nonfinite == "skip",
        loggers=own_loggers(config),
    )


def _set_guard(resolved: Resolved, module: LanguageModule, tell: Callable[[str], None]) -> None:
    """Let the guard look at what the step has left at the latest when something else does."""
    train, logger, checkpoint = resolved.config.train, resolved.config.logger, resolved.config.checkpoint
    snapshots = checkpoint.memory.every_steps if checkpoint.memory.enabled else None
    looks = (train.eval_every, train.sample.every_steps, train.tasks.every_steps, train.check_replicas_every)
    periods = (logger.every_steps, *looks, checkpoint.every_steps, snapshots)
    module.guard.due = lambda step: any(period and step % period == 0 for period in periods)
    module.guard.say = tell


def _keeps(
    resolved: Resolved,
    data: PreparedData,
    source: Checkpoint | None,
    shown: TokenStream,
    own: OwnStates,
    main: bool,
    preferences: Preferences | None,
) -> Keeps:
    """Return what travels with the weights; the first process alone saves the files."""
    config, files = resolved.config, dict[str, bytes]()
    if main:
        # As the model came with them, or those of the data's tokenizer.
        files = files_of(source) if source else {}
        files = files if TOKENIZER_FILE in files else {**data.tokenizer.files, **files}
        files |= {**data.given_files, **model_files(source)}
        if preferences is not None and preferences.live is None:
            files[REFERENCE_FILE] = preferences.reference.to_bytes()
    reference = make_batch(config, shown) if config.checkpoint.handover.enabled else None
    return Keeps(data.tokenizer, files, reference, own)


def _speaker(parallel: ParallelStrategy, speak: Callable[[str], None]) -> Callable[[str], None]:
    def tell(text: str) -> None:
        if parallel.speaks:
            speak(text)

    return tell


def _silent(text: str) -> None:
    """Of the processes one speaks."""
