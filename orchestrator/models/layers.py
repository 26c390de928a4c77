"""Attention and the residual block.

Nothing here knows how many devices there are. A rank that holds some of the heads, or some of the
feed-forward's columns, runs the same code: counts of heads follow from the width of the local projections,
and the residual stream may hold fewer positions than attention sees, when a strategy gathers attention's
input and scatters its output.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import ConfigError
from orchestrator.models.attention import AttentionCore
from orchestrator.models.feed_forward import GELU, SwiGLU
from orchestrator.models.kv_cache import LayerCache
from orchestrator.models.mask import CausalMask
from orchestrator.models.moe import MoE
from orchestrator.models.rope import Rope, apply_rope

Mask = Tensor | CausalMask | None  # what `Attention.core` takes; see `models.attention`
BlockOutput = Tensor | tuple[Tensor, Tensor, Tensor]  # the stream, or (stream, routing loss, routing statistics)


def resolved_head_dim(config: ModelConfig) -> int:
    """Return the width of one head: as configured, or `dim / heads`.

    Args:
        config: of the model.

    Raises:
        ConfigError: `head_dim: auto` with a `dim` that the heads do not divide.
    """
    if not isinstance(config.head_dim, int) and config.dim % config.heads:
        raise ConfigError(
            "model.dim cannot be divided among the heads",
            got=f"model.dim={config.dim}, model.heads={config.heads}",
            allowed="a multiple of model.heads",
            fix="set model.head_dim, or change one of the two",
        )
    return config.head_width


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square over the last dim, times a weight. Source: Zhang and Sennrich 2019."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., width]; the statistics are fp32, the result has the dtype of `x`."""
        # Under autocast the weight is fp32 where x is not, and torch has fused kernels for equal dtypes only.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """Make the configured normalisation over the last dim.

    Args:
        config: of the model.
        width: size of that dim.
    """
    return (RMSNorm if config.norm == "rms" else nn.LayerNorm)(width, eps=config.norm_eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions and optional QK-norm.

    Args:
        config: of the model.
    """

    q_norm: nn.Module | None
    k_norm: nn.Module | None
    core: nn.Module

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = resolved_head_dim(config)
        width, kv_width = config.heads * self.head_dim, config.kv_heads * self.head_dim
        self.q = nn.Linear(config.dim, width, bias=config.attention_bias)
        self.k = nn.Linear(config.dim, kv_width, bias=config.attention_bias)
        self.v = nn.Linear(config.dim, kv_width, bias=config.attention_bias)
        self.o = nn.Linear(width, config.dim, bias=config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.core = AttentionCore(config.dropout)

    def forward(
        self, x: Tensor, rope: Rope | None = None, mask: Mask = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Map `x` [B, T, D] to [B, T, D]; `cache` holds earlier positions and takes these ones.

        Args:
            x: hidden states.
            rope: cosines and sines of the positions; None: the model has none.
            mask: as `attention_mask` makes it; None: plain causal.
            cache: None outside of text generation.
        """
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.o(self.core(q, k, v, mask).transpose(1, 2).flatten(2))


def make_feed_forward(config: ModelConfig, index: int) -> nn.Module:
    """Make what a layer has beside its attention.

    Args:
        config: of the model.
        index: of the layer.
    """
    if config.moe.experts and index >= config.moe.dense_layers:
        return MoE(config)
    return (SwiGLU if config.activation == "swiglu" else GELU)(config)


class Block(nn.Module):
    """One pre-norm layer: attention and feed-forward, each added to the residual stream.

    Args:
        config: of the model.
        index: of the layer, from 0.
    """

    def __init__(self, config: ModelConfig, index: int = 0):
        super().__init__()
        self.attn_norm = make_norm(config, config.dim)
        self.attn = Attention(config)
        self.mlp_norm = make_norm(config, config.dim)
        self.mlp = make_feed_forward(config, index)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, rope: Rope | None = None, mask: Mask = None, cache: LayerCache | None = None
    ) -> BlockOutput:
        """Map the residual stream [B, T or a rank's part of T, D] to its successor.

        Args:
            x: the residual stream.
            rope: cosines and sines of the positions; None: the model has none.
            mask: as `attention_mask` makes it; None: plain causal.
            cache: earlier positions; None outside of text generation.

        Returns:
            The stream; of a layer with experts also the `models.moe.Routing`, as further elements of a tuple.
        """
        x = x + self._drop(self.attn(self.attn_norm(x), rope, mask, cache))
        y = self.mlp(self.mlp_norm(x))
        if isinstance(y, tuple):
            y, routing = y
            return (x + self._drop(y), *routing)
        return x + self._drop(y)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout > 0.0 else x
