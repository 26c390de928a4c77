"""Cohere's Command R and Command R7B: parallel branches behind one norm. Source: transformers 5.23."""

from __future__ import annotations

from typing import Any

from orchestrator.config.schema import ModelConfig
from orchestrator.interop.hf_family import LLAMA, Dense, one_bias, read_bias, read_gate, read_sizes, write_gate
from orchestrator.interop.hf_family import write_sizes as sizes
from orchestrator.interop.hf_keys import KEPT, Keys
from orchestrator.interop.hf_layers import every, read_kinds, several_windows, windows_of, write_kinds
from orchestrator.interop.hf_rope import read_rope, write_rope

_WEIGHTS = {ours: theirs for ours, theirs in LLAMA.items() if ours != "layers.{i}.mlp_norm"}
_FIXED = {"norm": "layer_no_bias", "residual": "parallel_one_norm", "rope_layout": "interleaved"}
_FREE = frozenset({"activation", "attention_bias", "output_bias", "logit_scale"})
# Of published configurations, which the classes do not read; with the only values that say what they compute.
_SAID = {
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": False,
    "use_embedding_sharing": True,
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
}


def _read(keys: Keys, theta: float) -> dict[str, Any]:
    fields = read_sizes(keys, eps="layer_norm_eps", eps_default=1e-5, tied=True) | read_bias(keys)
    for key, value in _SAID.items():
        keys.expect(key, value)
    keys.tell("cache_implementation", f"{KEPT}: it is of generation")
    fields |= {"activation": read_gate(keys), "logit_scale": keys.get("logit_scale", 0.0625)}
    return fields | read_rope(keys, fields["max_seq_len"], theta)


def _read_2(keys: Keys) -> dict[str, Any]:
    fields = _read(keys, 1e4)
    usual = every(keys.get("sliding_window_pattern", 4), "sliding_window_pattern")
    for key in ("order_of_interleaved_layers", "layer_switch"):
        keys.tell(key, f"{KEPT}: the class does not read it")
    fields |= windows_of(read_kinds(keys, fields["layers"], usual), keys.get("sliding_window", 4096))
    # Layers without a window have no rotary positions.
    turned = tuple(window is not None for window in fields["windows"] or (fields["sliding_window"],))
    return fields | {"rope_layers": () if turned == (True,) else turned}


def _write(config: ModelConfig, nested: bool) -> dict[str, Any]:
    return {
        **sizes(config, eps="layer_norm_eps"),
        "hidden_act": write_gate(config),
        "attention_bias": config.attention_bias,
        "logit_scale": config.logit_scale,
        **write_rope(config, nested),
    }


def _differences_2(config: ModelConfig) -> list[str]:
    found = one_bias(config)
    layers = range(config.layers)
    if any((config.window_of(layer) is None) != (config.rope_of(layer) is None) for layer in layers):
        found.append("layers with a window have rotary positions there, and no others")
    found += several_windows(config)
    if config.head_width * config.heads != config.dim:
        found.append(f"head_dim={config.head_dim}, there dim / heads")
    return found


COHERE = Dense(
    transformers="CohereForCausalLM",
    weights=_WEIGHTS,
    fixed=_FIXED,
    free=_FREE,
    read=lambda keys: _read(keys, 5e5),
    write=_write,
    differences=one_bias,
)
COHERE2 = Dense(
    transformers="Cohere2ForCausalLM",
    weights=_WEIGHTS,
    fixed=_FIXED,
    free=_FREE | {"windows", "sliding_window", "rope_layers"},
    read=_read_2,
    write=lambda config, nested: {**_write(config, nested), **write_kinds(config)},
    differences=_differences_2,
)
