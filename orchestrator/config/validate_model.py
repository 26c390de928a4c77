"""Validate the description of a model: keys that must fit each other."""

from __future__ import annotations

from orchestrator.config.schema import ModelConfig, MoEConfig
from orchestrator.errors import ConfigError


def check_model(model: ModelConfig) -> list[ConfigError]:
    """List what of a model's description does not fit together.

    Args:
        model: whose values are in range, each by itself.
    """
    if model._target_ is not None:
        return []  # what an own model makes of its description, it knows itself
    sizes = (model.dim, model.heads, model.kv_heads, 1 if model.head_dim == "auto" else model.head_dim)
    if min(sizes) < 1:
        return []  # said by check_ranges
    problems = []
    if model.head_dim == "auto" and model.dim % model.heads:
        what = "model.dim does not divide by model.heads"
        problems.append(
            ConfigError(what, got=f"{model.dim} / {model.heads}", fix="change one of them, or set model.head_dim")
        )
    if model.heads % model.kv_heads:
        what = "model.heads does not divide by model.kv_heads"
        allowed = f"a divisor of {model.heads} as model.kv_heads"
        problems.append(
            ConfigError(what, got=f"{model.heads} / {model.kv_heads}", allowed=allowed, fix="change one of them")
        )
    head_dim = model.dim // model.heads if model.head_dim == "auto" else model.head_dim
    if model.positions == "rope" and head_dim % 2:
        problems.append(
            ConfigError(
                "RoPE turns pairs of elements: a head's width is even",
                got=f"head_dim {head_dim}",
                fix="change model.head_dim",
            )
        )
    return problems + _rope_scaling(model) + _experts(model.moe)


def _experts(moe: MoEConfig) -> list[ConfigError]:
    """See that the choice is among experts that there are, and in groups of one size."""
    if not moe.experts or min(moe.top_k, moe.groups, moe.top_groups) < 1:
        return []  # said by check_ranges
    pairs = (
        (moe.top_k <= moe.experts, f"top_k={moe.top_k} of experts={moe.experts}"),
        (moe.experts % moe.groups == 0, f"experts={moe.experts} in groups={moe.groups}"),
        (moe.top_groups <= moe.groups, f"top_groups={moe.top_groups} of groups={moe.groups}"),
        (
            moe.top_k * moe.groups <= moe.experts * moe.top_groups,
            f"top_k={moe.top_k} from {moe.top_groups} groups of {moe.experts // moe.groups} experts",
        ),
    )
    return [
        ConfigError("model.moe: a token cannot choose so", got=got, fix="change one of them")
        for fits, got in pairs
        if not fits
    ]


def _rope_scaling(model: ModelConfig) -> list[ConfigError]:
    """Where a scaling divides by a difference or a logarithm, that is none of 0."""
    scaling = model.rope_scaling
    if model.positions != "rope":
        return []
    pairs = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_slow", "beta_fast"),
    }
    problems = []
    if scaling.kind in pairs:
        low, high = pairs[scaling.kind]
        if not getattr(scaling, low) < getattr(scaling, high):
            problems.append(
                ConfigError(
                    f"model.rope_scaling of kind {scaling.kind}: {low} is less than {high}",
                    got=f"{low}={getattr(scaling, low)}, {high}={getattr(scaling, high)}",
                    fix="change one of them",
                )
            )
    if scaling.kind == "yarn" and model.rope_theta <= 1:
        problems.append(out_of_range("model.rope_theta", model.rope_theta, "more than 1, for a scaling of kind yarn"))
    return problems


def out_of_range(key: str, value: object, allowed: str) -> ConfigError:
    """Return the error of a value that is out of range.

    Args:
        key: dotted.
        value: that was given.
        allowed: what may be given.
    """
    return ConfigError(f"'{key}' is out of range", got=value, allowed=allowed, fix=f"set {key}=...")
