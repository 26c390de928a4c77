"""Writing the `config.json` of a model: anew, or as it came with the model that was imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.config.schema import MLAConfig, ModelConfig, MoEConfig, RopeScalingConfig
from orchestrator.interop import hf_moe, hf_rope
from orchestrator.interop.hf_config import CLASSES, from_hf_config
from orchestrator.interop.hf_dense import FAMILIES
from orchestrator.interop.hf_keys import KEPT, LEFT_OUT
from orchestrator.interop.hf_layers import SLIDING, layerwise, write_kinds
from orchestrator.interop.hf_weights import Family
from orchestrator.models.layers import resolved_head_dim

_PATTERNS = ("windows", "sliding_window", "rope_layers", "rope_local_theta")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_hf_config(
    config: ModelConfig,
    family: Family,
    eos_token_id: int | None,
    dtype: str,
    original: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of `config.json`.

    Without `original` it has the form that transformers 4 and 5 read: `rope_theta` and `rope_scaling` beside each
    other, and `torch_dtype`. With `original` it has that one's: where it still describes the model, all of it stays as
    it was but the dtype and the class; where not, what was not understood as part of the model stays.

    Args:
        config: with `vocab_size` a number.
        family: whose class of transformers computes the model.
        eos_token_id: of the tokenizer that travels along; put before those of `original` where it is none of them.
        dtype: of the weights, as torch names it.
        original: the `config.json` that the model was imported with.
    """
    ids = token_ids(original, eos_token_id)
    if original is None:
        return {**_written(config, family, nested=False), **ids, "torch_dtype": dtype}
    kept = {key: value for key, value in original.items() if key not in LEFT_OUT}
    described = from_hf_config(original, frozenset(original))
    if not (described.family == family and _agree(described.fields, config)):
        nested = "rope_parameters" in original and not original.get("rope_scaling")
        others = {key: value for key, value in kept.items() if described.fates[key].startswith(KEPT)}
        if config.dropout:
            others.pop("attention_dropout", None)
        kept = {**_written(config, family, nested), **others}
    names = [name for name in ("dtype", "torch_dtype") if name in kept] or ["torch_dtype"]
    return {**kept, "architectures": [CLASSES[family]], **ids, **dict.fromkeys(names, dtype)}


def token_ids(original: Mapping[str, Any] | None, eos_token_id: int | None) -> dict[str, Any]:
    """Return which tokens begin, end and pad a text: the imported model's, and the one that ended its documents here.

    Args:
        original: the `config.json` that the model was imported with.
        eos_token_id: of the tokenizer that travels along.
    """
    if original is None:
        # Null, where classes have a token of their own published vocabularies otherwise.
        return {"bos_token_id": None, "eos_token_id": eos_token_id, "pad_token_id": None}
    ids = {key: original[key] for key in _IDS if key in original}
    given = ids.get("eos_token_id")
    known = given if isinstance(given, list) else [] if given is None else [given]
    if eos_token_id is not None and eos_token_id not in known:
        ids["eos_token_id"] = [eos_token_id, *known] if known else eos_token_id
    return ids


def _agree(fields: Mapping[str, Any], config: ModelConfig) -> bool:
    """Whether a `config.json` with these fields describes the model."""
    spelled = replace(config, **{key: value for key, value in fields.items() if key in _PATTERNS})
    described, meant = layerwise(spelled), layerwise(config)
    for key, value in fields.items():
        ours = getattr(config, key)
        if key in _PATTERNS:
            value, ours = described[key], meant[key]
        if key == "head_dim":
            value, ours = (resolved_head_dim(config) if size == "auto" else size for size in (value, ours))
        if key == "moe":
            value, ours = (hf_moe.computed(replace(config, moe=moe)) for moe in (MoEConfig(**value), ours))
        if key == "mla":
            value = MLAConfig(**value)
        if key == "rope_scaling":
            value = RopeScalingConfig(**value)
        if value != ours:
            return False
    return True


def _written(config: ModelConfig, family: Family, nested: bool) -> dict[str, Any]:
    shared = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        "use_cache": True,
    }
    if family in FAMILIES:
        return {**shared, **FAMILIES[family].write(config, nested)}
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
        **hf_rope.write_rope(config, nested),
    }
    if family in hf_moe.FIXED:
        result |= hf_moe.write_experts(config, family)
    if family in ("llama", "qwen3", "qwen3_moe"):
        result["attention_bias"] = config.attention_bias
    if family == "llama":
        return result | {"mlp_bias": config.mlp_bias}
    kinds = write_kinds(config)
    result["sliding_window"] = kinds["sliding_window"]
    if family in ("qwen2", "qwen3", "qwen3_moe"):
        windowed = [layer for layer, kind in enumerate(kinds["layer_types"]) if kind == SLIDING]
        result |= {"use_sliding_window": bool(windowed), "max_window_layers": min(windowed, default=0)}
    if config.windows:
        result["layer_types"] = kinds["layer_types"]
    return result
