"""The optimizer."""

from __future__ import annotations

import torch
from torch import nn

from orchestrator.config.schema import OptimConfig


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
