"""Parameters and floating-point operations of a model, from its description alone."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.schema import GATED, ModelConfig
from orchestrator.errors import ConfigError


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of elements, by use.

    Attributes:
        embedding: rows of the token embedding.
        positions: rows of a learned position table, else 0.
        attention: query, key, value and output projections with their biases, and QK-norm, of all layers.
        mlp: feed-forward matrices with their biases, of all layers; all experts and their routers among them.
        norms: the other normalisations.
        head: the output head; 0 where it is the embedding's weight.
        matmul: elements that a token is multiplied with, the head's included even where it is tied; of experts, those
            that it goes to.
        idle: of `mlp`, experts that a token does not go to.
    """

    embedding: int
    positions: int
    attention: int
    mlp: int
    norms: int
    head: int
    matmul: int
    idle: int = 0

    @property
    def active(self) -> int:
        """Elements that are used for one token."""
        return self.total - self.idle

    @property
    def total(self) -> int:
        """All elements, a tied weight counted once."""
        return self.embedding + self.positions + self.attention + self.mlp + self.norms + self.head


def parameter_count(config: ModelConfig, vocab_size: int | None = None) -> ParameterCount:
    """Count the parameters of a model.

    Args:
        config: its description.
        vocab_size: rows of the embedding where the description leaves them to the tokenizer.

    Raises:
        ConfigError: neither says how large the vocabulary is.
    """
    vocab = _vocabulary(config, vocab_size)
    attention_matrices = attention_extra = 0
    for layer in range(config.layers):
        matrices, extra = _attention(config, *config.heads_of(layer))
        attention_matrices, attention_extra = attention_matrices + matrices, attention_extra + extra
    mlp, mlp_matmul, idle = _feed_forwards(config)
    norm = config.dim * (0 if config.norm.endswith("_plain") else 2 if config.norm == "layer" else 1)
    norms = (4 if config.norm_placement == "both" else 2) - (config.residual == "parallel_one_norm")
    return ParameterCount(
        embedding=vocab * config.dim,
        positions=config.max_seq_len * config.dim if config.positions == "learned" else 0,
        attention=attention_matrices + attention_extra,
        mlp=mlp,
        norms=(norms * config.layers + 1) * norm,
        head=0 if config.tied_embeddings else vocab * config.dim,
        matmul=attention_matrices + mlp_matmul + vocab * config.dim,
        idle=idle,
    )


def _attention(config: ModelConfig, heads: int, kv_heads: int) -> tuple[int, int]:
    """Count the elements of a layer's matrices, and of the vectors beside them."""
    if config.mla.kv_lora_rank:
        return _latent_attention(config, heads)
    width, kv_width = heads * config.head_width, kv_heads * config.head_width
    extra = (width + 2 * kv_width) * config.attention_bias + config.dim * config.output_bias
    extra += heads * config.attention_sinks
    if config.qk_norm and config.qk_norm_over == "width":
        extra += width + kv_width
    elif config.qk_norm and config.norm != "rms_plain":
        extra += 2 * config.head_width
    return 2 * config.dim * (width + kv_width), extra


def _latent_attention(config: ModelConfig, heads: int) -> tuple[int, int]:
    mla, dim, width = config.mla, config.dim, heads * config.head_width
    latents = mla.kv_lora_rank + (mla.q_lora_rank or 0)
    queries = dim * width if mla.q_lora_rank is None else mla.q_lora_rank * (dim + width)
    keys = dim * (mla.kv_lora_rank + mla.rope_head_dim) + mla.kv_lora_rank * heads * (
        mla.nope_head_dim + mla.v_head_dim
    )
    biases = (latents + mla.rope_head_dim) * config.attention_bias + dim * config.output_bias
    return queries + keys + heads * mla.v_head_dim * dim, latents + biases


def _feed_forwards(config: ModelConfig) -> tuple[int, int, int]:
    """Count the elements of all layers' feed-forwards, of those what a token is multiplied with, and idle experts'."""
    moe, dim = config.moe, config.dim
    dense = min(moe.dense_layers, config.layers) if moe.experts else config.layers
    matrices, biases = _feed_forward(config, config.mlp_dim)
    total, matmul = dense * (matrices + biases), dense * matrices
    if not moe.experts:
        return total, matmul, 0
    width = moe.width(config)
    one, biases = 3 * dim * width, (2 * width + dim) * moe.expert_bias
    shared, shared_biases = _feed_forward(config, moe.shared_mlp_dim) if moe.shared_mlp_dim else (0, 0)
    every = shared + dim * (moe.experts + moe.shared_gate)
    beside = shared_biases + moe.experts * (moe.router_bias + moe.balance_bias)
    sparse = config.layers - dense
    total += sparse * (moe.experts * (one + biases) + every + beside)
    matmul += sparse * (moe.top_k * one + every)
    return total, matmul, sparse * (moe.experts - moe.top_k) * (one + biases)


def _feed_forward(config: ModelConfig, width: int) -> tuple[int, int]:
    """Count the elements of a feed-forward's matrices, and of its biases."""
    gated = config.activation in GATED
    biases = ((2 if gated else 1) * width + config.dim) * config.mlp_bias
    return (3 if gated else 2) * config.dim * width, biases


def flops_per_token(config: ModelConfig, seq_len: int, vocab_size: int | None = None) -> float:
    """Floating-point operations of training on one token, forward and backward.

    `6 N + 12 L H Q S`: each matmul element costs a multiplication and an addition forward and twice that
    backward; attention's two products (scores, and their weighted sum) cost 12 per layer, head, element
    of a head and position seen. S is the *mean* number of positions that a causal query sees, taken as
    seq_len / 2, or with a window W < seq_len as W - W^2 / (2 seq_len). N has the head but not the lookup in
    the embedding, norms and biases. Neither recomputation nor the masking of documents is counted, so
    the figure does not depend on how the job is run.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, which has S = seq_len; here halved, since causal
    kernels skip the other half.

    Args:
        config: the model.
        seq_len: tokens per sequence.
        vocab_size: as for `parameter_count`.
    """
    matmul = parameter_count(config, vocab_size).matmul
    seen = sum(
        config.heads_of(layer)[0] * _attended(config.window_of(layer), seq_len) for layer in range(config.layers)
    )
    # Scores, and their weighted sum, are products as wide as a key and as a value.
    value = config.mla.v_head_dim if config.mla.kv_lora_rank else config.head_width
    return 6.0 * matmul + 6.0 * (config.head_width + value) * seen


def mean_attended(config: ModelConfig, seq_len: int) -> float:
    """Return the positions that a query sees, averaged over a sequence and the layers; without windows half of it.

    Args:
        config: of the model.
        seq_len: tokens of a sequence.
    """
    return sum(_attended(config.window_of(layer), seq_len) for layer in range(config.layers)) / config.layers


def _attended(window: int | None, seq_len: int) -> float:
    seen = min(window or seq_len, seq_len)
    return seen - seen**2 / (2 * seq_len)


def _vocabulary(config: ModelConfig, vocab_size: int | None) -> int:
    if vocab_size is not None:
        return vocab_size
    if config.vocab_size == "auto":
        raise ConfigError(
            "the size of the vocabulary is not known",
            got="model.vocab_size=auto",
            fix="set model.vocab_size, or name a tokenizer",
        )
    return config.vocab_size
