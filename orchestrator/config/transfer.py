"""Hyper-parameters of a small model on a large one (`optim.transfer`): the sizes in relation, and the model's factors.

What changes in the forward pass stands in the model's own keys, which a run, its checkpoints and exports hold; what
changes in initial weights and in the optimizer is `optim.transfer_rules`. At the shape of the base nothing changes.

Sources: muP, Yang et al. 2022, "Tensor Programs V", arXiv 2203.03466, table 8; CompleteP, Dey et al. 2025, arXiv
2505.01618, table 1 with alpha = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

from orchestrator.config.schema import (
    AdamWConfig,
    ModelConfig,
    MuonConfig,
    OptimConfig,
    RunConfig,
    TransferBaseConfig,
)
from orchestrator.errors import ConfigError

_NONE = "set optim.transfer=none"
_SAME = 1e-9  # two factors that differ by no more are one, written in other digits


@dataclass(frozen=True)
class Ratios:
    """Sizes of the model over those of the base.

    Attributes:
        width: of the residual stream.
        attention: of all query heads together.
        head: of one head.
        mlp: inner width of the dense feed-forward.
        experts: inner width of an expert.
        shared: inner width of the feed-forward beside the experts.
        depth: layers; 1 where the rule says nothing of depth.
    """

    width: float
    attention: float
    head: float
    mlp: float
    experts: float
    shared: float
    depth: float


def ratios(optim: OptimConfig, model: ModelConfig) -> Ratios | None:
    """Return how much larger a model is than the base.

    Args:
        optim: with its rule and base, checked.
        model: the model.

    Returns:
        None where nothing is transferred.
    """
    if not isinstance(optim, (AdamWConfig, MuonConfig)) or optim.transfer == "none":
        return None
    base = optim.base
    assert base.dim is not None, "checked by check_transfer"
    width = model.dim / base.dim
    head = model.head_width / (base.head_dim or model.head_width)
    attention = width if base.heads is None else head * model.heads / base.heads
    mlp = width if base.mlp_dim is None else model.mlp_dim / base.mlp_dim
    experts = mlp if model.moe.mlp_dim == "auto" else width
    if base.expert_dim is not None:
        experts = model.moe.width(model) / base.expert_dim
    depth = model.layers / (base.layers or model.layers)
    return Ratios(width, attention, head, mlp, experts, width, depth)


def model_factors(optim: OptimConfig, model: ModelConfig) -> dict[str, float | None]:
    """Return the factors in the forward pass that the rule gives a model, by their keys of `model`.

    Args:
        optim: with its rule and base, checked.
        model: the model.

    Returns:
        Empty where nothing is transferred.
    """
    by = ratios(optim, model)
    if by is None:
        return {}
    assert isinstance(optim, (AdamWConfig, MuonConfig))
    base, attention = optim.base, optim.base.attention_scale
    if by.head != 1.0:
        # 1 / head_dim in place of 1 / sqrt(head_dim), and equal to the base's at its width.
        attention = (base.attention_scale or (base.head_dim or model.head_width) ** -0.5) / by.head
    return {
        "logit_scale": base.logit_scale / by.width,
        "residual_scale": base.residual_scale / by.depth,
        "attention_scale": attention,
    }


def settle_transfer(config: RunConfig) -> RunConfig:
    """Write the factors into the model. Once: what has been settled stays as it is.

    Args:
        config: of a run, checked.
    """
    factors = model_factors(config.optim, config.model)
    return replace(config, model=replace(config.model, **factors)) if factors else config  # type: ignore[arg-type]


def describe_transfer(optim: OptimConfig, model: ModelConfig) -> list[str]:
    """Say in a line what is transferred; nothing where nothing is.

    Args:
        optim: of the run.
        model: of the run.
    """
    by = ratios(optim, model)
    if by is None:
        return []
    assert isinstance(optim, (AdamWConfig, MuonConfig))
    depth = f", layers {model.layers} ({by.depth:g} x the base's)" if by.depth != 1.0 else ""
    factors = {key: value for key, value in model_factors(optim, model).items() if value not in (None, 1.0)}
    made = "".join(f", {key} {value:g}" for key, value in factors.items())
    return [f"{optim.transfer}: width {model.dim} ({by.width:g} x the base's){depth}{made}"]


def check_transfer(config: RunConfig) -> list[ConfigError]:
    """Return everything that is wrong with `optim.transfer`.

    Args:
        config: of a run.
    """
    optim, model = config.optim, config.model
    if not isinstance(optim, (AdamWConfig, MuonConfig)):
        return []
    if optim.transfer == "none":
        if optim.base == TransferBaseConfig():
            return []
        what, got = "a base is given, and nothing is transferred from it", "optim.transfer=none with optim.base"
        return [ConfigError(what, got=got, fix="set optim.transfer=mup or completep, or leave optim.base out")]
    if optim.base.dim is None:
        what = "optim.transfer needs the width of the model whose hyper-parameters are used"
        return [ConfigError(what, got="optim.base.dim=null", fix="set optim.base.dim=128, for instance")]
    if any(value is not None and value <= 0 for value in astuple(optim.base)):
        return []  # said by check_ranges
    problems = [*_without_rules(optim, model)]
    if config.train.lora.rank is not None:
        what = "optim.transfer has no rules for adapters, which are as narrow in every model"
        problems.append(ConfigError(what, got=f"train.lora.rank={config.train.lora.rank}", fix=_NONE))
    return problems or [*_other_factors(optim, model, config.train.init_from)]


def _without_rules(optim: AdamWConfig | MuonConfig, model: ModelConfig) -> Iterator[ConfigError]:
    """List what of the model no rule is known for."""
    base, rule = optim.base, optim.transfer
    if model._target_ is not None:
        what = "optim.transfer scales what the product's own model computes"
        yield ConfigError(what, got=f"model._target_={model._target_}", fix=_NONE)
    if model.mla.kv_lora_rank:
        what = "optim.transfer has no rules for the latents of latent attention"
        yield ConfigError(what, got=f"model.mla.kv_lora_rank={model.mla.kv_lora_rank}", fix=_NONE)
    if model.layer_heads and base.heads is not None:
        what = "layers with different numbers of heads are compared with a base by their width alone"
        yield ConfigError(what, got=f"optim.base.heads={base.heads}", fix="leave optim.base.heads out")
    if rule == "mup" and base.layers not in (None, model.layers):
        yield ConfigError(
            "muP has rules for width alone",
            got=f"optim.base.layers={base.layers}, model.layers={model.layers}",
            fix=f"set optim.transfer=completep, or model.layers={base.layers}",
        )


def _other_factors(optim: AdamWConfig | MuonConfig, model: ModelConfig, weights: str | None) -> Iterator[ConfigError]:
    """List the model's own factors that the rule would replace: those of the base are given beside its shape."""
    plain = ModelConfig()
    for key, wanted in model_factors(optim, model).items():
        value = getattr(model, key)
        if value == wanted or (value and wanted and math.isclose(value, wanted, rel_tol=_SAME)):
            continue
        if weights is not None:
            what, fix = f"weights that were trained with another model.{key} would compute something else", _NONE
            yield ConfigError(what, got=f"model.{key}={value}; optim.transfer={optim.transfer}: {wanted}", fix=fix)
            continue
        if value == getattr(plain, key):
            continue
        yield ConfigError(
            f"optim.transfer={optim.transfer} says what model.{key} is",
            got=f"model.{key}={value}; of this base it is {wanted}",
            fix=f"leave it out, and give the base's: optim.base.{key}=...",
        )
