"""Multi-head latent attention: queries, and keys and values, made of narrow latents, with a rotary part beside them.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; the norms on latents as in DeepSeek-V3, arXiv 2412.19437.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from orchestrator.config.schema import ModelConfig
from orchestrator.models.attention import AttentionCore
from orchestrator.models.kv_cache import LayerCache
from orchestrator.models.mask import CausalMask
from orchestrator.models.norms import RMSNorm
from orchestrator.models.rope import Rope, apply_rope

_EPS = 1e-6  # of the norms on latents, whatever model.norm_eps is: as in DeepSeek's and transformers' code


class SharedKey(nn.Module):
    """The rotary part of the keys, one for all heads: a strategy that divides heads hooks its gradients in here."""

    def forward(self, key: Tensor) -> Tensor:
        """Return `key` [B, T, width]."""
        return key


class LatentAttention(nn.Module):
    """Self-attention whose keys and values are made of a latent per position.

    Args:
        config: of the model.
        layer: its number.
    """

    q: nn.Linear | None
    q_down: nn.Linear | None
    q_latent_norm: nn.Module | None
    q_up: nn.Linear | None
    core: nn.Module

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        mla, (heads, _) = config.mla, config.heads_of(layer)
        self.latent, self.plain, self.turned, self.v_dim = (
            mla.kv_lora_rank,
            mla.nope_head_dim,
            mla.rope_head_dim,
            mla.v_head_dim,
        )
        width, rank = heads * (self.plain + self.turned), mla.q_lora_rank
        self.q = nn.Linear(config.dim, width, bias=False) if rank is None else None
        self.q_down = nn.Linear(config.dim, rank, bias=config.attention_bias) if rank is not None else None
        self.q_latent_norm = RMSNorm(rank, eps=_EPS) if rank is not None else None
        self.q_up = nn.Linear(rank, width, bias=False) if rank is not None else None
        self.kv_down = nn.Linear(config.dim, self.latent + self.turned, bias=config.attention_bias)
        self.kv_latent_norm = RMSNorm(self.latent, eps=_EPS)
        self.kv_up = nn.Linear(self.latent, heads * (self.plain + self.v_dim), bias=False)
        self.o = nn.Linear(heads * self.v_dim, config.dim, bias=config.output_bias)
        self.shared_key = SharedKey()
        self.core = AttentionCore(config.dropout, score_scale(config), config.attention_softcap)
        self.interleaved = config.rope_layout == "interleaved"

    def forward(
        self,
        x: Tensor,
        rope: Rope | None = None,
        mask: Tensor | CausalMask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map `x` [B, T, D] to [B, T, D]; `cache` holds the latents of earlier positions and takes these ones.

        Args:
            x: hidden states.
            rope: cosines and sines of the positions; None: the layer has none.
            mask: as `attention_mask` makes it; None: plain causal.
            cache: None outside of text generation.
        """
        q = self._queries(x).unflatten(-1, (-1, self.plain + self.turned))
        latent, key = self.kv_down(x).split((self.latent, self.turned), -1)
        latent, key = self.kv_latent_norm(latent), self.shared_key(key).unsqueeze(2)
        if rope is not None:
            turned = apply_rope(q[..., self.plain :], rope, self.interleaved)
            q = torch.cat((q[..., : self.plain], turned), -1)
            key = apply_rope(key, rope, self.interleaved)
        if cache is not None:
            latent, key = (part.squeeze(1) for part in cache.extend(latent.unsqueeze(1), key.transpose(1, 2)))
            key = key.unsqueeze(2)
        k, v = self.kv_up(latent).unflatten(-1, (-1, self.plain + self.v_dim)).split((self.plain, self.v_dim), -1)
        k = torch.cat((k, key.expand(-1, -1, k.shape[2], -1)), -1)
        mixed: Tensor = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        result: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return result

    def _queries(self, x: Tensor) -> Tensor:
        if self.q is not None:
            direct: Tensor = self.q(x)
            return direct
        assert self.q_down is not None
        assert self.q_latent_norm is not None
        assert self.q_up is not None
        result: Tensor = self.q_up(self.q_latent_norm(self.q_down(x)))
        return result


def score_scale(config: ModelConfig) -> float:
    """Return the factor on attention scores: as configured, else 1 / sqrt(width), with YaRN's for latent attention.

    Args:
        config: of the model.

    Source: `softmax_scale` of DeepSeek's reference code.
    """
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
    scaling = config.rope_scaling
    if scaling.kind == "yarn" and scaling.mscale_all_dim and scaling.factor > 1.0:
        scale *= (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0) ** 2
    return scale
