"""A model, described on the meta device and placed on its devices."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch

from orchestrator.config.schema import ModelConfig, RunConfig
from orchestrator.config.transfer import ratios
from orchestrator.models.lora import apply_lora
from orchestrator.models.loss import ZLoss
from orchestrator.models.protocol import ShardableModel
from orchestrator.models.remat import apply_remat
from orchestrator.models.shapes import parameter_shapes
from orchestrator.optim.transfer_rules import Factors, transfer_factors
from orchestrator.runs.own_parts import build_model, describe_model
from orchestrator.sharding import rules
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.resolved import Remat


def build_placed(config: RunConfig, parallel: ParallelStrategy) -> ShardableModel:
    """Build the model on the meta device, then allocate each process's part of it. It has no weights yet.

    Args:
        config: of the run, settled: vocabulary and `train.remat` are known.
        parallel: the strategy, joined.
    """
    with torch.device("meta"):
        model = build_model(config.model, config.train.loss_chunk_tokens)
    if config.train.z_loss:
        model.head.z_loss = ZLoss(config.train.z_loss)
    model.init_factors = {name: factors.init for name, factors in factors_of(config, model).items()}
    if config.train.lora.rank is not None:
        apply_lora(model, config.train.lora)
    apply_remat(model, cast(Remat, config.train.remat), parallel.checkpoint)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parallel.shard(model, rules.place(model.logical_axes(), shapes))
    return model


def factors_of(config: RunConfig, model: ShardableModel) -> dict[str, Factors]:
    """Return what `optim.transfer` scales each parameter by; empty where it does nothing.

    Args:
        config: of the run, settled.
        model: of the run, or a part of it.
    """
    by = ratios(config.optim, config.model)
    if by is None:
        return {}
    shrunk = 1.0 if by.depth == 1.0 else _residual_std(config.model, by.depth) / _residual_std(config.model)
    shapes = parameter_shapes(config.model)
    return transfer_factors(config.optim, config.model, model.logical_axes(), shapes, shrunk)


def _residual_std(model: ModelConfig, deeper: float = 1.0) -> float:
    """Return the spread that the model's own rule gives what first writes to the stream, in a model less deep."""
    described = describe_model(replace(model, layers=round(model.layers / deeper), layer_heads=(), layer_kv_heads=()))
    return described.initializers()["layers.0.attn.o.weight"].std or 1.0  # of zeros there is nothing to scale
