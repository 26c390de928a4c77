"""The model of a checkpoint on the devices of a job, as what computes with it gets it."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.config.schema import RunConfig
from orchestrator.models.protocol import ShardableModel
from orchestrator.strategies.parallel_strategy import ParallelStrategy


@dataclass(frozen=True)
class ServedModel:
    """A model that is placed and filled, in inference mode. All ranks of the job have one, and use it together.

    Attributes:
        model: placed, with the weights of the checkpoint.
        parallel: the strategy that has placed it, joined.
        checkpoint: where the weights are from.
        config: settled: the checkpoint's model, with the hardware and the layout of this job.
    """

    model: ShardableModel
    parallel: ParallelStrategy
    checkpoint: Checkpoint
    config: RunConfig
