"""Parameters and floating-point operations of a model, from its description alone."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import ConfigError


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of elements, by use.

    Attributes:
        embedding: rows of the token embedding.
        positions: rows of a learned position table, else 0.
        attention: query, key, value and output projections with their biases, and QK-norm, of all layers.
        mlp: feed-forward matrices with their biases, of all layers.
        norms: the other normalisations.
        head: the output head; 0 where it is the embedding's weight.
        matmul: elements that a token is multiplied with, the head's included even where it is tied.
    """

    embedding: int
    positions: int
    attention: int
    mlp: int
    norms: int
    head: int
    matmul: int

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
    width, kv_width = config.heads * config.head_width, config.kv_heads * config.head_width
    attention_matrices = 2 * config.dim * (width + kv_width)
    attention_extra = (width + 2 * kv_width) * config.attention_bias + config.dim * config.output_bias
    attention_extra += 2 * config.head_width * config.qk_norm
    gated = config.activation == "swiglu"
    mlp_matrices = (3 if gated else 2) * config.dim * config.mlp_dim
    mlp_biases = ((2 if gated else 1) * config.mlp_dim + config.dim) * config.mlp_bias
    norm = config.dim * (1 if config.norm == "rms" else 2)
    return ParameterCount(
        embedding=vocab * config.dim,
        positions=config.max_seq_len * config.dim if config.positions == "learned" else 0,
        attention=config.layers * (attention_matrices + attention_extra),
        mlp=config.layers * (mlp_matrices + mlp_biases),
        norms=(2 * config.layers + 1) * norm,
        head=0 if config.tied_embeddings else vocab * config.dim,
        matmul=config.layers * (attention_matrices + mlp_matrices) + vocab * config.dim,
    )


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
    return 6.0 * matmul + 12.0 * config.layers * config.heads * config.head_width * mean_attended(config, seq_len)


def mean_attended(config: ModelConfig, seq_len: int) -> float:
    """Return the positions that a query sees, averaged over a sequence; half of `seq_len` without a window.

    Args:
        config: of the model.
        seq_len: tokens of a sequence.
    """
    window = min(config.sliding_window or seq_len, seq_len)
    return window - window**2 / (2 * seq_len)


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
