"""The description of a model as frozen dataclasses; `config.schema` has the rest of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Auto = Literal["auto"]
Norm = Literal["rms", "rms_offset", "rms_plain", "layer", "layer_no_bias", "layer_plain"]
Activation = Literal["swiglu", "swiglu_clamped", "geglu", "gelu", "gelu_erf", "relu2"]
GATED = ("swiglu", "swiglu_clamped", "geglu")  # activations with a matrix for the gate


@dataclass(frozen=True)
class RopeScalingConfig:
    """RoPE scaling for long contexts; the parameters carry the names of Hugging Face configurations."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_seq_len: int = 8192
    truncate: bool = True  # yarn: bounds of the blend are whole pairs
    attention_factor: float | None = None  # yarn: on cosine and sine; null: 0.1 ln(factor) + 1
    mscale_all_dim: float | None = None  # yarn, of latent attention: m in (0.1 m ln(factor) + 1)^2 on the scores


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention: keys and values are made of a latent per position. Sizes count elements."""

    kv_lora_rank: int = 0  # width of the latent of keys and values; 0: ordinary attention
    q_lora_rank: int | None = None  # of that of the queries; null: they are made of the stream
    nope_head_dim: int = 128  # width of a query's and a key's part without positions, of each head
    rope_head_dim: int = 64  # of the part that rotary positions turn; of keys, one for all heads
    v_head_dim: int = 128  # of a value


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of the feed-forward. Sizes count elements; `experts: 0` is a dense model."""

    experts: int = 0  # routed ones; 0: none
    top_k: int = 2  # experts of a token
    mlp_dim: int | Auto = "auto"  # inner width of one expert; auto: model.mlp_dim
    shared_mlp_dim: int = 0  # inner width of a feed-forward beside them that every token takes; 0: none
    shared_gate: bool = False  # a gate of its own for each token on that feed-forward
    dense_layers: int = 0  # the first layers, which have a feed-forward of model.mlp_dim instead
    score: Literal["softmax", "sigmoid", "softmax_chosen"] = "softmax"  # of the router; the last over the chosen alone
    normalize: bool = True  # the weights of a token's experts add up to one
    scale: float = 1.0  # factor on those weights
    groups: int = 1  # of experts, of which a token's experts come from the best ones
    top_groups: int = 1  # how many of them
    router_bias: bool = False
    expert_bias: bool = False
    capacity_factor: float | None = None  # of a sequence's even share, that an expert takes at most; null: dropless
    balance_loss: float = 0.0  # coefficient of the sequence-wise balance loss
    z_loss: float = 0.0  # coefficient of the router's z-loss
    balance_bias: bool = False  # an offset per expert, for the choice alone, that evens the load out
    balance_bias_rate: float = 0.001  # by which it changes in a step

    def width(self, model: ModelConfig) -> int:
        """Inner width of one expert.

        Args:
            model: whose experts they are.
        """
        return model.mlp_dim if self.mlp_dim == "auto" else self.mlp_dim


@dataclass(frozen=True)
class ModelConfig:
    """A decoder language model. Sizes count elements; `vocab_size: auto` takes the tokenizer's.

    A model of the user's own is named by `_target_`: it is made of the same description, and of `arguments`.
    """

    name: str = "tiny"
    _target_: str | None = None  # package.module.Name of an own model, or an installed entry point; null: Decoder
    arguments: dict[str, Any] = field(default_factory=dict)  # of an own model, beside the description
    vocab_size: int | Auto = "auto"
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int | Auto = "auto"  # auto: dim / heads
    mla: MLAConfig = MLAConfig()
    mlp_dim: int = 384
    moe: MoEConfig = MoEConfig()
    max_seq_len: int = 2048
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_placement: Literal["pre", "post", "both"] = "pre"  # of the residual branches' input, output, or both
    residual: Literal["sequential", "parallel", "parallel_one_norm"] = "sequential"
    residual_scale: float = 1.0  # on what a branch adds to the stream
    activation: Activation = "swiglu"
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10000.0
    rope_local_theta: float | None = None  # of layers with a window, which are not scaled then; null: as the others
    rope_layers: tuple[bool, ...] = ()  # repeated over the layers: those that turn queries and keys; (): all
    rope_share: float = 1.0  # of a head, from its beginning, that is turned
    rope_layout: Literal["half", "interleaved"] = "half"  # partners: half the turned width apart, or neighbours
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    qk_norm: bool = False
    qk_norm_over: Literal["head", "width"] = "head"  # each head by itself, or all heads together
    qk_norm_after_rope: bool = False
    attention_bias: bool = False  # on the query, key and value projections
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    attention_scale: float | None = None  # on the scores; null: head_dim ** -0.5
    attention_softcap: float | None = None  # c tanh(scores / c)
    attention_sinks: bool = False  # a learned logit per head that takes part in the softmax, and has no value
    sliding_window: int | None = None  # tokens that a position sees, itself included
    windows: tuple[int | None, ...] = ()  # repeated over the layers, in place of sliding_window
    layer_heads: tuple[int, ...] = ()  # heads of each layer, where they differ
    layer_kv_heads: tuple[int, ...] = ()
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    dropout: float = 0.0
    init_std: float = 0.02
    init_depth: Literal["model", "layer", "none"] = "model"  # what projections into the residual stream are divided by
    init_cutoff: float | None = None  # standard deviations beyond which a weight is drawn again
    embedding_init_std: float | None = None  # None: init_std
    head_init_std: float | None = None  # likewise

    @property
    def head_width(self) -> int:
        """`head_dim`, with `auto` filled in; of latent attention the width of a query."""
        if self.mla.kv_lora_rank:
            return self.mla.nope_head_dim + self.mla.rope_head_dim
        return self.dim // self.heads if self.head_dim == "auto" else self.head_dim

    @property
    def rope_width(self) -> int:
        """Elements of a head that rotary positions turn."""
        return self.mla.rope_head_dim if self.mla.kv_lora_rank else int(self.head_width * self.rope_share)

    def cached(self, layer: int) -> tuple[int, int, int]:
        """Return what text generation keeps of a position: heads, and the widths of a key and of a value.

        Args:
            layer: its number.
        """
        if self.mla.kv_lora_rank:
            return 1, self.mla.kv_lora_rank, self.mla.rope_head_dim
        return self.heads_of(layer)[1], self.head_width, self.head_width

    def window_of(self, layer: int) -> int | None:
        """Tokens that a position of a layer sees, itself included; None: all before it.

        Args:
            layer: its number.
        """
        return self.windows[layer % len(self.windows)] if self.windows else self.sliding_window

    def rope_of(self, layer: int) -> Literal["global", "local"] | None:
        """Which rotary positions a layer has.

        Args:
            layer: its number.
        """
        if self.positions != "rope" or (self.rope_layers and not self.rope_layers[layer % len(self.rope_layers)]):
            return None
        local = self.rope_local_theta is not None and self.window_of(layer) is not None
        return "local" if local else "global"

    def heads_of(self, layer: int) -> tuple[int, int]:
        """Count the query heads, and the key and value heads, of a layer.

        Args:
            layer: its number.
        """
        heads = self.layer_heads[layer] if self.layer_heads else self.heads
        return heads, self.layer_kv_heads[layer] if self.layer_kv_heads else self.kv_heads
