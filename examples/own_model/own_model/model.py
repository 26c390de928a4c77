"""A decoder with sigmoid attention, a gate on its output, and norms behind the sublayers instead of in front of them.

Sigmoid attention: Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention". Gate: Qiu
et al. 2025, "Gated Attention for Large Language Models". Norms as in OLMo 2 (2025): `x + norm(f(x))`.

Nothing here knows of devices. What the strategies need is said in `orchestrator.models.protocol`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from orchestrator.config.schema import ModelConfig
from orchestrator.models.attention import AttentionCore
from orchestrator.models.feed_forward import SwiGLU
from orchestrator.models.head import LMHead
from orchestrator.models.init import Init
from orchestrator.models.mask import additive
from orchestrator.models.norms import RMSNorm
from orchestrator.models.protocol import Mask, ShardableModel
from orchestrator.models.rope import Rope, apply_rope, rope_tables
from orchestrator.sharding.axes import ParameterAxes

AXES = {
    "embed": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    **dict.fromkeys(("q", "k", "v", "gate"), ("heads", "embed")),
    "o": ("embed", "heads"),
    **dict.fromkeys(("up", "mlp_gate"), ("mlp", "embed")),
    "down": ("embed", "mlp"),
    **dict.fromkeys(("attn_norm", "mlp_norm", "norm"), ("norm",)),
}


class SigmoidCore(AttentionCore):
    """Attention whose weights are sigmoids: each key is weighed by itself, and nothing is normalised."""

    def __init__(self, bias: float):
        super().__init__()
        self.bias = bias

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend; arguments and result as `AttentionCore`. No mask means causal, and for one query everything."""
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + self.bias
        if mask is None:
            queries, keys = scores.shape[-2:]
            at = torch.arange(keys, device=q.device)
            mask = at <= torch.arange(keys - queries, keys, device=q.device).unsqueeze(-1)
        if mask.dtype == torch.bool:
            weights = torch.where(mask, torch.sigmoid(scores), 0.0)
        else:
            weights = torch.sigmoid(scores + mask)
        return weights.to(v.dtype) @ v


class GatedAttention(nn.Module):
    """Sigmoid attention, whose output is gated by what was attended from."""

    def __init__(self, config: ModelConfig, bias: float):
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.q, self.k, self.v, self.gate, self.o = (nn.Linear(config.dim, config.dim, bias=False) for _ in range(5))
        self.core = SigmoidCore(bias)

    def forward(self, x: Tensor, rope: Rope, mask: Mask) -> Tensor:
        """Map [B, T, D] to [B, T, D]. A rank may hold some of the heads: their number follows from the local width."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q, self.k, self.v))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        found = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.o(found.transpose(1, 2).flatten(2) * torch.sigmoid(self.gate(x)))


class Block(nn.Module):
    """One layer with its norms behind the sublayers."""

    def __init__(self, config: ModelConfig, bias: float):
        super().__init__()
        self.attn, self.mlp = GatedAttention(config, bias), SwiGLU(config)
        self.attn_norm, self.mlp_norm = (RMSNorm(config.dim, eps=config.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, rope: Rope, mask: Mask) -> Tensor:
        """Map the residual stream to its successor."""
        x = x + self.attn_norm(self.attn(x, rope, mask))
        return x + self.mlp_norm(self.mlp(x))


class SigmoidDecoder(ShardableModel):
    """The model: `model._target_=own_model.model.SigmoidDecoder`.

    Args:
        config: dim, layers, heads, mlp_dim, rope_theta, init_std, tied_embeddings and vocab_size are used.
        loss_chunk_tokens: tokens whose logits exist at one time when the loss is computed.
        attention_bias: added to the scores before the sigmoid; minus the logarithm of a usual number of keys.
    """

    def __init__(self, config: ModelConfig, loss_chunk_tokens: int, attention_bias: float = -4.0):
        super().__init__()
        assert config.vocab_size != "auto"
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, attention_bias) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = LMHead(config.vocab_size, config.dim, loss_chunk_tokens)
        self.tie_weights()

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers."""
        return list(self.layers)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return the summed loss with targets, logits without; see `ShardableModel`."""
        length, device = tokens.shape[1], tokens.device
        if positions is None:
            positions = torch.arange(length, device=device).unsqueeze(0)
        mask = self.make_mask(queries=length, past=0, documents=documents, window=None, device=device)
        x = self.embed(tokens)
        if isinstance(mask, Tensor):
            mask = additive(mask, x.dtype)
        rope = rope_tables(
            positions, self.config.dim // self.config.heads, self.config.rope_theta, self.config.rope_scaling
        )
        for block in self.layers:
            x = block(x, rope, mask)
        return self.head(self.norm(x), targets)

    def logical_axes(self) -> ParameterAxes:
        """By the name of the module that holds the weight."""
        return {name: AXES[_kind(name)] for name, _ in self.named_parameters()}

    def initializers(self) -> dict[str, Init]:
        """Norms at one, matrices normal."""
        std = self.config.init_std
        return {name: Init("ones") if "norm" in name else Init("normal", std) for name, _ in self.named_parameters()}


def _kind(name: str) -> str:
    *_, parent, module, _ = ("", *name.split("."))
    return "mlp_gate" if (parent, module) == ("mlp", "gate") else module
