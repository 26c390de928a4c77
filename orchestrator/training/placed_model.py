"""A model, described on the meta device and placed on its devices."""

from __future__ import annotations

import torch

from orchestrator.config.schema import ModelConfig
from orchestrator.models.protocol import ShardableModel
from orchestrator.models.remat import apply_remat
from orchestrator.runs.own_parts import build_model
from orchestrator.sharding import rules
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.resolved import Remat


def build_placed(
    config: ModelConfig, loss_chunk_tokens: int, remat: Remat, parallel: ParallelStrategy
) -> ShardableModel:
    """Build the model on the meta device, then allocate each process's part of it.

    Args:
        config: the model, its vocabulary a number.
        loss_chunk_tokens: tokens whose logits are alive at one time.
        remat: which activations are computed a second time.
        parallel: the strategy.
    """
    with torch.device("meta"):
        model = build_model(config, loss_chunk_tokens)
    apply_remat(model, remat, parallel.checkpoint)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parallel.shard(model, rules.place(model.logical_axes(), shapes))
    return model
