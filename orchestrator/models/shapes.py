"""Names and shapes of a model's parameters and of adapters, from its configuration alone. No torch, no model built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from orchestrator.config.schema import GATED, LoraConfig, ModelConfig
from orchestrator.constants import ALL_LINEAR, LORA_A, LORA_B

Shape = tuple[int, ...]
# Where a mixture of experts begins.
_MIXTURE = (".mlp.router.", ".mlp.experts.", ".mlp.shared.", ".mlp.shared_gate.")


def parameter_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Every parameter of the `Decoder` of `config`, a tied head left out, one by one: there may be very many.

    Args:
        config: checked by `config.validate`, with `vocab_size` a number.
    """
    assert isinstance(config.vocab_size, int)
    dim = config.dim
    yield "embed.weight", (config.vocab_size, dim)
    if config.positions == "learned":
        yield "positions.weight", (config.max_seq_len, dim)
    feed_forwards = list(_dense(config, "mlp", config.mlp_dim)), list(_experts(config))
    alike: dict[tuple[int, int], list[tuple[str, Shape]]] = {}
    for number in range(config.layers):
        heads = config.heads_of(number)
        if heads not in alike:
            alike[heads] = list(_layer(config, *heads))
        mixed = bool(config.moe.experts) and number >= config.moe.dense_layers
        parts = (*alike[heads], *feed_forwards[mixed])
        yield from ((f"layers.{number}.{name}", shape) for name, shape in parts)
    yield from _norm(config, "norm")
    if not config.tied_embeddings:
        yield "head.weight", (config.vocab_size, dim)


def takes_adapter(name: str) -> bool:
    """Whether an adapter can lie beside the parameter called `name`, where that is a matrix: of a mixture none can."""
    inside = name.startswith("layers.") and name.endswith(".weight")
    return inside and not any(part in name for part in _MIXTURE)


def adapter_shapes(config: ModelConfig, lora: LoraConfig) -> Iterator[tuple[str, Shape]]:
    """Every parameter of the adapters of `lora` beside the `Decoder` of `config`, as `models.lora` makes them.

    Args:
        config: of the model, as for `parameter_shapes`.
        lora: of the adapters, with a rank.
    """
    assert lora.rank is not None
    for name, shape in parameter_shapes(config):
        path = name.rpartition(".")[0]
        wanted = lora.target_modules == (ALL_LINEAR,) or path.rpartition(".")[2] in lora.target_modules
        if wanted and len(shape) == 2 and takes_adapter(name):
            yield f"{path}.{LORA_A}", (lora.rank, shape[1])
            yield f"{path}.{LORA_B}", (shape[0], lora.rank)


def trained_share(config: ModelConfig, lora: LoraConfig) -> float:
    """Return how many numbers are trained for each of the model's: 1 without adapters, and where nobody knows.

    Args:
        config: of the model. Where its vocabulary is not known yet it counts as none.
        lora: of the adapters.
    """
    if lora.rank is None or config._target_ is not None:
        return 1.0
    config = config if isinstance(config.vocab_size, int) else replace(config, vocab_size=0)
    whole = sum(math.prod(shape) for _, shape in parameter_shapes(config))
    return sum(math.prod(shape) for _, shape in adapter_shapes(config, lora)) / whole


def _layer(config: ModelConfig, heads: int, kv_heads: int) -> Iterator[tuple[str, Shape]]:
    dim = config.dim
    head = config.head_width
    width, kv_width = heads * head, kv_heads * head
    before, after = config.norm_placement != "post", config.norm_placement != "pre"
    yield from _norm(config, "attn_norm" if before else None)
    if config.attention_sinks:
        yield "attn.sinks", (heads,)
    if config.mla.kv_lora_rank:
        yield from _latent_attention(config, heads)
    else:
        for name, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
            yield from _linear(f"attn.{name}", rows, dim, config.attention_bias)
        yield from _linear("attn.o", dim, width, config.output_bias)
    if config.qk_norm and (config.norm != "rms_plain" or config.qk_norm_over == "width"):
        whole = config.qk_norm_over == "width"
        yield "attn.q_norm.weight", (width if whole else head,)
        yield "attn.k_norm.weight", (kv_width if whole else head,)
    yield from _norm(config, "attn_post_norm" if after else None)
    yield from _norm(config, "mlp_norm" if before and config.residual != "parallel_one_norm" else None)
    yield from _norm(config, "mlp_post_norm" if after else None)


def _latent_attention(config: ModelConfig, heads: int) -> Iterator[tuple[str, Shape]]:
    mla, dim, width = config.mla, config.dim, heads * config.head_width
    if mla.q_lora_rank is None:
        yield "attn.q.weight", (width, dim)
    else:
        yield from _linear("attn.q_down", mla.q_lora_rank, dim, config.attention_bias)
        yield "attn.q_latent_norm.weight", (mla.q_lora_rank,)
        yield "attn.q_up.weight", (width, mla.q_lora_rank)
    yield from _linear("attn.kv_down", mla.kv_lora_rank + mla.rope_head_dim, dim, config.attention_bias)
    yield "attn.kv_latent_norm.weight", (mla.kv_lora_rank,)
    yield "attn.kv_up.weight", (heads * (mla.nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    yield from _linear("attn.o", dim, heads * mla.v_head_dim, config.output_bias)


def _dense(config: ModelConfig, name: str, width: int) -> Iterator[tuple[str, Shape]]:
    """Yield a feed-forward layer's shapes."""
    for matrix in ("gate", "up") if config.activation in GATED else ("up",):
        yield from _linear(f"{name}.{matrix}", width, config.dim, config.mlp_bias)
    yield from _linear(f"{name}.down", config.dim, width, config.mlp_bias)


def _experts(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Yield a mixture's shapes."""
    moe, dim, width = config.moe, config.dim, config.moe.width(config)
    yield from _linear("mlp.router", moe.experts, dim, moe.router_bias)
    if moe.balance_bias:
        yield "mlp.router.balance_bias", (moe.experts,)
    for name, rows, columns in (("gate", width, dim), ("up", width, dim), ("down", dim, width)):
        yield f"mlp.experts.{name}", (moe.experts, rows, columns)
        if moe.expert_bias:
            yield f"mlp.experts.{name}_bias", (moe.experts, rows)
    if moe.shared_mlp_dim:
        yield from _dense(config, "mlp.shared", moe.shared_mlp_dim)
    if moe.shared_gate:
        yield "mlp.shared_gate.weight", (1, dim)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(config: ModelConfig, name: str | None) -> Iterator[tuple[str, Shape]]:
    if name is None or config.norm.endswith("_plain"):
        return
    yield f"{name}.weight", (config.dim,)
    if config.norm == "layer":
        yield f"{name}.bias", (config.dim,)
