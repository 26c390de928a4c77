"""Feed-forward layers, in which each position is by itself, and their activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.config.schema import ModelConfig

_ALPHA, _LIMIT = 1.702, 7.0  # of gpt-oss: config.json of huggingface.co/openai/gpt-oss-20b and its modelling code


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _swiglu_clamped(gate: Tensor, up: Tensor) -> Tensor:
    """Source: `swiglu` of OpenAI's reference code for gpt-oss."""
    gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
    return gate * torch.sigmoid(_ALPHA * gate) * (up + 1.0)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


# Kind -> what becomes of the gate's and the other matrix's product. Element by element: any part of the width will do.
GATES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "swiglu": _swiglu,
    "swiglu_clamped": _swiglu_clamped,
    "geglu": _geglu,
}
ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {"gelu": _gelu, "gelu_erf": F.gelu, "relu2": _relu2}


class GatedFeedForward(nn.Module):
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
        self.activation = GATES.get(config.activation, _swiglu)  # SwiGLU, below, asks for none

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, T, D] to [B, T, D]."""
        return self.down(self.activation(self.gate(x), self.up(x)))


class FeedForward(nn.Module):
    """Feed-forward of two matrices.

    Args:
        config: of the model.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.dim, config.mlp_dim, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_dim, config.dim, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, T, D] to [B, T, D]."""
        return self.down(self.activation(self.up(x)))


class SwiGLU(GatedFeedForward):
    """The gated feed-forward with SiLU, whatever the activation of the model is.

    Args:
        config: of the model.
        width: the inner one; None: `model.mlp_dim`.
    """

    def __init__(self, config: ModelConfig, width: int | None = None):
        super().__init__(config, width)
        self.activation = _swiglu
