"""OLMoE, DeepSeek-V3 and gpt-oss in transformers. Source: transformers 5.23."""

from __future__ import annotations

from typing import Any

from orchestrator.config.schema import ModelConfig
from orchestrator.interop.hf_family import (
    LLAMA,
    QK_NORM,
    Dense,
    expect_whole_heads,
    one_bias,
    read_bias,
    read_sizes,
    whole_heads,
    write_sizes,
)
from orchestrator.interop.hf_keys import KEPT, Keys, unsupported
from orchestrator.interop.hf_layers import FULL, SLIDING, read_kinds, several_windows, windows_of, write_kinds
from orchestrator.interop.hf_moe import read_experts, write_experts
from orchestrator.interop.hf_rope import read_rope, write_rope
from orchestrator.interop.hf_tensor import HFSource

_BIASES = frozenset({"attention_bias", "output_bias"})
_GATE = {"layers.{i}.mlp.router": HFSource("model.layers.{i}.mlp.gate")}
_SELF = "model.layers.{i}.self_attn"
_LATENT = {
    "layers.{i}.attn.q_down": HFSource(f"{_SELF}.q_a_proj"),
    "layers.{i}.attn.q_latent_norm": HFSource(f"{_SELF}.q_a_layernorm"),
    "layers.{i}.attn.q_up": HFSource(f"{_SELF}.q_b_proj"),
    "layers.{i}.attn.kv_down": HFSource(f"{_SELF}.kv_a_proj_with_mqa"),
    "layers.{i}.attn.kv_latent_norm": HFSource(f"{_SELF}.kv_a_layernorm"),
    "layers.{i}.attn.kv_up": HFSource(f"{_SELF}.kv_b_proj"),
}
_SHARED = {
    f"layers.{{i}}.mlp.shared.{ours}": HFSource(f"model.layers.{{i}}.mlp.shared_experts.{ours}_proj")
    for ours in ("gate", "up", "down")
}
# Theirs -> ours, of latent attention.
_WIDTHS = {
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_nope_head_dim": "nope_head_dim",
    "qk_rope_head_dim": "rope_head_dim",
    "v_head_dim": "v_head_dim",
}
_GPT_OSS_ROPE = {"kind": "yarn", "factor": 32.0, "original_max_seq_len": 4096, "truncate": False}
_GPT_OSS_THETA = 150000.0


def _written(config: ModelConfig, nested: bool) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": config.attention_bias, **write_rope(config, nested)}


def _read_olmoe(keys: Keys) -> dict[str, Any]:
    keys.expect("hidden_act", "silu", "swish")
    for key in ("clip_qkv", "sliding_window"):
        if keys.get(key) is not None:
            raise unsupported(key, keys.get(key), "none")
    expect_whole_heads(keys)
    fields = read_sizes(keys, eps_default=1e-5) | read_bias(keys) | {"moe": read_experts(keys, "olmoe")}
    return fields | read_rope(keys, fields["max_seq_len"])


OLMOE = Dense(
    transformers="OlmoeForCausalLM",
    weights=LLAMA | QK_NORM | _GATE,
    fixed={"qk_norm": True, "qk_norm_over": "width"},
    free=_BIASES,
    read=_read_olmoe,
    write=lambda config, nested: {
        **write_sizes(config, head_dim=False),
        **_written(config, nested),
        **write_experts(config, "olmoe"),
    },
    differences=lambda config: one_bias(config) + whole_heads(config),
)


def _read_deepseek(keys: Keys) -> dict[str, Any]:
    keys.expect("hidden_act", "silu", "swish")
    keys.expect("scoring_func", "sigmoid")
    keys.expect("topk_method", "noaux_tc")
    keys.expect("moe_layer_freq", 1)
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        keys.tell(key, f"{KEPT}; layers that predict further tokens are left out")
    mla = {ours: keys.need(theirs) for theirs, ours in _WIDTHS.items() if theirs != "q_lora_rank"}
    mla["q_lora_rank"] = keys.get("q_lora_rank", 1536)
    # What follows from these, and may be written beside them.
    keys.expect("head_dim", mla["rope_head_dim"], None)
    if isinstance(mla["nope_head_dim"], int) and isinstance(mla["rope_head_dim"], int):
        keys.expect("qk_head_dim", mla["nope_head_dim"] + mla["rope_head_dim"], None)
    fields = read_sizes(keys) | read_bias(keys)
    if fields["kv_heads"] != fields["heads"]:
        raise unsupported("num_key_value_heads", fields["kv_heads"], f"as many as heads: {fields['heads']}")
    return {
        **fields,
        "head_dim": "auto",
        "mla": mla,
        "moe": read_experts(keys, "deepseek_v3"),
        "rope_layout": "interleaved" if keys.get("rope_interleave", True) else "half",
        **read_rope(keys, fields["max_seq_len"], latent=True),
    }


def _write_deepseek(config: ModelConfig, nested: bool) -> dict[str, Any]:
    return {
        **write_sizes(config, head_dim=False),
        **_written(config, nested),
        **{theirs: getattr(config.mla, ours) for theirs, ours in _WIDTHS.items()},
        "rope_interleave": config.rope_layout == "interleaved",
        "num_nextn_predict_layers": 0,
        **write_experts(config, "deepseek_v3"),
    }


def _differences_deepseek(config: ModelConfig) -> list[str]:
    moe, found = config.moe, one_bias(config)
    if not config.mla.kv_lora_rank:
        found.append("mla.kv_lora_rank=0, there more")
    if moe.experts and (moe.shared_mlp_dim < 1 or moe.shared_mlp_dim % moe.width(config)):
        found.append(f"moe.shared_mlp_dim={moe.shared_mlp_dim}, there a multiple of the width of an expert")
    if moe.experts < 2 * moe.groups:
        found.append(f"moe.groups={moe.groups} of an expert each, there two or more")
    return found


DEEPSEEK_V3 = Dense(
    transformers="DeepseekV3ForCausalLM",
    weights=LLAMA | _LATENT | _GATE | _SHARED,
    fixed={},
    free=_BIASES | {"mla", "rope_layout"},
    read=_read_deepseek,
    write=_write_deepseek,
    differences=_differences_deepseek,
)


def _read_gpt_oss(keys: Keys) -> dict[str, Any]:
    keys.expect("hidden_act", "silu", "swish")
    keys.expect("swiglu_alpha", 1.702)
    keys.expect("swiglu_limit", 7.0, 7)
    keys.expect("experts_per_token", keys.get("num_experts_per_tok"))
    keys.tell("initial_context_length", f"{KEPT}: the class does not read it")
    fields = read_sizes(keys, eps_default=1e-5, head_dim=64) | read_bias(keys, default=True)
    kinds = read_kinds(keys, fields["layers"], lambda layer: FULL if layer % 2 else SLIDING)
    fields |= windows_of(kinds, keys.get("sliding_window", 128)) | {"moe": read_experts(keys, "gpt_oss")}
    if not keys.get("rope_scaling") and not keys.get("rope_parameters"):
        return fields | {"rope_theta": keys.get("rope_theta", _GPT_OSS_THETA), "rope_scaling": _GPT_OSS_ROPE}
    return fields | read_rope(keys, fields["max_seq_len"], _GPT_OSS_THETA)


def _differences_gpt_oss(config: ModelConfig) -> list[str]:
    found = one_bias(config)
    found += several_windows(config)
    return found


GPT_OSS = Dense(
    transformers="GptOssForCausalLM",
    weights={
        **LLAMA,
        "layers.{i}.attn": HFSource(_SELF),
        "layers.{i}.mlp.router": HFSource("model.layers.{i}.mlp.router"),
    },
    fixed={"activation": "swiglu_clamped", "attention_sinks": True},
    free=_BIASES | {"windows", "sliding_window"},
    read=_read_gpt_oss,
    write=lambda config, nested: {
        **write_sizes(config),
        **_written(config, nested),
        **write_kinds(config),
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        **write_experts(config, "gpt_oss"),
    },
    differences=_differences_gpt_oss,
)
