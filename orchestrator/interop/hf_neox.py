"""GPT-NeoX (Pythia), StableLM and StarCoder2: layer norms with biases. Source: transformers 5.23."""

from __future__ import annotations

from typing import Any

from orchestrator.config.schema import ModelConfig
from orchestrator.interop.hf_family import (
    LLAMA,
    Dense,
    expect_whole_heads,
    read_gate,
    read_sizes,
    whole_heads,
    write_gate,
    write_sizes,
)
from orchestrator.interop.hf_keys import KEPT, Keys, unsupported
from orchestrator.interop.hf_rope import DEFAULT_THETA, read_rope, write_rope
from orchestrator.interop.hf_tensor import HFSource

# Activations without a gate, in their words -> ours.
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "relu2": "relu2",
}
_LAYER = "gpt_neox.layers.{i}"
_NEOX = {
    "embed": HFSource("gpt_neox.embed_in"),
    "norm": HFSource("gpt_neox.final_layer_norm"),
    "head": HFSource("embed_out"),
    "layers.{i}.attn_norm": HFSource(f"{_LAYER}.input_layernorm"),
    **{f"layers.{{i}}.attn.{part}": HFSource(f"{_LAYER}.attention.query_key_value", by_head=True) for part in "qkv"},
    "layers.{i}.attn.o": HFSource(f"{_LAYER}.attention.dense"),
    "layers.{i}.mlp_norm": HFSource(f"{_LAYER}.post_attention_layernorm"),
    "layers.{i}.mlp.up": HFSource(f"{_LAYER}.mlp.dense_h_to_4h"),
    "layers.{i}.mlp.down": HFSource(f"{_LAYER}.mlp.dense_4h_to_h"),
}


def _read_act(keys: Keys, default: str) -> str:
    given = keys.get("hidden_act", default)
    if not isinstance(given, str) or given not in _ACTIVATIONS:
        raise unsupported("hidden_act", given, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[given]


def _write_act(config: ModelConfig) -> str:
    return next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation)


def _read_neox(keys: Keys) -> dict[str, Any]:
    expect_whole_heads(keys)
    fields = read_sizes(keys, eps="layer_norm_eps", eps_default=1e-5)
    if fields["kv_heads"] != fields["heads"]:
        raise unsupported("num_key_value_heads", fields["kv_heads"], "none, or as many as heads")
    bias = keys.get("attention_bias", True)
    fields |= {
        "activation": _read_act(keys, "gelu"),
        "attention_bias": bias,
        "output_bias": bias,
        "residual": "parallel" if keys.get("use_parallel_residual", True) else "sequential",
    }
    theta, share = keys.get("rotary_emb_base", DEFAULT_THETA), keys.get("rotary_pct", 0.25)
    return fields | read_rope(keys, fields["max_seq_len"], theta, share)


def _write_neox(config: ModelConfig, nested: bool) -> dict[str, Any]:
    written = {
        **write_sizes(config, eps="layer_norm_eps", head_dim=False),
        "hidden_act": _write_act(config),
        "attention_bias": config.attention_bias,
        "use_parallel_residual": config.residual == "parallel",
    }
    del written["num_key_value_heads"]
    rope = write_rope(config, nested)
    if nested:
        return {**written, "rope_parameters": {**rope["rope_parameters"], "partial_rotary_factor": config.rope_share}}
    theta = {"rotary_emb_base": config.rope_theta, "rotary_pct": config.rope_share}
    return {**written, **theta, "rope_scaling": rope["rope_scaling"]}


def _differences_neox(config: ModelConfig) -> list[str]:
    found = whole_heads(config)
    if config.kv_heads != config.heads:
        found.append(f"kv_heads={config.kv_heads}, there as many as heads")
    if config.attention_bias != config.output_bias:
        found.append("attention_bias and output_bias are one switch there")
    if config.residual not in ("sequential", "parallel"):
        found.append(f"residual={config.residual}, there sequential or parallel")
    if config.activation not in _ACTIVATIONS.values():
        found.append(f"activation={config.activation}, there one without a gate")
    return found


def _read_stablelm(keys: Keys) -> dict[str, Any]:
    expect_whole_heads(keys)
    keys.expect("qk_layernorm", False)
    keys.tell("rotary_scaling_factor", f"{KEPT}: the class does not read it")
    fields = read_sizes(keys, eps="layer_norm_eps", eps_default=1e-5)
    fields |= {
        "activation": read_gate(keys),
        "attention_bias": keys.get("use_qkv_bias", False),
        "residual": "parallel_one_norm" if keys.get("use_parallel_residual", False) else "sequential",
    }
    return fields | read_rope(keys, fields["max_seq_len"], default_share=0.25)


def _write_stablelm(config: ModelConfig, nested: bool) -> dict[str, Any]:
    rope, share = write_rope(config, nested), {"partial_rotary_factor": config.rope_share}
    return {
        **write_sizes(config, eps="layer_norm_eps", head_dim=False),
        "hidden_act": write_gate(config),
        "use_qkv_bias": config.attention_bias,
        "use_parallel_residual": config.residual == "parallel_one_norm",
        **({"rope_parameters": {**rope["rope_parameters"], **share}} if nested else {**rope, **share}),
    }


def _differences_stablelm(config: ModelConfig) -> list[str]:
    found = whole_heads(config)
    if config.residual == "parallel":
        found.append("residual=parallel, there sequential or parallel_one_norm")
    return found


def _read_starcoder2(keys: Keys) -> dict[str, Any]:
    fields = read_sizes(keys, eps="norm_epsilon", eps_default=1e-5, tied=True)
    bias = keys.get("use_bias", True)
    for key in ("layer_norm_eps", "activation_function"):
        keys.tell(key, f"{KEPT}: the class does not read it")
    fields |= {"activation": _read_act(keys, "gelu_pytorch_tanh"), "sliding_window": keys.get("sliding_window")}
    fields |= dict.fromkeys(("attention_bias", "output_bias", "mlp_bias"), bias)
    return fields | read_rope(keys, fields["max_seq_len"])


def _write_starcoder2(config: ModelConfig, nested: bool) -> dict[str, Any]:
    return {
        **write_sizes(config, eps="norm_epsilon"),
        "hidden_act": _write_act(config),
        "use_bias": config.mlp_bias,
        "sliding_window": config.sliding_window,
        **write_rope(config, nested),
    }


def _differences_starcoder2(config: ModelConfig) -> list[str]:
    found = []
    if len({config.attention_bias, config.output_bias, config.mlp_bias}) > 1:
        found.append("attention_bias, output_bias and mlp_bias are one switch there")
    if config.activation not in _ACTIVATIONS.values():
        found.append(f"activation={config.activation}, there one without a gate")
    return found


GPT_NEOX = Dense(
    transformers="GPTNeoXForCausalLM",
    weights=_NEOX,
    fixed={"norm": "layer", "mlp_bias": True},
    free=frozenset({"activation", "attention_bias", "output_bias", "residual", "rope_share"}),
    read=_read_neox,
    write=_write_neox,
    differences=_differences_neox,
    inner="gpt_neox.",
)
STABLELM = Dense(
    transformers="StableLmForCausalLM",
    weights=LLAMA,
    fixed={"norm": "layer"},
    free=frozenset({"activation", "attention_bias", "residual", "rope_share"}),
    read=_read_stablelm,
    write=_write_stablelm,
    differences=_differences_stablelm,
)
STARCODER2 = Dense(
    transformers="Starcoder2ForCausalLM",
    weights=LLAMA
    | {
        "layers.{i}.mlp.up": HFSource("model.layers.{i}.mlp.c_fc"),
        "layers.{i}.mlp.down": HFSource("model.layers.{i}.mlp.c_proj"),
    },
    fixed={"norm": "layer"},
    free=frozenset({"activation", "attention_bias", "output_bias", "mlp_bias", "sliding_window"}),
    read=_read_starcoder2,
    write=_write_starcoder2,
    differences=_differences_starcoder2,
)
