"""Feed-forward layers, in which each position is by itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.config.schema import ModelConfig


class SwiGLU(nn.Module):
    """Gated feed-forward. Source: Shazeer 2020, "GLU Variants Improve Transformer".

    Args:
        config: of the model.
        width: the inner one; None: `model.mlp_dim`.
    """

    def __init__(self, config: ModelConfig, width: int | None = None):
        super().__init__()
        width = config.mlp_dim if width is None else width
        self.gate = nn.Linear(config.dim, width, bias=config.mlp_bias)
        self.up = nn.Linear(config.dim, width, bias=config.mlp_bias)
        self.down = nn.Linear(width, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, T, D] to [B, T, D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GELU(nn.Module):
    """Feed-forward with the tanh approximation of GELU, as GPT-2's.

    Args:
        config: of the model.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.dim, config.mlp_dim, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, T, D] to [B, T, D]."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))
