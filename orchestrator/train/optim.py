"""The optimizer and the learning rate, which is a function of the step and needs no state."""

from __future__ import annotations

import math

import torch
from torch import nn

from orchestrator.config.schema import OptimConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the parameters, with its state allocated: a restore fills it, and no step is the first one.

    Weight decay is left out where a parameter is a vector: norms and biases.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused, traced = device.type in ("cpu", "cuda", "tpu"), device.type == "xla"
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
        capturable=traced,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            # As torch.optim.AdamW would: beside the parameter for the fused kernel, on the host otherwise.
            "step": torch.zeros((), dtype=torch.float32, device=device if fused or traced else "cpu"),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def learning_rate(step: int, max_steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """Learning rate of the step that follows `step` completed ones.

    Linear warm-up to `lr`, then by `schedule.kind`, down to `min_lr_ratio * lr` at `max_steps`.
    """
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return lr
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, round(max_steps * (1 - schedule.decay_fraction)))
    progress = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return lr * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * fall)
