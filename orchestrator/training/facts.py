"""Facts of a run before its first step: size, FLOPs, data, and provenance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from orchestrator.chips.load import load_catalogue
from orchestrator.config.batch_sizes import BatchSizes
from orchestrator.config.schema import RunConfig
from orchestrator.data.validation import mixture_lines, packing_lines
from orchestrator.models.protocol import ShardableModel
from orchestrator.models.shapes import adapter_shapes
from orchestrator.observe.throughput import mfu, peak_flops
from orchestrator.planner.estimate.flops import flops_per_token, parameter_count
from orchestrator.runs.provenance import software
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.data_module import TokenDataModule
from orchestrator.training.resolved import Resolved


def run_facts(
    resolved: Resolved, parallel: ParallelStrategy, model: ShardableModel, tokens: TokenDataModule
) -> tuple[dict[str, Any], Callable[[float], float | None]]:
    """Return the facts of a run before its first step, and MFU as a function of tokens per second.

    Args:
        resolved: the run.
        parallel: the strategy.
        model: the placed model.
        tokens: its data.
    """
    config, target, devices = resolved.config, parallel.target, parallel.job_layout.devices
    # What an own model computes no description says: its utilisation is unknown.
    described = None if model.config._target_ else model.config
    flops = flops_per_token(described, config.train.seq_len) if described else None
    parameters, adapters = parallel.parameter_count(model), 0
    if described and config.train.lora.rank is not None:
        adapters = sum(math.prod(shape) for _, shape in adapter_shapes(described, config.train.lora))
        # No gradients of the weights beneath: a third of their products. Adapters have all three.
        flops = flops - 2.0 * parameter_count(described).matmul + 6.0 * adapters if flops else None
    chip, precision = resolved.chip, parallel.precision
    figure = load_catalogue().get(chip).device_peak_flops(precision) if chip else None
    peak, source = peak_flops(target, figure, precision, parallel.root_device)
    facts = {
        "name": config.name,
        "parameters": parameters,
        **({"trained_parameters": adapters} if adapters else {}),
        "active_parameters": parameters - (parameter_count(described).idle if described else 0),
        "flops_per_token": flops,
        "peak_flops_per_device": peak,
        "peak_source": source,
        "vocab_size": model.config.vocab_size,
        "unigram_entropy_nats": tokens.prepared.unigram_entropy_nats,
        "data": tokens.prepared.describe(),
        "mixture": mixture_lines(tokens.prepared),
        "packing": _packing(tokens, config),
        "validation": tokens.validation.lines(),
    }
    return facts, lambda tokens_per_second: mfu(tokens_per_second, flops, peak, devices)


def _packing(tokens: TokenDataModule, config: RunConfig) -> list[str]:
    """How conversations became sequences, and how often the run passes over those of a single source."""
    train, lines = config.train, packing_lines(tokens.prepared, config.train.seq_len, config.data.chat)
    if lines and len(tokens.prepared.stores) == 1:
        drawn = BatchSizes.of(train).divided(train.seq_len).upto(train.max_steps)
        lines.append(f"{train.max_steps:,} steps pass over them {drawn / tokens.stream.windows[0]:.3g} times")
    return lines


def provenance(parallel: ParallelStrategy) -> dict[str, Any]:
    """Return what a result may depend on: hardware, layout, precision, software.

    Args:
        parallel: the strategy.
    """
    probe = parallel.target.probe()
    return {
        "target": parallel.target.name,
        "device_names": list(probe.device_names),
        "devices": parallel.job_layout.devices,
        "hosts": parallel.world.hosts,
        "engine": parallel.world.engine,
        "layout": parallel.job_layout.as_dict(),
        "precision": parallel.precision,
        "runtime": parallel.target.runtime,
        "numerics": parallel.target.numerics(),
        "software": software(),
    }
