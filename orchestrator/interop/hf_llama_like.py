"""SmolLM3, Granite, Phi-3 and GLM-4: Llama's block with something more. Source: transformers 5.23."""

from __future__ import annotations

from typing import Any

from orchestrator.config.schema import ModelConfig
from orchestrator.interop.hf_family import (
    GATE_UP,
    LLAMA,
    Dense,
    one_bias,
    read_bias,
    read_gate,
    read_sizes,
    write_gate,
    write_sizes,
)
from orchestrator.interop.hf_keys import KEPT, Keys, unsupported
from orchestrator.interop.hf_layers import (
    FULL,
    SLIDING,
    pattern,
    read_kinds,
    sizes_of_windows,
    windows_of,
    write_kinds,
)
from orchestrator.interop.hf_rope import read_rope, write_rope
from orchestrator.interop.hf_tensor import HFSource

_QKV = dict.fromkeys([f"layers.{{i}}.attn.{part}" for part in "qkv"], HFSource("model.layers.{i}.self_attn.qkv_proj"))
_BIASES = frozenset({"attention_bias", "output_bias", "mlp_bias", "activation"})


def _read_smollm3(keys: Keys) -> dict[str, Any]:
    fields = read_sizes(keys, tied=True) | read_bias(keys)
    layers, interval = fields["layers"], keys.get("no_rope_layer_interval", 4)
    turned = keys.get("no_rope_layers")  # 1 where a layer has them, whatever the name says
    if turned is None and isinstance(layers, int) and isinstance(interval, int) and interval > 0:
        turned = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not (isinstance(turned, list) and isinstance(layers, int) and len(turned) >= layers):
        raise unsupported("no_rope_layers", turned, "a list with 1 or 0 for each layer")
    ropes = [bool(one) for one in turned[:layers]]
    window = keys.get("sliding_window") if keys.get("use_sliding_window", False) else None
    kinds = read_kinds(keys, layers, lambda layer: FULL if window is None or ropes[layer] else SLIDING)
    found = pattern(ropes)
    fields |= {"activation": read_gate(keys), "mlp_bias": keys.get("mlp_bias", False)}
    fields |= {"rope_layers": () if found == (True,) else found, **windows_of(kinds, window)}
    keys.tell("max_window_layers", f"{KEPT}: the class does not read it")
    return fields | read_rope(keys, fields["max_seq_len"], 2e6)


def _write_smollm3(config: ModelConfig, nested: bool) -> dict[str, Any]:
    kinds = write_kinds(config)
    return {
        **write_sizes(config),
        **_biases(config),
        **kinds,
        "no_rope_layers": [int(config.rope_of(layer) is not None) for layer in range(config.layers)],
        "use_sliding_window": kinds["sliding_window"] is not None,
        **write_rope(config, nested),
    }


def _biases(config: ModelConfig) -> dict[str, Any]:
    written = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return {**written, "hidden_act": write_gate(config)}


def _one_window(config: ModelConfig) -> list[str]:
    several = len(sizes_of_windows(config)) > 1
    return one_bias(config) + (["windows of several sizes, there of one"] if several else [])


def _read_granite(keys: Keys) -> dict[str, Any]:
    fields = read_sizes(keys) | read_bias(keys)
    divisor = keys.get("logits_scaling", 1.0)
    fields |= {
        "activation": read_gate(keys),
        "mlp_bias": keys.get("mlp_bias", False),
        "embedding_scale": keys.get("embedding_multiplier", 1.0),
        "residual_scale": keys.get("residual_multiplier", 1.0),
        "attention_scale": keys.get("attention_multiplier", 1.0),
        "logit_scale": 1.0 / divisor if isinstance(divisor, (int, float)) and divisor else divisor,
    }
    return fields | read_rope(keys, fields["max_seq_len"])


def _write_granite(config: ModelConfig, nested: bool) -> dict[str, Any]:
    divisor = 1.0 / config.logit_scale
    exact = round(divisor)
    return {
        **write_sizes(config),
        **_biases(config),
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.attention_scale or config.head_width**-0.5,
        "logits_scaling": float(exact) if exact and 1.0 / exact == config.logit_scale else divisor,
        **write_rope(config, nested),
    }


def _read_phi3(keys: Keys) -> dict[str, Any]:
    fields = read_sizes(keys, eps_default=1e-5)
    keys.expect("attention_bias", False)
    keys.tell("original_max_position_embeddings", f"{KEPT}: rope is not scaled")
    fields |= {"activation": read_gate(keys), "sliding_window": keys.get("sliding_window")}
    fields |= read_rope(keys, fields["max_seq_len"], default_share=1.0)
    if (kind := fields["rope_scaling"]["kind"]) != "none":
        raise unsupported("rope_type", kind, "default")  # the class knows longrope beside it
    return fields


def _write_phi3(config: ModelConfig, nested: bool) -> dict[str, Any]:
    rest = {"sliding_window": config.sliding_window, "hidden_act": write_gate(config)}
    return {**write_sizes(config), **rest, **_share(config, nested)}


def _share(config: ModelConfig, nested: bool) -> dict[str, Any]:
    rope, share = write_rope(config, nested), {"partial_rotary_factor": config.rope_share}
    return {"rope_parameters": {**rope["rope_parameters"], **share}} if nested else {**rope, **share}


def _no_scaling(config: ModelConfig) -> list[str]:
    return [] if config.rope_scaling.kind == "none" else [f"rope_scaling.kind={config.rope_scaling.kind}, there none"]


def _read_glm4(keys: Keys) -> dict[str, Any]:
    fields = read_sizes(keys, eps_default=1.5625e-07, head_dim=128)
    fields |= {"activation": read_gate(keys), "attention_bias": keys.get("attention_bias", True)}
    return fields | read_rope(keys, fields["max_seq_len"], default_share=0.5)


def _write_glm4(config: ModelConfig, nested: bool) -> dict[str, Any]:
    rest = {"attention_bias": config.attention_bias, "hidden_act": write_gate(config)}
    return {**write_sizes(config), **rest, **_share(config, nested)}


SMOLLM3 = Dense(
    transformers="SmolLM3ForCausalLM",
    weights=LLAMA,
    fixed={},
    free=_BIASES | {"rope_layers", "windows", "sliding_window"},
    read=_read_smollm3,
    write=_write_smollm3,
    differences=_one_window,
)
GRANITE = Dense(
    transformers="GraniteForCausalLM",
    weights=LLAMA,
    fixed={},
    free=_BIASES | {"embedding_scale", "residual_scale", "attention_scale", "logit_scale"},
    read=_read_granite,
    write=_write_granite,
    differences=one_bias,
)
PHI3 = Dense(
    transformers="Phi3ForCausalLM",
    weights=LLAMA | _QKV | GATE_UP,
    fixed={},
    free=frozenset({"activation", "sliding_window", "rope_share"}),
    read=_read_phi3,
    write=_write_phi3,
    differences=_no_scaling,
)
GLM4 = Dense(
    transformers="Glm4ForCausalLM",
    weights=LLAMA
    | GATE_UP
    | {
        "layers.{i}.attn_post_norm": HFSource("model.layers.{i}.post_self_attn_layernorm"),
        "layers.{i}.mlp_post_norm": HFSource("model.layers.{i}.post_mlp_layernorm"),
    },
    fixed={"norm_placement": "both", "rope_layout": "interleaved"},
    free=frozenset({"activation", "attention_bias", "rope_share"}),
    read=_read_glm4,
    write=_write_glm4,
)
