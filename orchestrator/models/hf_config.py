"""The `config.json` of Hugging Face models, and which of their classes computes what a `ModelConfig` describes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import CheckpointError
from orchestrator.models.hf import Family
from orchestrator.models.layers import resolved_head_dim

# family -> its class, and what of our configuration is fixed in it.
_ROPE_MODEL = {"norm": "rms", "activation": "swiglu", "positions": "rope"}
_NO_BIAS = {"attention_bias": False, "output_bias": False, "mlp_bias": False}
_FIXED: dict[Family, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**_ROPE_MODEL, "qk_norm": False, "sliding_window": None}),
    "mistral": ("MistralForCausalLM", {**_ROPE_MODEL, **_NO_BIAS, "qk_norm": False}),
    "qwen2": ("Qwen2ForCausalLM", {**_ROPE_MODEL, **_NO_BIAS, "qk_norm": False, "attention_bias": True}),
    "qwen3": ("Qwen3ForCausalLM", {**_ROPE_MODEL, "qk_norm": True, "mlp_bias": False}),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "norm": "layer",
            "activation": "gelu",
            "positions": "learned",
            **dict.fromkeys(_NO_BIAS, True),
            "qk_norm": False,
            "sliding_window": None,
        },
    ),
}
_ROPE_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_ROPE_KEYS: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seq_len",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "original_max_position_embeddings": "original_max_seq_len",
    },
}
_MISSING = object()


def family_of(config: ModelConfig) -> Family:
    """The Hugging Face family that computes what `config` describes.

    Raises:
        CheckpointError: none does.
    """
    differences = {family: _differences(config, family) for family in _FIXED}
    for family, found in differences.items():
        if not found:
            return family
    fewest = min(map(len, differences.values()))
    closest = [
        f"{_FIXED[family][0]} ({', '.join(found)})" for family, found in differences.items() if len(found) == fewest
    ]
    raise CheckpointError(
        "no class of transformers computes what this model configuration describes",
        got=f"model {config.name}; what differs from the closest: {'; '.join(closest)}",
        allowed=", ".join(name for name, _ in _FIXED.values()),
        fix="train with a preset of one of these families, or use the weights as they are: format=dcp",
    )


def _differences(config: ModelConfig, family: Family) -> list[str]:
    found = [
        f"{key}={getattr(config, key)}, there {value}"
        for key, value in _FIXED[family][1].items()
        if getattr(config, key) != value
    ]
    if family in ("llama", "qwen3") and config.attention_bias != config.output_bias:
        found.append("attention_bias and output_bias are one switch there")
    if family == "gpt2" and config.kv_heads != config.heads:
        found.append(f"kv_heads={config.kv_heads}, there as many as heads")
    if family == "gpt2" and resolved_head_dim(config) * config.heads != config.dim:
        found.append(f"head_dim={config.head_dim}, there dim / heads")
    return found


def to_hf_config(config: ModelConfig, family: Family, eos_token_id: int | None, dtype: str) -> dict[str, Any]:
    """The content of `config.json`, in the form that transformers 4 and 5 read.

    Args:
        config: with `vocab_size` a number.
        dtype: of the weights, as torch names it.
    """
    shared = {
        "architectures": [_FIXED[family][0]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family == "gpt2":
        return {
            **shared,
            "n_embd": config.dim,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_inner": config.mlp_dim,
            "n_positions": config.max_seq_len,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        }
    result = {
        **shared,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": resolved_head_dim(config),
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.dropout,
        "rope_theta": config.rope_theta,
        "rope_scaling": _to_rope_scaling(config),
    }
    if family in ("llama", "qwen3"):
        result["attention_bias"] = config.attention_bias
    if family == "llama":
        result["mlp_bias"] = config.mlp_bias
    else:
        result["sliding_window"] = config.sliding_window
    if family in ("qwen2", "qwen3"):
        result |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return result


def _to_rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return None
    values = {theirs: getattr(scaling, ours) for theirs, ours in _ROPE_KEYS[scaling.kind].items()}
    return {"rope_type": scaling.kind, **values}


def from_hf_config(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family, and the fields of a `ModelConfig`, that a `config.json` describes; values are not checked yet.

    Raises:
        CheckpointError: a model that this product cannot compute, or a key that is missing.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FIXED:
        raise CheckpointError(
            "a model of this type cannot be imported",
            got=f"model_type={str(family)[:100]}",
            allowed=", ".join(get_args(Family)),
        )
    if config.get("quantization_config"):
        raise _unsupported("quantization_config", "set", "weights in fp32, bf16 or fp16")
    fields = _gpt2_fields(config) if family == "gpt2" else _rope_model_fields(config, family)
    fixed = {key: value for key, value in _FIXED[family][1].items() if key not in fields}
    return family, {**fixed, "vocab_size": _need(config, "vocab_size"), **fields}


def _gpt2_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    _expect(config, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    _expect(config, "scale_attn_weights", True)
    _expect(config, "scale_attn_by_inverse_layer_idx", False)
    _expect(config, "add_cross_attention", False)
    dim, heads = _need(config, "n_embd"), _need(config, "n_head")
    inner = config.get("n_inner")
    return {
        "dim": dim,
        "layers": _need(config, "n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "mlp_dim": inner if inner is not None or not isinstance(dim, int) else 4 * dim,
        "max_seq_len": _need(config, "n_positions"),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "dropout": config.get("resid_pdrop", 0.1),
        "tied_embeddings": config.get("tie_word_embeddings", True),
        "init_std": config.get("initializer_range", 0.02),
    }


def _rope_model_fields(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    _expect(config, "hidden_act", "silu", "swish")
    heads = _need(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") if family == "llama" else _need(config, "num_key_value_heads")
    head_dim = config.get("head_dim", 128 if family == "qwen3" else None)
    max_seq_len = _need(config, "max_position_embeddings")
    fields = {
        "dim": _need(config, "hidden_size"),
        "layers": _need(config, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": "auto" if head_dim is None else head_dim,
        "mlp_dim": _need(config, "intermediate_size"),
        "max_seq_len": max_seq_len,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied_embeddings": config.get("tie_word_embeddings", False),
        "init_std": config.get("initializer_range", 0.02),
        **_rope_fields(config, max_seq_len),
    }
    if family in ("llama", "qwen3"):
        bias = config.get("attention_bias", False)
        fields |= {"attention_bias": bias, "output_bias": bias}
    if family == "llama":
        fields["mlp_bias"] = config.get("mlp_bias", False)
    else:
        fields["sliding_window"] = _window(config, family, fields["layers"])
    return fields


def _rope_fields(config: Mapping[str, Any], max_seq_len: Any) -> dict[str, Any]:
    # Version 5 of transformers writes both into `rope_parameters`.
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise _unsupported("rope_scaling", given, "a mapping")
    theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind not in _ROPE_KINDS:
        raise _unsupported("rope_type", kind, ", ".join(_ROPE_KINDS))
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise _unsupported("partial_rotary_factor", "set", "1: all of a head is turned")
    kind = _ROPE_KINDS[kind]
    scaling = {ours: given[theirs] for theirs, ours in _ROPE_KEYS[kind].items() if given.get(theirs) is not None}
    if kind != "none" and "factor" not in scaling:
        raise CheckpointError("config.json lacks a key of rope_scaling", got=f"rope_type={kind}", allowed="factor")
    if kind == "yarn":
        scaling.setdefault("original_max_seq_len", max_seq_len)
        _check_yarn(given, scaling["factor"])
    return {"rope_theta": theta, "rope_scaling": {"kind": kind, **scaling}}


def _check_yarn(given: Mapping[str, Any], factor: Any) -> None:
    """Only the amplitude and the rounding of the paper are computed here; see `models.rope`."""
    amplitude = given.get("attention_factor")
    usual = 0.1 * math.log(factor) + 1.0 if isinstance(factor, (int, float)) and factor > 1 else 1.0
    if amplitude is not None and amplitude != usual:
        raise _unsupported("attention_factor", amplitude, f"{usual}, or none")
    for key in ("mscale", "mscale_all_dim"):
        if given.get(key) is not None:
            raise _unsupported(key, given[key], "none")
    if given.get("truncate", True) is not True:
        raise _unsupported("truncate", given["truncate"], "true")


def _window(config: Mapping[str, Any], family: Family, layers: Any) -> Any:
    if family == "mistral":
        return config.get("sliding_window", 4096)
    if not config.get("use_sliding_window", False) or config.get("sliding_window") is None:
        return None
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        windowed, mixed = kinds[0] == "sliding_attention", kinds.count(kinds[0]) != len(kinds)
    else:
        full = config.get("max_window_layers", 28)  # so many layers, the first ones, see everything
        if not isinstance(full, int) or not isinstance(layers, int):
            raise _unsupported("max_window_layers", full, "a whole number")
        windowed, mixed = full <= 0, 0 < full < layers
    if mixed:
        raise _unsupported("layer_types", "layers with and without a window", "all of a kind")
    return config["sliding_window"] if windowed else None


def _need(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"config.json lacks '{key}'", got=f"model_type={config.get('model_type')}")
    return value


def _expect(config: Mapping[str, Any], key: str, *allowed: Any) -> None:
    value = config.get(key, _MISSING)
    if value is not _MISSING and value not in allowed:
        raise _unsupported(key, value, " or ".join(map(str, allowed)))


def _unsupported(key: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"a model with this '{key}' cannot be computed here", got=f"{key}={str(value)[:100]}", allowed=allowed
    )
