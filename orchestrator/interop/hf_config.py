"""The `config.json` of Hugging Face models, and which of their classes computes what a `ModelConfig` describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import CheckpointError
from orchestrator.interop import hf_moe, hf_rope
from orchestrator.interop.hf_dense import FAMILIES
from orchestrator.interop.hf_family import differences as differing
from orchestrator.interop.hf_keys import KEPT, READ, Keys, unsupported
from orchestrator.interop.hf_layers import FULL, SLIDING, read_kinds, several_windows, windows_of
from orchestrator.interop.hf_weights import Family
from orchestrator.interop.mxfp4 import FATE, is_mxfp4
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
    "mixtral": ("MixtralForCausalLM", {**_ROPE_MODEL, **_NO_BIAS, "qk_norm": False}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_ROPE_MODEL, "qk_norm": True, "mlp_bias": False}),
}
# What may differ in those families, beside sizes; all else has its default.
_BIASES = frozenset({"attention_bias", "output_bias"})
_WINDOWS = frozenset({"sliding_window", "windows"})
_FREE: dict[str, frozenset[str]] = {
    "llama": _BIASES | {"mlp_bias"},
    "mistral": frozenset({"sliding_window"}),
    "mixtral": frozenset({"sliding_window"}),
    "qwen2": _WINDOWS,
    "qwen3": _BIASES | _WINDOWS,
    "qwen3_moe": _BIASES | {"sliding_window"},
}
_FIXED |= {cast(Family, name): (dense.transformers, dict(dense.fixed)) for name, dense in FAMILIES.items()}
_ONE_BIAS = ("llama", "qwen3", "qwen3_moe")  # attention's four matrices have biases, or none has
_THETAS = {"mixtral": 1e6}  # where config.json has none
CLASSES: dict[Family, str] = {family: name for family, (name, _) in _FIXED.items()}
# Their key -> ours, where the value is the same; for the report.
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "n_embd": "dim",
    "num_hidden_layers": "layers",
    "n_layer": "layers",
    "num_attention_heads": "heads",
    "n_head": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_dim",
    "n_inner": "mlp_dim",
    "max_position_embeddings": "max_seq_len",
    "n_positions": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps",
    "layer_norm_eps": "norm_eps",
    "norm_epsilon": "norm_eps",
    "final_logit_softcapping": "logit_softcap",
    "attn_logit_softcapping": "attention_softcap",
    "attention_multiplier": "attention_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logit_scale": "logit_scale",
    "partial_rotary_factor": "rope_share",
    "rotary_pct": "rope_share",
    "use_qkv_bias": "attention_bias",
    "tie_word_embeddings": "tied_embeddings",
    "initializer_range": "init_std",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "sliding_window": "sliding_window",
    "resid_pdrop": "dropout",
}


@dataclass(frozen=True)
class Description:
    """The model that a `config.json` describes.

    Attributes:
        family: the Hugging Face family.
        fields: of a `ModelConfig`; their values are not checked yet.
        fates: what became of every key.
        notes: what a user should know of them.
    """

    family: Family
    fields: dict[str, Any]
    fates: dict[str, str]
    notes: tuple[str, ...]


def family_of(config: ModelConfig, preferred: str | None = None) -> Family:
    """Return the Hugging Face family that computes what `config` describes.

    Args:
        config: of the model.
        preferred: of several that do, this one, as which the model came; else the plainest.

    Raises:
        CheckpointError: none does.
    """
    differences = {family: _differences(config, family) for family in _FIXED}
    able = [family for family, found in differences.items() if not found]
    if able:
        return next((family for family in able if family == preferred), able[0])
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
    dense = FAMILIES.get(family)
    free = _FREE.get(family, frozenset()) if dense is None else dense.free
    found = differing(config, _FIXED[family][1], free) + hf_moe.differences(config, family)
    if dense is not None:
        return found + dense.differences(config)
    found += several_windows(config)
    if family in _ONE_BIAS and config.attention_bias != config.output_bias:
        found.append("attention_bias and output_bias are one switch there")
    if family == "gpt2" and config.kv_heads != config.heads:
        found.append(f"kv_heads={config.kv_heads}, there as many as heads")
    if family == "gpt2" and resolved_head_dim(config) * config.heads != config.dim:
        found.append(f"head_dim={config.head_dim}, there dim / heads")
    return found


def from_hf_config(config: Mapping[str, Any], ignored: frozenset[str] = frozenset()) -> Description:
    """Read a `config.json`.

    Args:
        config: the parsed file.
        ignored: keys of which the user says that they change nothing.

    Raises:
        CheckpointError: a model that this product cannot compute, a key that is missing, or one that is not understood.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FIXED:
        raise CheckpointError(
            "a model of this type cannot be imported" if family else "config.json does not say the type of the model",
            got=f"model_type={ascii(family)[:100].strip(chr(39))}",
            allowed=", ".join(get_args(Family)),
        )
    keys = Keys(config)
    keys.get("model_type")
    if is_mxfp4(config):
        keys.tell("quantization_config", FATE)
    else:
        _refuse_quantised(config)
    if family in FAMILIES:
        fields = FAMILIES[family].read(keys)
    else:
        fields = _gpt2_fields(keys) if family == "gpt2" else _rope_model_fields(keys, cast(Family, family))
    fixed = {key: value for key, value in _FIXED[family][1].items() if key not in fields}
    fields = {**fixed, "vocab_size": keys.need("vocab_size"), **fields}
    fates = keys.fates(ignored)
    for key, ours in _SAME.items():
        if fates.get(key) == READ and ours in fields:
            fates[key] = f"model.{ours}={fields[ours]}"
    for key, ours in hf_moe.SAME.items():
        if fates.get(key) == READ and ours in fields.get("moe", {}):
            fates[key] = f"model.moe.{ours}={fields['moe'][ours]}"
    return Description(family, fields, fates, tuple(keys.notes))


def _refuse_quantised(config: Mapping[str, Any]) -> None:
    """Say by which method the weights were quantised: they are whole, and no numbers that can be trained on."""
    for key in ("quantization_config", "quantization", "compression_config"):
        if found := config.get(key):
            method = found.get("quant_method", found.get("quant_algo")) if isinstance(found, Mapping) else None
            if method is None and isinstance(found, Mapping) and "group_size" in found:
                method = f"MLX, {found.get('bits')} bits"
            method = ascii(method)[:60].strip("'") if method else "a method without a name"
            raise CheckpointError(
                f"the weights are quantised ({method}), and cannot be trained on",
                got=f"{key} in config.json",
                allowed="weights in fp32, bf16 or fp16",
                fix="import the model that it was made from, which its card names",
            )


def _gpt2_fields(keys: Keys) -> dict[str, Any]:
    keys.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
    keys.expect("scale_attn_weights", True)
    keys.expect("scale_attn_by_inverse_layer_idx", False)
    dim, heads = keys.need("n_embd"), keys.need("n_head")
    inner = keys.get("n_inner")
    dropout = keys.get("resid_pdrop", 0.1)
    for key in ("attn_pdrop", "embd_pdrop"):
        if keys.get(key, 0.1) != dropout:
            keys.tell(key, f"not used: training here has one rate, model.dropout={dropout}")
            keys.notes.append(
                f"{key}={keys.get(key, 0.1)} becomes model.dropout={dropout} (resid_pdrop): there is one rate here"
            )
    return {
        "dim": dim,
        "layers": keys.need("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "mlp_dim": inner if inner is not None or not isinstance(dim, int) else 4 * dim,
        "max_seq_len": keys.need("n_positions"),
        "norm_eps": keys.get("layer_norm_epsilon", 1e-5),
        "dropout": dropout,
        "tied_embeddings": keys.get("tie_word_embeddings", True),
        "init_std": keys.get("initializer_range", 0.02),
    }


def _rope_model_fields(keys: Keys, family: Family) -> dict[str, Any]:
    keys.expect("hidden_act", "silu", "swish")
    heads = keys.need("num_attention_heads")
    kv_heads = keys.get("num_key_value_heads") if family == "llama" else keys.need("num_key_value_heads")
    head_dim = keys.get("head_dim", 128 if family == "qwen3" else None)
    max_seq_len = keys.need("max_position_embeddings")
    fields = {
        "dim": keys.need("hidden_size"),
        "layers": keys.need("num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": "auto" if head_dim is None else head_dim,
        "mlp_dim": keys.need("intermediate_size"),
        "max_seq_len": max_seq_len,
        "norm_eps": keys.get("rms_norm_eps", 1e-6),
        "tied_embeddings": keys.get("tie_word_embeddings", False),
        "init_std": keys.get("initializer_range", 0.02),
        **hf_rope.read_rope(keys, max_seq_len, _THETAS.get(family, hf_rope.DEFAULT_THETA)),
    }
    if family in hf_moe.FIXED:
        fields["moe"] = hf_moe.read_experts(keys, family)
    if family in _ONE_BIAS:
        bias = keys.get("attention_bias", False)
        fields |= {"attention_bias": bias, "output_bias": bias}
    else:
        keys.expect("attention_bias", family == "qwen2")
    if family == "llama":
        fields["mlp_bias"] = keys.get("mlp_bias", False)
    else:
        keys.expect("mlp_bias", False)
    return fields | _windows(keys, family, fields["layers"])


def _windows(keys: Keys, family: Family, layers: Any) -> dict[str, Any]:
    """Return how far the positions of each layer see."""
    if family == "qwen3_moe":
        keys.tell("max_window_layers", f"{KEPT}: the class does not read it")
        window = keys.get("sliding_window", 4096)
        return {"sliding_window": window if keys.get("use_sliding_window", False) else None}
    if family == "mixtral":
        return {"sliding_window": keys.get("sliding_window")}
    window = keys.get("sliding_window", None if family == "llama" else 4096)
    full = keys.get("max_window_layers", 28)
    if family == "mistral" and window is not None:  # the class has no switch, and a window always
        keys.expect("use_sliding_window", True)
    elif not keys.get("use_sliding_window", family == "llama"):
        window = None
    if family == "llama" and window is not None:
        raise unsupported("sliding_window", window, "none: the class has no window")
    if family in ("qwen2", "qwen3"):
        if window is not None and not isinstance(full, int):
            raise unsupported("max_window_layers", full, "a whole number")
        return windows_of(
            read_kinds(keys, layers, lambda layer: FULL if window is None or layer < full else SLIDING), window
        )
    usual = FULL if window is None else SLIDING
    if odd := [kind for kind in read_kinds(keys, layers, lambda layer: usual) if kind != usual]:
        raise unsupported("layer_types", odd[0], f"{usual}, with sliding_window={window}")
    return {} if family == "llama" else {"sliding_window": window}
