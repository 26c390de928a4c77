"""The decoder language model: embedding, blocks, norm, head.

Single-device code. Its parameters carry logical axis names, from which `sharding.rules` derives what each
rank holds; there are no buffers, so it can be built on the meta device and filled shard by shard.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import ConfigError
from orchestrator.models.head import LMHead
from orchestrator.models.init import Init
from orchestrator.models.kv_cache import KVCache
from orchestrator.models.layers import Block, resolved_head_dim
from orchestrator.models.mask import additive
from orchestrator.models.moe import STATISTICS, MoE
from orchestrator.models.norms import make_norm
from orchestrator.models.protocol import Mask, ShardableModel
from orchestrator.models.rope import Rope, rope_tables
from orchestrator.sharding.axes import ParameterAxes

__all__ = ["Decoder", "LMHead", "resolved_head_dim"]

_NORMS = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm", "norm")

# Module name -> logical axes of its weight. A bias has the first of them.
_AXES: dict[str, tuple[str, ...]] = {
    "embed": ("vocab", "embed"),
    "positions": ("positions", "embed"),
    "head": ("vocab", "embed"),
    "q": ("heads", "embed"),
    "k": ("kv_heads", "embed"),
    "v": ("kv_heads", "embed"),
    "o": ("embed", "heads"),
    "q_down": ("latent", "embed"),
    "q_up": ("heads", "latent"),
    "kv_down": ("latent", "embed"),
    "kv_up": ("heads", "latent"),
    "q_latent_norm": ("latent",),
    "kv_latent_norm": ("latent",),
    "gate": ("mlp", "embed"),
    "up": ("mlp", "embed"),
    "down": ("embed", "mlp"),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
    **dict.fromkeys(_NORMS, ("norm",)),
    "router": ("choices", "embed"),
    "shared_gate": ("choices", "embed"),
}
# Of parameters that are not called `weight` or `bias`, by their own names.
_NAMED_AXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("experts.gate", "experts.up"), ("experts", "mlp", "embed")),
    "experts.down": ("experts", "embed", "mlp"),
    **dict.fromkeys(("experts.gate_bias", "experts.up_bias"), ("experts", "mlp")),
    "experts.down_bias": ("experts", "embed"),
    "router.balance_bias": ("balance",),
    "attn.sinks": ("heads",),
}
# Of a norm over all heads together.
_WIDTH_NORMS = {"q_norm": ("heads",), "k_norm": ("kv_heads",)}


class Decoder(ShardableModel):
    """A decoder language model.

    Args:
        config: its description, with `vocab_size` a number.
        loss_chunk_tokens: tokens whose logits exist at one time when the loss is computed.

    Raises:
        ConfigError: `vocab_size` or `head_dim` cannot be resolved.
    """

    positions: nn.Embedding | None

    def __init__(self, config: ModelConfig, loss_chunk_tokens: int = 2048):
        super().__init__()
        if not isinstance(config.vocab_size, int):
            raise ConfigError("model.vocab_size is not known", got=config.vocab_size, fix="give the number of tokens")
        self.config = config
        self.head_dim = resolved_head_dim(config)
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.max_seq_len, config.dim) if learned else None
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.norm = make_norm(config, config.dim)
        self.head = LMHead(
            config.vocab_size, config.dim, loss_chunk_tokens, scale=config.logit_scale, softcap=config.logit_softcap
        )
        self.tie_weights()

    @property
    def blocks(self) -> list[Block]:
        """The layers, with their type."""
        return cast(list[Block], list(self.layers))

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Loss with targets, logits without.

        Args:
            tokens: [B, T] int64.
            positions: [B, T], position of each token in its document; None: counted on from what all rows have cached.
            documents: [B, T], an integer per document; attention does not leave it. None: one document.
            targets: [B, T], the token to be predicted at each position, -100 for none.
            cache: keys and values of earlier positions, in which a pass was begun; those of this call are added.
            at: [B], the one position of each row whose logits are wanted; None: all.

        Returns:
            fp32 scalar, the SUM of the cross-entropies over the targets, in training with the routers' losses; or
            logits [B, T, V], with `at` [B, 1, V].

        Raises:
            ValueError: `documents` together with `cache`.
        """
        if cache is not None and documents is not None:
            raise ValueError("documents cannot be told apart when a cache is used")
        if positions is None:
            past = cache.past if cache is not None else 0
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device).unsqueeze(0)
        x = self.begin(tokens, positions)
        x, routing_loss = self.through(range(len(self.layers)), x, positions, documents, cache)
        result = self.end(x, targets, at)
        return result if targets is None or routing_loss is None else result + routing_loss

    def begin(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the residual stream that the first layer takes, [B, T, D].

        Args:
            tokens: [B, T] int64.
            positions: [B or 1, T].
        """
        x: Tensor = self.embed(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.config.dropout > 0.0:
            x = F.dropout(x, self.config.dropout, self.training)
        return x

    def through(
        self,
        layers: range,
        x: Tensor,
        positions: Tensor,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Pass the residual stream through some layers.

        Args:
            layers: their numbers.
            x: residual stream, [B, T or a rank's part of T, D].
            positions: [B or 1, T].
            documents: [B, T] or None, as in `forward`.
            cache: keys and values of earlier positions.

        Returns:
            The stream behind them, and in training the sum of their routers' losses; None where they have none.
        """
        masks = self._masks(layers, positions, documents, cache, x.dtype)
        ropes = self._ropes(layers, positions)
        routing_losses = []
        for index in layers:
            rope, mask = ropes[self.config.rope_of(index)], masks[self.config.window_of(index)]
            out = self.layers[index](x, rope, mask, cache.layers[index] if cache is not None else None)
            if isinstance(out, tuple):
                x, routing_loss, statistics = out
                routing_losses.append(routing_loss)
                self.note_routing(index, statistics)
            else:
                x = out
        return x, torch.stack(routing_losses).sum() if routing_losses and self.training else None

    def end(self, x: Tensor, targets: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Return the loss with targets, logits without, as `forward` but for the routers' losses.

        Args:
            x: residual stream behind the last layer.
            targets: [B, T] or None.
            at: [B] or None, as in `forward`.
        """
        result: Tensor = self.head(self.norm(x), targets, at)
        return result

    def _masks(
        self, layers: range, positions: Tensor, documents: Tensor | None, cache: KVCache | None, dtype: torch.dtype
    ) -> dict[int | None, Mask]:
        """Make the mask of each window that there is, shared by the layers that have it."""
        masks: dict[int | None, Mask] = {}
        past = cache.past if cache is not None else 0
        for window in dict.fromkeys(map(self.config.window_of, layers)):
            if cache is not None and (of_rows := cache.mask(positions.shape[1], window, dtype)) is not None:
                masks[window] = of_rows
                continue
            mask = self.make_mask(
                queries=positions.shape[1], past=past, documents=documents, window=window, device=positions.device
            )
            masks[window] = additive(mask, dtype) if isinstance(mask, Tensor) else mask
        return masks

    def _ropes(self, layers: range, positions: Tensor) -> dict[str | None, Rope | None]:
        """Make the tables of each kind of rotary positions that there is."""
        config, ropes = self.config, dict[str | None, Rope | None]()
        interleaved = config.rope_layout == "interleaved"
        for kind in dict.fromkeys(map(config.rope_of, layers)):
            ropes[kind] = None
            if kind == "local" and config.rope_local_theta is not None:
                ropes[kind] = rope_tables(
                    positions, config.rope_width, config.rope_local_theta, interleaved=interleaved
                )
            elif kind is not None:
                ropes[kind] = rope_tables(
                    positions, config.rope_width, config.rope_theta, config.rope_scaling, interleaved
                )
        return ropes

    @torch.no_grad()
    def balance_experts(self, routing: Tensor, bad: Tensor) -> None:
        """Lower the offset of experts with more than the mean load, and raise that of the others.

        Args:
            routing: [layers, ...], `take_routing` summed over the job.
            bad: bool scalar; where it is true nothing moves.

        Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy", arXiv 2408.15664, algorithm 1.
        """
        rate = self.config.moe.balance_bias_rate
        for index, layer in enumerate(self.blocks):
            mlp = getattr(layer, "mlp", None)  # a pipeline's rank has some of the layers
            if isinstance(mlp, MoE) and mlp.router.balance_bias is not None:
                load = routing[index, STATISTICS:]
                move = (load.mean() - load).sign() * rate
                mlp.router.balance_bias.add_(torch.where(bad, torch.zeros_like(move), move))

    def logical_axes(self) -> ParameterAxes:
        """Return the logical axis of each dim of each parameter; a tied weight is listed as `embed.weight`."""
        axes = _AXES | (_WIDTH_NORMS if self.config.qk_norm_over == "width" else {})
        return {
            name: _NAMED_AXES.get(".".join(name.split(".")[-2:])) or axes[_module_of(name)][: parameter.ndim]
            for name, parameter in self.named_parameters()
        }

    def initializers(self) -> dict[str, Init]:
        """How each parameter starts: normal with `init_std`, norms with the factor one, biases at zero.

        The projections that write to the residual stream have `init_std / sqrt(2 * layers)`, so that the
        stream's variance does not grow with depth. Source: Radford et al. 2019 (GPT-2), section 2.3. With
        `init_depth=layer` each is divided by its own depth.
        """
        return {name: self._init_of(name) for name, _ in self.named_parameters()}

    def _init_of(self, name: str) -> Init:
        config = self.config
        module, leaf = name.split(".")[-2:]
        if leaf.endswith("bias"):
            return Init("zeros", 0.0)
        if module.endswith("norm"):
            return Init("zeros" if self.config.norm == "rms_offset" else "ones", 0.0)
        std = config.init_std
        if module in ("o", "down") or leaf == "down":
            depth = {"model": config.layers, "layer": int(name.split(".")[1]) + 1, "none": None}[config.init_depth]
            std = std if depth is None else std / math.sqrt(2 * depth)
        elif module in ("embed", "head"):
            own = config.embedding_init_std if module == "embed" else config.head_init_std
            std = std if own is None else own
        return Init("normal", std, config.init_cutoff)


def _module_of(name: str) -> str:
    """`layers.3.attn.q.weight` -> `q`."""
    return name.split(".")[-2]
