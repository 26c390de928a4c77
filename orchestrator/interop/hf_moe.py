"""Mixtures of experts in a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.config.schema import ModelConfig, MoEConfig
from orchestrator.interop.hf_keys import KEPT, Keys, unsupported

# What is the same in every model of a family, and of what transformers has one form alone.
_PLAIN = {
    "score": "softmax",
    "scale": 1.0,
    "groups": 1,
    "top_groups": 1,
    "shared_mlp_dim": 0,
    "shared_gate": False,
    "router_bias": False,
    "expert_bias": False,
    "balance_bias": False,
}
FIXED: dict[str, dict[str, Any]] = {
    "mixtral": {**_PLAIN, "normalize": True, "dense_layers": 0},
    "qwen3_moe": _PLAIN,
    "olmoe": {**_PLAIN, "dense_layers": 0},
    "deepseek_v3": {
        "score": "sigmoid",
        "shared_gate": False,
        "router_bias": False,
        "expert_bias": False,
        "balance_bias": True,
    },
    "gpt_oss": {**_PLAIN, "score": "softmax_chosen", "router_bias": True, "expert_bias": True, "dense_layers": 0},
}
# Families whose experts are as wide as `intermediate_size` says.
_ONE_WIDTH = ("mixtral", "olmoe", "gpt_oss")
# Their key -> ours in `model.moe`, where the value is the same; for the report.
SAME = {
    "num_local_experts": "experts",
    "num_experts": "experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "mlp_dim",
    "norm_topk_prob": "normalize",
    "n_routed_experts": "experts",
    "routed_scaling_factor": "scale",
    "n_group": "groups",
    "topk_group": "top_groups",
    "first_k_dense_replace": "dense_layers",
}
_OF_TRAINING: dict[str, Any] = {"capacity_factor": None, "balance_loss": 0.0, "z_loss": 0.0, "balance_bias_rate": 0.001}


def computed(model: ModelConfig) -> MoEConfig:
    """Return what decides what a mixture computes: without what belongs to training, and with widths filled in.

    Args:
        model: the model.
    """
    if not model.moe.experts:
        return MoEConfig()
    normalize = model.moe.normalize or model.moe.score == "softmax_chosen"  # whose weights always add up to one
    return replace(model.moe, mlp_dim=model.moe.width(model), normalize=normalize, **_OF_TRAINING)


def differences(config: ModelConfig, family: str) -> list[str]:
    """List what of a model's experts the family's class does not compute.

    Args:
        config: of the model.
        family: the Hugging Face family.
    """
    moe = config.moe
    if family not in FIXED:
        return [f"moe.experts={moe.experts}, there none"] if moe.experts else []
    if not moe.experts:
        return ["moe.experts=0, there some"]
    found = [
        f"moe.{key}={getattr(moe, key)}, there {value}"
        for key, value in FIXED[family].items()
        if getattr(moe, key) != value
    ]
    if family in _ONE_WIDTH and moe.width(config) != config.mlp_dim:
        found.append(f"moe.mlp_dim={moe.mlp_dim}, there mlp_dim")
    return found


def read_experts(keys: Keys, family: str) -> dict[str, Any]:
    """Read the fields of a `MoEConfig`; values are not checked yet.

    Args:
        keys: of the `config.json`.
        family: the Hugging Face family.

    Raises:
        CheckpointError: a mixture that cannot be computed here.
    """
    _tell_of_training(keys)
    fields = {
        **FIXED[family],
        "experts": _either(keys, "num_local_experts", "num_experts", "n_routed_experts"),
        "top_k": keys.need("num_experts_per_tok"),
    }
    if family in ("qwen3_moe", "olmoe"):
        fields["normalize"] = keys.get("norm_topk_prob", False)
    if family == "qwen3_moe":
        fields |= {"mlp_dim": keys.need("moe_intermediate_size"), "dense_layers": _first_dense(keys)}
    if family == "deepseek_v3":
        fields |= _read_deepseek(keys)
    return fields


def _read_deepseek(keys: Keys) -> dict[str, Any]:
    width, shared = keys.need("moe_intermediate_size"), keys.need("n_shared_experts")
    if not (isinstance(shared, int) and isinstance(width, int) and shared > 0):
        raise unsupported("n_shared_experts", shared, "1 or more")
    return {
        "mlp_dim": width,
        "shared_mlp_dim": shared * width,
        "normalize": keys.get("norm_topk_prob", True),
        "scale": keys.get("routed_scaling_factor", 2.5),
        "groups": keys.get("n_group", 8),
        "top_groups": keys.get("topk_group", 4),
        "dense_layers": keys.get("first_k_dense_replace", 3),
    }


def _tell_of_training(keys: Keys) -> None:
    for key in ("router_aux_loss_coef", "aux_loss_alpha", "seq_aux"):
        keys.tell(key, f"{KEPT}; in training, model.moe.balance_loss is the own key")
    for key in ("output_router_logits", "ep_size"):
        keys.tell(key, KEPT)
    keys.tell("router_jitter_noise", f"{KEPT}; training here does not apply it")
    if keys.get("router_jitter_noise"):
        keys.notes.append(f"router_jitter_noise={keys.get('router_jitter_noise')} is not applied in training here")


def _either(keys: Keys, *names: str) -> Any:
    """Return the value of a key that has several names in configurations of transformers."""
    given = {name: keys.get(name) for name in names if keys.get(name) is not None}
    if not given:
        return keys.need(names[0])
    if len(set(map(str, given.values()))) > 1:
        raise unsupported(names[1], given[names[1]], f"the same as {names[0]}={given[names[0]]}")
    return next(iter(given.values()))


def _first_dense(keys: Keys) -> int:
    """Return how many layers are dense. Others than the first ones are refused."""
    keys.expect("decoder_sparse_step", 1)
    dense = keys.get("mlp_only_layers") or []
    if not isinstance(dense, list) or sorted(dense, key=str) != sorted(range(len(dense)), key=str):
        raise unsupported("mlp_only_layers", dense, "the first layers: [], [0], [0, 1], ...")
    return len(dense)


def write_experts(config: ModelConfig, family: str) -> Mapping[str, Any]:
    """Return the keys of a `config.json` that describe the experts.

    Args:
        config: of the model.
        family: the Hugging Face family.
    """
    moe = config.moe
    count = {"qwen3_moe": "num_experts", "olmoe": "num_experts", "deepseek_v3": "n_routed_experts"}.get(
        family, "num_local_experts"
    )
    result: dict[str, Any] = {count: moe.experts, "num_experts_per_tok": moe.top_k, "output_router_logits": False}
    if family in ("qwen3_moe", "olmoe"):
        result["norm_topk_prob"] = moe.normalize
    if family == "qwen3_moe":
        result |= {
            "moe_intermediate_size": moe.width(config),
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(moe.dense_layers)),
        }
    if family == "deepseek_v3":
        result |= {
            "moe_intermediate_size": moe.width(config),
            "n_shared_experts": moe.shared_mlp_dim // moe.width(config),
            "norm_topk_prob": moe.normalize,
            "routed_scaling_factor": moe.scale,
            "n_group": moe.groups,
            "topk_group": moe.top_groups,
            "first_k_dense_replace": moe.dense_layers,
        }
    return result
