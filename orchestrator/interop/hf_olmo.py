"""OLMo 2 and 3: norms of what is added to the stream, and of all heads together. Source: transformers 5.23."""

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
from orchestrator.interop.hf_keys import Keys
from orchestrator.interop.hf_layers import every, read_kinds, scaled_windows, several_windows, windows_of, write_kinds
from orchestrator.interop.hf_rope import read_layered_rope, read_rope, write_layered_rope, write_rope
from orchestrator.interop.hf_tensor import HFSource

_WEIGHTS = {
    **{ours: theirs for ours, theirs in LLAMA.items() if not ours.endswith("_norm")},
    **QK_NORM,
    "layers.{i}.attn_post_norm": HFSource("model.layers.{i}.post_attention_layernorm"),
    "layers.{i}.mlp_post_norm": HFSource("model.layers.{i}.post_feedforward_layernorm"),
}
_FIXED = {"norm_placement": "post", "qk_norm": True, "qk_norm_over": "width"}
_FREE = frozenset({"activation", "attention_bias", "output_bias"})


def _read(keys: Keys) -> dict[str, Any]:
    return read_sizes(keys, eps_default=1e-5) | read_bias(keys) | {"activation": read_gate(keys)}


def _read_2(keys: Keys) -> dict[str, Any]:
    fields = _read(keys)
    return fields | read_rope(keys, fields["max_seq_len"])


def _read_3(keys: Keys) -> dict[str, Any]:
    fields = _read(keys)
    fields |= windows_of(read_kinds(keys, fields["layers"], every(4, "layer_types")), keys.get("sliding_window", 4096))
    fields |= read_layered_rope(keys, fields["max_seq_len"], (5e5, 5e5), None)
    if not fields["windows"] and fields["sliding_window"] is None:
        del fields["rope_local_theta"]
    return fields


def _write(config: ModelConfig, nested: bool) -> dict[str, Any]:
    bias = {"attention_bias": config.attention_bias, "hidden_act": write_gate(config)}
    return {**write_sizes(config), **bias}


def _differences_3(config: ModelConfig) -> list[str]:
    found = one_bias(config)
    found += several_windows(config)
    found += scaled_windows(config)
    return found


OLMO2 = Dense(
    transformers="Olmo2ForCausalLM",
    weights=_WEIGHTS,
    fixed=_FIXED,
    free=_FREE,
    read=_read_2,
    write=lambda config, nested: {**_write(config, nested), **write_rope(config, nested)},
    differences=one_bias,
)
OLMO3 = Dense(
    transformers="Olmo3ForCausalLM",
    weights=_WEIGHTS,
    fixed=_FIXED,
    free=_FREE | {"windows", "sliding_window", "rope_local_theta"},
    read=_read_3,
    write=lambda config, nested: {**_write(config, nested), **write_kinds(config), **write_layered_rope(config)},
    differences=_differences_3,
)
