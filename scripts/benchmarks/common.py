"""What the benchmarks of a step have in common: the optimizer's groups, the batches, and the product's fit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as lightning
from torch import nn

from orchestrator.config.schema import RunConfig
from orchestrator.data.prepare import PreparedData, prepare
from orchestrator.data.stream import Position, StepLoader, TokenStream
from orchestrator.distributed.world import World
from orchestrator.hardware.target_table import job_devices, resolve
from orchestrator.runs.run_directory import RunPaths
from orchestrator.training.job import Job, build, make_strategy
from orchestrator.training.resolved import Resolved, resolve_run

Turns = TypeVar("Turns", bound=lightning.Callback)


def optimizer_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As the product decays: matrices, not vectors."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]


def batches(config: RunConfig, data: PreparedData) -> Iterator[Any]:
    """Batches like the product's, in another order."""
    stream = TokenStream(data.stores, data.weights, "train", config.train.seq_len, 1, config.data.document_mask)
    sequences = config.train.global_batch_tokens // config.train.seq_len
    return iter(StepLoader(stream, sequences, 0, 1, Position(), config.train.max_steps))


def resolved_in(config: RunConfig, world: World, data: PreparedData, run_dir: Path) -> Resolved:
    """What a launcher decides for a new run of this world in `run_dir`."""
    target = resolve(config.hardware)
    devices = job_devices(config.hardware, target, world)
    resolved = resolve_run(config, target, devices, data.vocab_size, data=data)
    return replace(resolved, paths=RunPaths(run_dir, run_dir / "checkpoints", None))


@contextmanager
def trained(
    config: RunConfig, make_turns: Callable[[Job, PreparedData], Turns], world: World = World()
) -> Iterator[tuple[Job, Turns]]:
    """Train as the product does, with one more callback. Within it the job is there still, and what watches it."""
    data = prepare(config.data)
    with tempfile.TemporaryDirectory() as folder:
        resolved = resolved_in(config, world, data, Path(folder))
        parallel = make_strategy(resolved, resolved.target(), world)
        parallel.join()
        job = build(resolved, parallel, data, leg=0)
        turns = make_turns(job, data)
        # Last, so that all of the product's own callbacks are on the product's clock.
        job.trainer.callbacks.append(turns)
        job.trainer.fit(job.module, job.loader)
        yield job, turns
        job.watchers.channels.close()
        if job.watchers.progress:
            job.watchers.progress.close()
        parallel.leave()


def fit(config: RunConfig, make_turns: Callable[[RunConfig, PreparedData], Turns], world: World = World()) -> Turns:
    """Train as the product does, with one more callback, which is returned."""
    with trained(config, lambda job, data: make_turns(config, data), world) as (_, turns):
        return turns
