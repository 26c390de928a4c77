"""Attention and the residual block.

Nothing here knows how many devices there are. A rank that holds some of the heads, or some of the
feed-forward's columns, runs the same code: counts of heads follow from the width of the local projections,
and the residual stream may hold fewer positions than attention sees, when a strategy gathers attention's
input and scatters its output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.config.schema import GATED, ModelConfig
from orchestrator.errors import ConfigError
from orchestrator.models.attention import AttentionCore
from orchestrator.models.feed_forward import FeedForward, GatedFeedForward
from orchestrator.models.kv_cache import LayerCache
from orchestrator.models.mask import CausalMask
from orchestrator.models.mla import LatentAttention
from orchestrator.models.moe import MoE
from orchestrator.models.norms import make_norm, make_qk_norm
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
    if not isinstance(config.head_dim, int) and config.dim % config.heads and not config.mla.kv_lora_rank:
        raise ConfigError(
            "model.dim cannot be divided among the heads",
            got=f"model.dim={config.dim}, model.heads={config.heads}",
            allowed="a multiple of model.heads",
            fix="set model.head_dim, or change one of the two",
        )
    return config.head_width


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions and optional QK-norm and sinks.

    Args:
        config: of the model.
        layer: its number.
    """

    q_norm: nn.Module | None
    k_norm: nn.Module | None
    core: nn.Module
    sinks: nn.Parameter | None

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        self.head_dim = resolved_head_dim(config)
        heads, kv_heads = config.heads_of(layer)
        width, kv_width = heads * self.head_dim, kv_heads * self.head_dim
        self.q = nn.Linear(config.dim, width, bias=config.attention_bias)
        self.k = nn.Linear(config.dim, kv_width, bias=config.attention_bias)
        self.v = nn.Linear(config.dim, kv_width, bias=config.attention_bias)
        self.o = nn.Linear(width, config.dim, bias=config.output_bias)
        self.q_norm, self.k_norm = make_qk_norm(config, width), make_qk_norm(config, kv_width)
        self.sinks = nn.Parameter(torch.empty(heads)) if config.attention_sinks else None
        self.core = AttentionCore(
            config.dropout, config.attention_scale, config.attention_softcap, sinks=config.attention_sinks
        )
        self.norm_width, self.norm_last = config.qk_norm_over == "width", config.qk_norm_after_rope
        self.interleaved = config.rope_layout == "interleaved"

    def forward(
        self, x: Tensor, rope: Rope | None = None, mask: Mask = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Map `x` [B, T, D] to [B, T, D]; `cache` holds earlier positions and takes these ones.

        Args:
            x: hidden states.
            rope: cosines and sines of the positions; None: the layer has none.
            mask: as `attention_mask` makes it; None: plain causal.
            cache: None outside of text generation.
        """
        q, k = self._positioned(self.q(x), self.q_norm, rope), self._positioned(self.k(x), self.k_norm, rope)
        v = self.v(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        mixed = self.core(q, k, v, mask) if self.sinks is None else self.core(q, k, v, mask, self.sinks)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _positioned(self, x: Tensor, norm: nn.Module | None, rope: Rope | None) -> Tensor:
        """Cut queries or keys [B, T, width] into heads, normalised and turned as configured."""
        if norm is not None and self.norm_width:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        per_head = None if self.norm_width else norm
        if per_head is not None and not self.norm_last:
            x = per_head(x)
        if rope is not None:
            x = apply_rope(x, rope, self.interleaved)
        return per_head(x) if per_head is not None and self.norm_last else x


def make_feed_forward(config: ModelConfig, index: int) -> nn.Module:
    """Make what a layer has beside its attention.

    Args:
        config: of the model.
        index: of the layer.
    """
    if config.moe.experts and index >= config.moe.dense_layers:
        return MoE(config)
    return (GatedFeedForward if config.activation in GATED else FeedForward)(config)


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream.

    Args:
        config: of the model.
        index: of the layer, from 0.
    """

    def __init__(self, config: ModelConfig, index: int = 0):
        super().__init__()
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        self.one_norm = config.residual == "parallel_one_norm"
        self.attn_norm = make_norm(config, config.dim) if before else None
        self.attn = (LatentAttention if config.mla.kv_lora_rank else Attention)(config, index)
        self.attn_post_norm = make_norm(config, config.dim) if after else None
        self.mlp_norm = make_norm(config, config.dim) if before and not self.one_norm else None
        self.mlp = make_feed_forward(config, index)
        self.mlp_post_norm = make_norm(config, config.dim) if after else None
        self.dropout, self.scale = config.dropout, config.residual_scale
        self.parallel = config.residual != "sequential"

    def forward(
        self, x: Tensor, rope: Rope | None = None, mask: Mask = None, cache: LayerCache | None = None
    ) -> BlockOutput:
        """Map the residual stream [B, T or a rank's part of T, D] to its successor.

        Args:
            x: the residual stream.
            rope: cosines and sines of the positions; None: the layer has none.
            mask: as `attention_mask` makes it; None: plain causal.
            cache: earlier positions; None outside of text generation.

        Returns:
            The stream; of a layer with experts also the `models.moe.Routing`, as further elements of a tuple.
        """
        read = _through(self.attn_norm, x)
        attended = x + self._branch(self.attn(read, rope, mask, cache), self.attn_post_norm)
        if not (self.parallel and self.one_norm):
            read = _through(self.mlp_norm, x if self.parallel else attended)
        y = self.mlp(read)
        if isinstance(y, tuple):
            y, routing = y
            return (attended + self._branch(y, self.mlp_post_norm), *routing)
        return attended + self._branch(y, self.mlp_post_norm)

    def _branch(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Return what a branch adds to the stream."""
        x = _through(norm, x)
        x = F.dropout(x, self.dropout, self.training) if self.dropout > 0.0 else x
        return x * self.scale if self.scale != 1.0 else x


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
