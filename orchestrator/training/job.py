"""From a configuration to a job that is ready to train. Read this file first: a run goes in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as lightning
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.storage import locate
from orchestrator.chips.load import load_catalogue
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import ModelConfig, RunConfig
from orchestrator.data.model_files import TOKENIZER_FILE
from orchestrator.data.prepare import PreparedData
from orchestrator.data.stream import Position, StepLoader, TokenStream, validation_batches
from orchestrator.data.validation import ValidationData, mixture_lines, validation_data
from orchestrator.distributed.world import World
from orchestrator.errors import HardwareError
from orchestrator.hardware.target import Target
from orchestrator.hardware.target_table import job_devices
from orchestrator.models.protocol import ShardableModel
from orchestrator.models.remat import apply_remat
from orchestrator.observe.history import History
from orchestrator.observe.metrics import Metrics
from orchestrator.observe.progress import Progress
from orchestrator.observe.sink import SideChannels
from orchestrator.observe.throughput import mfu, peak_flops
from orchestrator.planner.estimate.flops import flops_per_token
from orchestrator.runs import identity
from orchestrator.runs.messages import say, warn
from orchestrator.runs.origin import model_files
from orchestrator.runs.own_parts import build_model, own_callbacks, own_loggers
from orchestrator.runs.provenance import software
from orchestrator.runs.run_directory import RunPaths, read_history
from orchestrator.runs.stored_model import files_of
from orchestrator.sharding import rules
from orchestrator.sharding.layout import resolve_layout
from orchestrator.strategies.environment import JobEnvironment
from orchestrator.strategies.parallel_strategy import ParallelStrategy, local_parameters
from orchestrator.training.callbacks.checkpointing import Checkpoints
from orchestrator.training.callbacks.evaluation import Samples, Validation, opening
from orchestrator.training.callbacks.preemption import StopOnSignal
from orchestrator.training.check import resolve_model
from orchestrator.training.handover_check import make_batch
from orchestrator.training.layout_choice import precision_of, settle_layout
from orchestrator.training.module import LanguageModule
from orchestrator.training.optimizer_setup import build_optimizer
from orchestrator.training.restore import data_position, restore_run, restore_weights


@dataclass
class Job:
    """A run, built: what `launch.run` drives."""

    trainer: lightning.Trainer
    module: LanguageModule
    loader: StepLoader
    parallel: ParallelStrategy
    stop: StopOnSignal
    own_callbacks: list[lightning.Callback]
    channels: SideChannels
    metrics: Metrics
    progress: Progress | None
    checkpoints: Checkpoints
    evaluation: Validation
    samples: Samples
    history: History
    restored: Checkpoint | None
    facts: dict[str, Any]
    leg: dict[str, Any]
    say: Callable[[str], None]


def build(config: RunConfig, parallel: ParallelStrategy, data: PreparedData, place: RunPaths, leg: int) -> Job:
    """Build the job of this process on a strategy that has joined the others.

    Args:
        leg: which start of the run this is, from 0.

    Raises:
        UserError: whatever of the configuration does not fit the data, the devices or the checkpoint.
    """
    model_config = resolve_model(config.model, data.vocab_size)
    model = place_model(config, model_config, parallel)
    parts, restoring = parallel.parts(model), place.resume_from is not None
    optimizer = build_optimizer(model, config.optim, parallel.root_device, parts, restoring)
    parallel.prepare_optimizer(model, optimizer)
    stream = _stream(config, data)
    restored = None
    if place.resume_from is None:
        _initialize(model, config, parallel)
    else:
        restored = restore_run(place.resume_from, config, parallel, model, optimizer, stream)
    step = restored.step if restored else 0
    loader, micro_batch = _loader(config, stream, parallel, data_position(restored, stream))
    module = LanguageModule(model, optimizer, parallel, config, micro_batch, step)
    return _assemble(config, parallel, data, place, leg, module, loader, restored)


def place_model(config: RunConfig, model_config: ModelConfig, parallel: ParallelStrategy) -> ShardableModel:
    """The model, described on the meta device, then each process's part of it allocated."""
    with torch.device("meta"):
        model = build_model(model_config, config.train.loss_chunk_tokens)
    remat = settle_layout(config, parallel.target, parallel.layout.devices).remat
    apply_remat(model, remat, parallel.checkpoint)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parallel.shard(model, rules.place(model.logical_axes(), shapes))
    return model


def _initialize(model: ShardableModel, config: RunConfig, parallel: ParallelStrategy) -> None:
    """The weights that a run starts with: random ones of its seed, or those of a checkpoint."""
    if config.train.init_from is None:
        parallel.initialize(model, config.seed)
    else:
        restore_weights(Checkpoint(locate(config.train.init_from), look=False), config, parallel, model)


def _stream(config: RunConfig, data: PreparedData) -> TokenStream:
    seq_len, mask = config.train.seq_len, config.data.document_mask
    return TokenStream(data.stores, data.weights, "train", seq_len, config.seed, mask)


def _loader(
    config: RunConfig, stream: TokenStream, parallel: ParallelStrategy, position: Position
) -> tuple[StepLoader, int]:
    """This rank's share of the steps from `position` on, and how many sequences of it one backward pass takes."""
    train = config.train
    sequences = train.global_batch_tokens // train.seq_len
    (rank, shares), steps = parallel.data_share, train.max_steps - position.step
    loader = StepLoader(stream, sequences, rank, shares, position, steps, config.data.prefetch)
    return loader, micro_batch_size(config, parallel)


def micro_batch_size(config: RunConfig, parallel: ParallelStrategy) -> int:
    """Sequences of one backward pass of this process."""
    train, layout, shares = config.train, parallel.layout, parallel.data_share[1]
    share = train.global_batch_tokens // train.seq_len // shares
    size = settle_layout(config, parallel.target, layout.devices).micro_batch
    if size == "auto":
        return share
    # The size is per device; a process may drive several.
    return min(share, size * layout.data_parallel // shares)


def _assemble(
    config: RunConfig,
    parallel: ParallelStrategy,
    data: PreparedData,
    place: RunPaths,
    leg: int,
    module: LanguageModule,
    loader: StepLoader,
    restored: Checkpoint | None,
) -> Job:
    """What looks at the run and keeps it, around the module that trains."""
    train, step, main = config.train, module.step, parallel.rank == 0
    facts, utilisation = _facts(config, module.model, data, parallel)
    side = provenance(parallel)
    # Rank 0 alone writes what carries it; the run directory may not be there on other hosts.
    run_uuid = identity.uuid_of(place.run_dir) if main else ""
    history = History(read_history(restored)[1] if restored and main else ())
    channels = SideChannels(warn)
    metrics = Metrics(
        place.run_dir,
        config.logger,
        fetch=parallel.fetch,
        compilations=parallel.compilations,
        tokens_per_step=train.global_batch_tokens,
        tokens_after=loader.tokens_after,
        mfu=utilisation,
        memory=lambda: parallel.target.memory_bytes(parallel.root_device),
        main=main,
        leg=leg,
        start_step=step,
        run_config=to_dict(config),
        run_uuid=run_uuid,
        history=history,
        channels=channels,
        skips=train.on_nonfinite == "skip",
        loggers=own_loggers(config),
    )
    progress = Progress(metrics, step, train.max_steps) if main and config.logger.progress else None
    tell = progress.say if progress else (say if main else _silent)
    stop = StopOnSignal(parallel, tell)
    validation = validation_data(config, data)
    held_out = validation.stream(config.data.document_mask)
    reference = make_batch(config, held_out or loader.stream) if config.checkpoint.handover.enabled else None
    files, sides = _travelling(config, data, restored, main), {**side, "run": run_uuid}
    keep = (data.tokenizer, files, sides, metrics, history, reference, tell)
    checkpoints = Checkpoints(place.checkpoints, place.run_dir, config, parallel, loader, *keep)
    batches = _validation(validation, held_out, parallel, module.micro_batch)
    evaluation = Validation(parallel, metrics, train.eval_every, batches, tell, progress)
    samples = Samples(
        parallel, data.tokenizer, config, place.run_dir, metrics, channels, opening(held_out or loader.stream)
    )
    periods = (config.logger.every_steps, train.eval_every, train.sample.every_steps, config.checkpoint.every_steps)
    guard, own = module.guard, own_callbacks(config)
    guard.due = lambda step: any(period and step % period == 0 for period in periods)
    guard.say = tell
    callbacks = [guard, metrics, *([progress] if progress else []), evaluation, samples, *own, checkpoints, stop]
    trainer = make_trainer(parallel, callbacks, train.deterministic)
    about = {"leg": leg, "start_step": step, "resumed_from": str(restored.directory) if restored else None, **side}
    seen = (own, channels, metrics, progress, checkpoints, evaluation, samples, history, restored)
    return Job(trainer, module, loader, parallel, stop, *seen, facts, about, tell)


def _travelling(config: RunConfig, data: PreparedData, restored: Checkpoint | None, main: bool) -> dict[str, bytes]:
    """The files that the model came with, as they were, or those of the data's tokenizer; the first process saves."""
    if not main:
        return {}
    if restored is None and config.train.init_from is not None:
        restored = Checkpoint(locate(config.train.init_from), look=False)
    files = files_of(restored) if restored else {}
    files = files if TOKENIZER_FILE in files else {**data.tokenizer.files, **files}
    return {**files, **model_files(config, restored)}


def make_strategy(config: RunConfig, target: Target, world: World) -> ParallelStrategy:
    """The strategy that the target runs on, with its layout filled in.

    Raises:
        LayoutError: the degrees do not fit the devices.
    """
    hardware = config.hardware
    devices = job_devices(hardware, target, world)
    layout = resolve_layout(settle_layout(config, target, devices).layout, devices)
    precision = precision_of(config, target)
    if target.strategy == "xla":
        from orchestrator.strategies.xla import XlaStrategy

        return XlaStrategy(target, world, layout, precision, hardware.timeout_seconds)
    if target.strategy == "dtensor":
        from orchestrator.strategies.dtensor import DTensorStrategy

        return DTensorStrategy(
            target,
            world,
            layout,
            precision,
            timeout_seconds=hardware.timeout_seconds,
            reduce_gradients=config.train.reduce_gradients,
            compile=hardware.compile,
        )
    raise HardwareError(
        f"the target '{target.name}' has no strategy in this version", got=target.strategy, allowed="dtensor, xla"
    )


def _validation(
    validation: ValidationData, stream: TokenStream | None, parallel: ParallelStrategy, micro_batch: int
) -> Callable[[], Iterable[dict[str, Any]]] | None:
    if stream is None:
        return None
    sequences = validation.sequences
    rank, shares = parallel.data_share
    batch = min(micro_batch, -(-sequences // shares))
    return lambda: validation_batches(stream, sequences, batch, rank, shares)


def _facts(
    config: RunConfig, model: ShardableModel, data: PreparedData, parallel: ParallelStrategy
) -> tuple[dict[str, Any], Callable[[float], float | None]]:
    """What is known of the run before its first step, and MFU as a function of tokens per second."""
    target, devices = parallel.target, parallel.layout.devices
    # What an own model computes no description says: its utilisation is unknown.
    flops = None if model.config._target_ else flops_per_token(model.config, config.train.seq_len)
    chip = config.hardware.chip if config.hardware.chip != "auto" else target.probe().chip
    figure = load_catalogue().get(chip).device_peak_flops(parallel.precision) if chip else None
    peak, source = peak_flops(target, figure, parallel.precision, parallel.root_device)

    facts = {
        "name": config.name,
        "parameters": sum(parameter.numel() for _, parameter in local_parameters(model)),
        "flops_per_token": flops,
        "peak_flops_per_device": peak,
        "peak_source": source,
        "vocab_size": model.config.vocab_size,
        "unigram_entropy_nats": data.unigram_entropy_nats,
        "data": data.describe(),
        "mixture": mixture_lines(data),
        "validation": validation_data(config, data).lines(),
    }
    return facts, lambda tokens_per_second: mfu(tokens_per_second, flops, peak, devices)


def provenance(parallel: ParallelStrategy) -> dict[str, Any]:
    """What a result may depend on: hardware, layout, precision, software."""
    probe = parallel.target.probe()
    return {
        "target": parallel.target.name,
        "device_names": list(probe.device_names),
        "devices": parallel.layout.devices,
        "hosts": parallel.world.hosts,
        "engine": parallel.world.engine,
        "layout": parallel.layout.as_dict(),
        "precision": parallel.precision,
        "software": software(),
    }


def make_trainer(parallel: ParallelStrategy, callbacks: list[Any], deterministic: bool) -> lightning.Trainer:
    return lightning.Trainer(
        strategy=parallel,
        # Lightning would look for an engine itself, and refuses Slurm's --ntasks.
        plugins=[JobEnvironment()],
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


def _silent(text: str) -> None:
    """Of the processes one speaks."""
