"""Validate the description of a model: keys that must fit each other."""

from __future__ import annotations

from orchestrator.config.schema import GATED, ModelConfig
from orchestrator.errors import ConfigError

_LARGE = 1e38  # what is beyond is said by check_ranges


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
    latent = model.mla.kv_lora_rank > 0
    if model.head_dim == "auto" and model.dim % model.heads and not latent:
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
    return problems + _layers(model) + _rope(model) + _rope_scaling(model) + _experts(model) + _latent(model)


def _latent(model: ModelConfig) -> list[ConfigError]:
    """See that latent attention is not asked for what it has not."""
    if model.mla.kv_lora_rank < 1:
        return []
    wrong = {
        "kv_heads": model.kv_heads != model.heads,
        "head_dim": model.head_dim != "auto",
        "qk_norm": model.qk_norm,
        "attention_sinks": model.attention_sinks,
        "layer_heads": bool(model.layer_heads or model.layer_kv_heads),
        "rope_share": model.rope_share != 1,
        "positions": model.positions != "rope",
    }
    return [
        ConfigError(
            f"latent attention (model.mla) has no model.{key}",
            got=f"model.{key}={getattr(model, key)}",
            allowed="kv_heads as many as heads, head_dim=auto, positions=rope, and the defaults of the others",
            fix="leave it out, or set model.mla.kv_lora_rank=0",
        )
        for key, found in wrong.items()
        if found
    ]


def _layers(model: ModelConfig) -> list[ConfigError]:
    """See that what is said layer by layer is said of the layers that there are."""
    problems = []
    for key in ("windows", "rope_layers"):
        if len(getattr(model, key)) > model.layers:
            got = f"{len(getattr(model, key))} for model.layers={model.layers}"
            allowed = f"a pattern of {model.layers} or fewer, which is repeated"
            problems.append(
                ConfigError(f"model.{key} has more entries than there are layers", got=got, allowed=allowed)
            )
    if wrong := [size for size in model.windows if size is not None and not 1 <= size <= 1 << 30]:
        problems.append(out_of_range("model.windows", wrong[0], "1 or more tokens each, or null"))
    if model.windows and model.sliding_window is not None:
        got = f"model.windows={list(model.windows)}, model.sliding_window={model.sliding_window}"
        what, fix = "windows are given for each layer, and one for all", "set model.sliding_window=null, or windows=[]"
        problems.append(ConfigError(what, got=got, fix=fix))
    return problems + _heads_of_layers(model)


def _heads_of_layers(model: ModelConfig) -> list[ConfigError]:
    given = {key: sizes for key in ("layer_heads", "layer_kv_heads") if (sizes := getattr(model, key))}
    if not given:
        return []
    for key, sizes in given.items():
        if len(sizes) != model.layers or not all(1 <= size <= 1 << 14 for size in sizes):
            allowed = f"{model.layers} numbers of 1 or more, one for each of model.layers"
            return [
                ConfigError(f"'model.{key}' does not give the heads of the layers", got=list(sizes), allowed=allowed)
            ]
    if model.head_dim == "auto":
        what = "heads that differ by layer need a width that does not"
        return [ConfigError(what, got="model.head_dim=auto", fix="set model.head_dim to a number")]
    for layer in range(model.layers):
        heads, kv_heads = model.heads_of(layer)
        if heads % kv_heads:
            what = "the heads of a layer do not divide by its key and value heads"
            return [ConfigError(what, got=f"{heads} / {kv_heads} in layer {layer}", fix="change one of them")]
    return []


def _rope(model: ModelConfig) -> list[ConfigError]:
    """Rotary positions turn pairs, in some of the layers."""
    if model.positions != "rope":
        set_there = (bool(model.rope_layers), model.rope_share != 1, model.rope_local_theta is not None)
        if not any(set_there):
            return []
        what = "rope_layers, rope_share and rope_local_theta are of rotary positions"
        return [
            ConfigError(what, got=f"model.positions={model.positions}", fix="set model.positions=rope, or none of them")
        ]
    if not 0 < model.rope_share <= 1:
        too_much = 1 < model.rope_share < _LARGE  # others are said by check_ranges
        return [out_of_range("model.rope_share", model.rope_share, "more than 0, at most 1")] if too_much else []
    problems = []
    if model.rope_width < 2 or model.rope_width % 2:
        turned = f"head_dim {model.head_width}" + (f" x {model.rope_share:g}" if model.rope_share != 1 else "")
        what = "RoPE turns pairs of elements: a head's width is even"
        problems.append(ConfigError(what, got=turned, fix="change model.head_dim or model.rope_share"))
    local = model.rope_local_theta
    if local is not None and 0 < local < _LARGE and not any((*model.windows, model.sliding_window)):
        what = "no layer has a window, which model.rope_local_theta is for"
        problems.append(
            ConfigError(what, got=model.rope_local_theta, fix="set model.windows, or rope_local_theta=null")
        )
    if model.qk_norm_over == "width" and model.qk_norm_after_rope:
        what = "a norm over all heads comes before RoPE"
        problems.append(ConfigError(what, got="qk_norm_over=width, qk_norm_after_rope=true", fix="change one of them"))
    return problems


def _experts(model: ModelConfig) -> list[ConfigError]:
    """See that the choice is among experts that there are, and in groups of one size."""
    moe = model.moe
    if moe.experts and model.activation not in GATED:
        what = "experts are gated feed-forwards"
        return [ConfigError(what, got=f"model.activation={model.activation}", allowed=", ".join(GATED))]
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
