"""What one family of dense models is in transformers, and what most of their `config.json` have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.config.schema import ModelConfig
from orchestrator.interop.hf_keys import Keys, unsupported
from orchestrator.interop.hf_tensor import HFSource
from orchestrator.models.layers import resolved_head_dim

LLAMA = {
    "embed": HFSource("model.embed_tokens"),
    "norm": HFSource("model.norm"),
    "head": HFSource("lm_head"),
    "layers.{i}.attn_norm": HFSource("model.layers.{i}.input_layernorm"),
    "layers.{i}.attn.q": HFSource("model.layers.{i}.self_attn.q_proj"),
    "layers.{i}.attn.k": HFSource("model.layers.{i}.self_attn.k_proj"),
    "layers.{i}.attn.v": HFSource("model.layers.{i}.self_attn.v_proj"),
    "layers.{i}.attn.o": HFSource("model.layers.{i}.self_attn.o_proj"),
    "layers.{i}.mlp_norm": HFSource("model.layers.{i}.post_attention_layernorm"),
    "layers.{i}.mlp.gate": HFSource("model.layers.{i}.mlp.gate_proj"),
    "layers.{i}.mlp.up": HFSource("model.layers.{i}.mlp.up_proj"),
    "layers.{i}.mlp.down": HFSource("model.layers.{i}.mlp.down_proj"),
}
QK_NORM = {
    "layers.{i}.attn.q_norm": HFSource("model.layers.{i}.self_attn.q_norm"),
    "layers.{i}.attn.k_norm": HFSource("model.layers.{i}.self_attn.k_norm"),
}
GATE_UP = dict.fromkeys(("layers.{i}.mlp.gate", "layers.{i}.mlp.up"), HFSource("model.layers.{i}.mlp.gate_up_proj"))
# Activation of a gate, in their words -> ours.
GATES = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
_ALWAYS_FREE = {
    *("name", "_target_", "arguments", "vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "mlp_dim"),
    *("moe", "max_seq_len", "norm_eps", "rope_theta", "rope_scaling", "tied_embeddings", "dropout", "init_std"),
    *("init_depth", "init_cutoff", "embedding_init_std", "head_init_std"),
}


def _nothing(config: ModelConfig) -> list[str]:
    return []


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A family.

    Attributes:
        transformers: its class.
        weights: our module -> theirs.
        fixed: keys of a `ModelConfig` that have this value in every model of the family.
        free: further keys that may have any; all others have their default.
        read: fields of a `ModelConfig` from a `config.json`, beside `fixed` and `vocab_size`.
        write: keys of a `config.json` beside the shared ones; the second argument is `nested` of `hf_rope.write_rope`.
        differences: what else of a model the class does not compute.
        inner: the inner model, which files may have been saved from without this prefix.
    """

    transformers: str
    weights: Mapping[str, HFSource]
    fixed: Mapping[str, Any]
    free: frozenset[str] = frozenset()
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[ModelConfig, bool], dict[str, Any]]
    differences: Callable[[ModelConfig], list[str]] = field(default=_nothing)
    inner: str = "model."


def differences(config: ModelConfig, fixed: Mapping[str, Any], free: frozenset[str]) -> list[str]:
    """List the keys of a model that do not have the value which a family's class has.

    Args:
        config: of the model.
        fixed: those that are not the defaults.
        free: those that may have any value, beside sizes.
    """
    wanted = {**{key: value for key, value in vars(ModelConfig()).items() if key not in _ALWAYS_FREE}, **fixed}
    return [
        f"{key}={getattr(config, key)}, there {value}"
        for key, value in wanted.items()
        if key not in free and getattr(config, key) != value
    ]


def read_sizes(
    keys: Keys,
    *,
    eps: str = "rms_norm_eps",
    eps_default: float = 1e-6,
    tied: bool = False,
    head_dim: int | None = None,
    mlp: str = "intermediate_size",
) -> dict[str, Any]:
    """Read the sizes, which nearly all families name alike; values are not checked yet.

    Args:
        keys: of the `config.json`.
        eps: their name of the norms' epsilon.
        eps_default: where it is missing.
        tied: the embeddings are, where it does not say.
        head_dim: where it is missing; None: dim / heads.
        mlp: their name of the feed-forward's width.
    """
    heads = keys.need("num_attention_heads")
    kv_heads = keys.get("num_key_value_heads")
    width = keys.get("head_dim", head_dim)
    return {
        "dim": keys.need("hidden_size"),
        "layers": keys.need("num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": "auto" if width is None else width,
        "mlp_dim": keys.need(mlp),
        "max_seq_len": keys.need("max_position_embeddings"),
        "norm_eps": keys.get(eps, eps_default),
        "tied_embeddings": keys.get("tie_word_embeddings", tied),
        "init_std": keys.get("initializer_range", 0.02),
    }


def write_sizes(config: ModelConfig, *, eps: str = "rms_norm_eps", head_dim: bool = True) -> dict[str, Any]:
    """Return the keys of a `config.json` that `read_sizes` reads, but for those that every family has.

    Args:
        config: of the model.
        eps: their name of the norms' epsilon.
        head_dim: the class has that key.
    """
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        **({"head_dim": resolved_head_dim(config)} if head_dim else {}),
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_seq_len,
        eps: config.norm_eps,
        "attention_dropout": config.dropout,
    }


def read_gate(keys: Keys, key: str = "hidden_act", default: str = "silu") -> str:
    """Read the activation of a gated feed-forward.

    Args:
        keys: of the `config.json`.
        key: that has it.
        default: where it is missing.

    Raises:
        CheckpointError: another one.
    """
    given = keys.get(key, default)
    if not isinstance(given, str) or given not in GATES:
        raise unsupported(key, given, ", ".join(GATES))
    return GATES[given]


def write_gate(config: ModelConfig) -> str:
    """Return the name of a gate's activation.

    Args:
        config: of the model.
    """
    return next(theirs for theirs, ours in GATES.items() if ours == config.activation)


def whole_heads(config: ModelConfig) -> list[str]:
    """List what differs where the class knows no width of a head but dim / heads.

    Args:
        config: of the model.
    """
    if resolved_head_dim(config) * config.heads == config.dim:
        return []
    return [f"head_dim={config.head_dim}, there dim / heads"]


def expect_whole_heads(keys: Keys) -> None:
    """See that a width of heads, which such a class does not read, is dim / heads.

    Args:
        keys: of the `config.json`.

    Raises:
        CheckpointError: it is another.
    """
    width, dim, heads = keys.get("head_dim"), keys.get("hidden_size"), keys.get("num_attention_heads")
    if width is not None and not (isinstance(dim, int) and isinstance(heads, int) and width * heads == dim):
        raise unsupported("head_dim", width, "hidden_size / num_attention_heads")


def one_bias(config: ModelConfig) -> list[str]:
    """List what differs where biases of attention's four matrices are one switch.

    Args:
        config: of the model.
    """
    if config.attention_bias == config.output_bias:
        return []
    return ["attention_bias and output_bias are one switch there"]


def read_bias(keys: Keys, key: str = "attention_bias", default: bool = False) -> dict[str, Any]:
    """Read that switch.

    Args:
        keys: of the `config.json`.
        key: its name.
        default: where it is missing.
    """
    bias = keys.get(key, default)
    return {"attention_bias": bias, "output_bias": bias}
