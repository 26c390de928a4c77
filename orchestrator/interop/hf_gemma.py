"""Gemma 1, 2 and 3 (text). Source: their configurations and models in transformers 5.23."""

from __future__ import annotations

from typing import Any

from orchestrator.config.schema import ModelConfig
from orchestrator.interop.hf_family import (
    LLAMA,
    QK_NORM,
    Dense,
    one_bias,
    read_bias,
    read_gate,
    read_sizes,
    write_gate,
    write_sizes,
)
from orchestrator.interop.hf_keys import KEPT, Keys
from orchestrator.interop.hf_layers import every, read_kinds, scaled_windows, several_windows, windows_of, write_kinds
from orchestrator.interop.hf_rope import read_layered_rope, read_rope, write_layered_rope, write_rope
from orchestrator.interop.hf_tensor import HFSource

_FOUR_NORMS = LLAMA | {
    "layers.{i}.attn_post_norm": HFSource("model.layers.{i}.post_attention_layernorm"),
    "layers.{i}.mlp_norm": HFSource("model.layers.{i}.pre_feedforward_layernorm"),
    "layers.{i}.mlp_post_norm": HFSource("model.layers.{i}.post_feedforward_layernorm"),
}
_FIXED = {"norm": "rms_offset"}
_FREE = frozenset({"activation", "attention_bias", "output_bias", "embedding_scale"})


def _read(keys: Keys) -> dict[str, Any]:
    fields = read_sizes(keys, tied=True, head_dim=256) | read_bias(keys)
    if isinstance(fields["dim"], int):
        fields["embedding_scale"] = fields["dim"] ** 0.5
    return fields


def _read_1(keys: Keys) -> dict[str, Any]:
    if keys.get("hidden_act") == "gelu":  # which the class reads as what was meant
        keys.tell("hidden_act", "gelu_pytorch_tanh, as in transformers")
        activation = "geglu"
    else:
        activation = read_gate(keys, default="gelu_pytorch_tanh")
    keys.tell("hidden_activation", f"{KEPT}: the class reads hidden_act")
    fields = _read(keys)
    return fields | {"activation": activation, **read_rope(keys, fields["max_seq_len"])}


def _read_2(keys: Keys) -> dict[str, Any]:
    fields = _read(keys) | _read_scale(keys)
    fields |= windows_of(read_kinds(keys, fields["layers"], every(2, "layer_types")), keys.get("sliding_window", 4096))
    fields |= {
        "attention_softcap": keys.get("attn_logit_softcapping", 50.0),
        "logit_softcap": keys.get("final_logit_softcapping", 30.0),
    }
    return fields | read_rope(keys, fields["max_seq_len"])


def _read_3(keys: Keys) -> dict[str, Any]:
    fields = _read(keys) | _read_scale(keys)
    usual = every(keys.get("sliding_window_pattern", 6), "sliding_window_pattern")
    fields |= windows_of(read_kinds(keys, fields["layers"], usual), keys.get("sliding_window", 4096))
    keys.tell("attn_logit_softcapping", f"{KEPT}: the class does not apply it")
    fields["logit_softcap"] = keys.get("final_logit_softcapping")
    fields |= read_layered_rope(keys, fields["max_seq_len"], (1e6, 1e4), "rope_local_base_freq")
    if not fields["windows"] and fields["sliding_window"] is None:
        del fields["rope_local_theta"]
    return fields


def _read_scale(keys: Keys) -> dict[str, Any]:
    keys.tell("hidden_act", f"{KEPT}: the class reads hidden_activation")
    for key in ("cache_implementation", "sliding_window_size"):
        keys.tell(key, f"{KEPT}: the class does not read it")
    scalar = keys.get("query_pre_attn_scalar", 256)
    known = isinstance(scalar, (int, float)) and scalar > 0
    return {
        "activation": read_gate(keys, "hidden_activation", "gelu_pytorch_tanh"),
        "attention_scale": scalar**-0.5 if known else scalar,
    }


def _write(config: ModelConfig, nested: bool) -> dict[str, Any]:
    return {**write_sizes(config), "attention_bias": config.attention_bias}


def _write_1(config: ModelConfig, nested: bool) -> dict[str, Any]:
    return {**_write(config, nested), "hidden_act": write_gate(config), **write_rope(config, nested)}


def _write_scale(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention_scale or config.head_width**-0.5
    scalar = scale**-2.0
    return {
        "hidden_activation": write_gate(config),
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        "final_logit_softcapping": config.logit_softcap,
    }


def _write_2(config: ModelConfig, nested: bool) -> dict[str, Any]:
    cap = {"attn_logit_softcapping": config.attention_softcap}
    kinds = write_kinds(config)
    return {**_write(config, nested), **_write_scale(config), **cap, **kinds, **write_rope(config, nested)}


def _write_3(config: ModelConfig, nested: bool) -> dict[str, Any]:
    return {**_write(config, nested), **_write_scale(config), **write_kinds(config), **write_layered_rope(config)}


def _differences(config: ModelConfig) -> list[str]:
    found = one_bias(config)
    if abs(config.embedding_scale - config.dim**0.5) > 1e-6 * config.embedding_scale:
        found.append(f"embedding_scale={config.embedding_scale}, there the root of dim")
    found += several_windows(config)
    return found


def _differences_3(config: ModelConfig) -> list[str]:
    found = _differences(config)
    found += scaled_windows(config)
    return found


GEMMA = Dense(
    transformers="GemmaForCausalLM",
    weights=LLAMA,
    fixed=_FIXED,
    free=_FREE,
    read=_read_1,
    write=_write_1,
    differences=_differences,
)
GEMMA2 = Dense(
    transformers="Gemma2ForCausalLM",
    weights=_FOUR_NORMS,
    fixed={**_FIXED, "norm_placement": "both"},
    free=_FREE | {"attention_scale", "attention_softcap", "logit_softcap", "windows", "sliding_window"},
    read=_read_2,
    write=_write_2,
    differences=_differences,
)
GEMMA3 = Dense(
    transformers="Gemma3ForCausalLM",
    weights=_FOUR_NORMS | QK_NORM,
    fixed={**_FIXED, "norm_placement": "both", "qk_norm": True},
    free=_FREE | {"attention_scale", "logit_softcap", "windows", "sliding_window", "rope_local_theta"},
    read=_read_3,
    write=_write_3,
    differences=_differences_3,
)
