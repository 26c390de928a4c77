"""From a configuration to a job that is ready to train. Read this file first: a run goes in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as lightning
import torch

from orchestrator.checkpoint.verify import Checkpoint
from orchestrator.chips.catalogue import load as load_chips
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import ModelConfig, RunConfig
from orchestrator.data.prepare import PreparedData
from orchestrator.data.stream import StepLoader, TokenStream, validation_batches
from orchestrator.errors import CheckpointError, HardwareError
from orchestrator.hardware.base import Target
from orchestrator.hardware.world import World
from orchestrator.models.decoder import Decoder
from orchestrator.models.remat import apply_remat
from orchestrator.observe.metrics import Metrics
from orchestrator.observe.progress import Progress
from orchestrator.observe.throughput import mfu, peak_flops
from orchestrator.planner.flops import flops_per_token, parameter_count
from orchestrator.resilience.preemption import StopOnSignal
from orchestrator.sharding import rules
from orchestrator.sharding.layout import Layout, resolve_layout
from orchestrator.strategies.base import ParallelStrategy
from orchestrator.train.check import resolve_model
from orchestrator.train.checkpointing import Checkpoints, restore, software
from orchestrator.train.evaluation import Evaluation, Samples
from orchestrator.train.module import LanguageModule
from orchestrator.train.optim import build_optimizer
from orchestrator.train.run import Place


@dataclass
class Job:
    """A run, built: what `train.run` drives."""

    trainer: lightning.Trainer
    module: LanguageModule
    loader: StepLoader
    parallel: ParallelStrategy
    stop: StopOnSignal
    metrics: Metrics
    progress: Progress | None
    checkpoints: Checkpoints
    evaluation: Evaluation
    samples: Samples
    facts: dict[str, Any]
    leg: dict[str, Any]
    say: Callable[[str], None]


def build(config: RunConfig, parallel: ParallelStrategy, data: PreparedData, place: Place, leg: int) -> Job:
    """Build the job of this process on a strategy that has joined the others.

    Raises:
        UserError: whatever of the configuration does not fit the data, the devices or the checkpoint.
    """
    train, target = config.train, parallel.target
    layout = parallel.layout
    model_config = resolve_model(config.model, data.vocab_size)

    with torch.device("meta"):
        model = Decoder(model_config, train.loss_chunk_tokens)
    apply_remat(model, train.remat)
    placements = rules.place(model.logical_axes(), {name: tuple(p.shape) for name, p in model.named_parameters()})
    parallel.shard(model, placements)
    optimizer = build_optimizer(model, config.optim, parallel.root_device)

    stream = TokenStream(data.stores, data.weights, "train", train.seq_len, config.seed, config.data.document_mask)
    step = 0
    if place.resume_from is None:
        parallel.initialize(model, config.seed)
    else:
        step = _restore(Checkpoint(place.resume_from), config, parallel, model, optimizer, stream)

    sequences = train.global_batch_tokens // train.seq_len
    share = sequences // layout.data_parallel
    loader = StepLoader(
        stream,
        sequences,
        layout.data_rank(parallel.rank),
        layout.data_parallel,
        step,
        train.max_steps - step,
        config.data.prefetch,
    )
    micro_batch = share if train.micro_batch_size == "auto" else train.micro_batch_size
    module = LanguageModule(model, optimizer, parallel, config, micro_batch, step)

    facts, utilisation = _facts(config, model_config, data, target, layout, parallel)
    metrics = Metrics(
        place.run_dir,
        config.logger,
        reduce=parallel.sum_over_data,
        tokens_per_step=train.global_batch_tokens,
        mfu=utilisation,
        memory=lambda: target.memory_bytes(parallel.root_device),
        main=parallel.rank == 0,
        leg=leg,
        start_step=step,
        run_config=to_dict(config),
    )
    progress = Progress(metrics, step, train.max_steps) if parallel.rank == 0 and config.logger.progress else None
    say = progress.say if progress else _print_on_main(parallel)
    stop = StopOnSignal(parallel)
    provenance = _provenance(config, target, parallel)
    checkpoints = Checkpoints(
        place.checkpoints, config, parallel, loader, data.tokenizer, provenance, metrics.pause, say
    )
    evaluation = Evaluation(
        parallel, metrics, train.eval_every, _validation(config, data, layout, parallel.rank, micro_batch), say
    )
    samples = Samples(parallel, data.tokenizer, config, place.run_dir, metrics)
    callbacks = [metrics, *([progress] if progress else []), evaluation, samples, checkpoints, stop]
    return Job(
        trainer=_trainer(parallel, callbacks, train.deterministic),
        module=module,
        loader=loader,
        parallel=parallel,
        stop=stop,
        metrics=metrics,
        progress=progress,
        checkpoints=checkpoints,
        evaluation=evaluation,
        samples=samples,
        facts=facts,
        leg={
            "leg": leg,
            "start_step": step,
            "resumed_from": str(place.resume_from) if place.resume_from else None,
            **provenance,
        },
        say=say,
    )


def make_strategy(config: RunConfig, target: Target, world: World) -> ParallelStrategy:
    """The strategy that the target runs on, with its layout filled in.

    Raises:
        LayoutError: the degrees do not fit the devices.
    """
    layout = resolve_layout(config.layout, world.size)
    chosen = config.hardware.precision
    precision = target.default_precision(target.probe()) if chosen == "auto" else chosen
    if target.strategy == "dtensor":
        from orchestrator.strategies.dtensor import DTensorStrategy

        hardware = config.hardware
        return DTensorStrategy(
            target, world, layout, precision, timeout_seconds=hardware.timeout_seconds, compile=hardware.compile
        )
    raise HardwareError(
        f"the target '{target.name}' has no strategy in this version", got=target.strategy, allowed="dtensor"
    )


def _restore(
    checkpoint: Checkpoint,
    config: RunConfig,
    parallel: ParallelStrategy,
    model: Any,
    optimizer: Any,
    stream: TokenStream,
) -> int:
    state = restore(checkpoint, parallel, model, optimizer, stream)
    step, train = int(state["step"]), config.train
    sequences = train.global_batch_tokens // train.seq_len
    if state["data"]["global_batch_sequences"] != sequences:
        saved = state["data"]["global_batch_sequences"] * train.seq_len
        raise CheckpointError(
            "the global batch of a resumed run cannot change: a step's batch is a function of its number",
            got=f"train.global_batch_tokens={train.global_batch_tokens}",
            allowed=str(saved),
            fix=f"set train.global_batch_tokens={saved}",
        )
    if step >= train.max_steps:
        raise CheckpointError(
            "the run is finished: there are no steps left to train",
            got=f"step {step} of train.max_steps={train.max_steps}",
            fix=f"set train.max_steps to more than {step} to train on",
        )
    return step


def _validation(
    config: RunConfig, data: PreparedData, layout: Layout, rank: int, micro_batch: int
) -> Callable[[], Iterable[dict[str, Any]]]:
    stream = TokenStream(
        data.stores,
        data.weights,
        "validation",
        config.train.seq_len,
        config.seed,
        config.data.document_mask,
        repeat=False,
    )
    sequences = max(1, min(config.train.eval_tokens // config.train.seq_len, len(stream)))
    batch = min(micro_batch, -(-sequences // layout.data_parallel))
    return lambda: validation_batches(stream, sequences, batch, layout.data_rank(rank), layout.data_parallel)


def _facts(
    config: RunConfig,
    model: ModelConfig,
    data: PreparedData,
    target: Target,
    layout: Layout,
    parallel: ParallelStrategy,
) -> tuple[dict[str, Any], Callable[[float], float | None]]:
    flops = flops_per_token(model, config.train.seq_len)
    chip = config.hardware.chip if config.hardware.chip != "auto" else target.probe().chip
    figure = load_chips().get(chip).device_peak_flops(parallel.precision) if chip else None
    peak, source = peak_flops(target, figure, parallel.precision, parallel.root_device)

    facts = {
        "name": config.name,
        "parameters": parameter_count(model).total,
        "flops_per_token": flops,
        "peak_flops_per_device": peak,
        "peak_source": source,
        "vocab_size": model.vocab_size,
        "unigram_entropy_nats": data.unigram_entropy_nats,
        "data": data.describe(),
    }
    return facts, lambda tokens_per_second: mfu(tokens_per_second, flops, peak, layout.devices)


def _provenance(config: RunConfig, target: Target, parallel: ParallelStrategy) -> dict[str, Any]:
    probe = target.probe()
    return {
        "target": target.name,
        "device_names": list(probe.device_names),
        "devices": parallel.layout.devices,
        "hosts": parallel.world.hosts,
        "engine": parallel.world.engine,
        "layout": parallel.layout.as_dict(),
        "precision": parallel.precision,
        "software": software(),
    }


def _trainer(parallel: ParallelStrategy, callbacks: list[Any], deterministic: bool) -> lightning.Trainer:
    return lightning.Trainer(
        strategy=parallel,
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


def _print_on_main(parallel: ParallelStrategy) -> Callable[[str], None]:
    return (lambda text: print(text, flush=True)) if parallel.rank == 0 else (lambda text: None)
