"""Validate optimizer configurations: ranges, and keys that must fit each other. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from orchestrator.config.schema import (
    AdamWConfig,
    MuonConfig,
    OptimConfig,
    OwnOptimConfig,
    ScheduleConfig,
    SGDConfig,
)
from orchestrator.errors import ConfigError

LARGEST = 1e38  # an fp32 holds it
_MOST_NS_STEPS = 99  # as torch.optim.Muon
# Key -> what its numbers have to be: words, and the test.
_RANGES: dict[str, tuple[str, Any]] = {
    "lr": (f"more than 0, at most {LARGEST:g}", lambda x: 0 < x <= LARGEST),
    "eps": (f"more than 0, at most {LARGEST:g}", lambda x: 0 < x <= LARGEST),
    "eps_update": (f"more than 0, at most {LARGEST:g}", lambda x: 0 < x <= LARGEST),
    "eps_parameter": (f"more than 0, at most {LARGEST:g}", lambda x: 0 < x <= LARGEST),
    "grad_clip": (f"more than 0, at most {LARGEST:g}", lambda x: 0 < x <= LARGEST),
    "lr_factor": (f"0 to {LARGEST:g}", lambda x: 0 <= x <= LARGEST),
    "weight_decay": (f"0 to {LARGEST:g}", lambda x: 0 <= x <= LARGEST),
    "betas": ("0 or more and less than 1", lambda x: 0 <= x < 1),
    "momentum": ("0 or more and less than 1", lambda x: 0 <= x < 1),
    "beta2_decay": ("-1 to less than 0", lambda x: -1 <= x < 0),
    "clip_threshold": (f"1 to {LARGEST:g}", lambda x: 1 <= x <= LARGEST),
    "ns_coefficients": ("numbers", math.isfinite),
    **dict.fromkeys(
        ("dim", "layers", "heads", "head_dim", "mlp_dim", "expert_dim"), ("1 or more", lambda x: 1 <= x <= LARGEST)
    ),
    **dict.fromkeys(
        ("attention_scale", "logit_scale", "residual_scale"),
        (f"more than 0, at most {LARGEST:g}", lambda x: 0 < x <= LARGEST),
    ),
    "ns_steps": (f"1 to {_MOST_NS_STEPS}", lambda x: 1 <= x <= _MOST_NS_STEPS),
}


def check_optimizer(config: OptimConfig) -> list[ConfigError]:
    """Return everything that is wrong with an optimizer's configuration by itself.

    Args:
        config: of the optimizer.
    """
    problems = list(_ranges("optim", config))
    if isinstance(config, MuonConfig):
        problems += _ranges("optim.adamw", config.adamw)
    if isinstance(config, (AdamWConfig, MuonConfig)):
        problems += _ranges("optim.base", config.base)
    if isinstance(config, SGDConfig) and config.nesterov and not config.momentum:
        problems.append(
            ConfigError(
                "Nesterov's step looks ahead along a momentum",
                got="optim.nesterov=true with optim.momentum=0",
                fix="set optim.momentum=0.9, or optim.nesterov=false",
            )
        )
    if isinstance(config, OwnOptimConfig):
        problems += _own(config)
    for number, group in enumerate(config.groups):
        problems += _ranges(f"optim.groups[{number}]", group)
        if not group.match:
            what = f"'optim.groups[{number}].match' names no parameter"
            allowed = "a pattern over names of parameters, such as embed.weight or layers.0.*"
            problems.append(ConfigError(what, got=repr(group.match), allowed=allowed, fix="set it"))
    return problems


def check_schedule(schedule: ScheduleConfig) -> Iterator[ConfigError]:
    """Yield what is said twice, or says nothing.

    Args:
        schedule: of the learning rate.
    """
    if schedule.warmup_fraction is not None and schedule.warmup_tokens is not None:
        got = f"warmup_fraction={schedule.warmup_fraction:g} and warmup_tokens={schedule.warmup_tokens}"
        yield ConfigError("the length of the warm-up is given twice", got=got, fix="leave out one of them")
    wsd = schedule.kind == "wsd" and schedule._target_ is None
    odd = [f"decay_steps={schedule.decay_steps}"] if schedule.decay_steps is not None else []
    odd += [f"decay_shape={schedule.decay_shape}"] if schedule.decay_shape != "linear" else []
    if odd and not wsd:
        yield ConfigError(
            "a decay of its own is part of the schedule wsd",
            got=f"{', '.join(odd)} with optim.schedule.kind={schedule.kind}",
            fix="set optim.schedule.kind=wsd, or leave it out",
        )
    if wsd and schedule.decay_shape == "exponential" and not schedule.min_lr_ratio > 0:
        yield ConfigError(
            "an exponential decay never reaches zero",
            got=f"optim.schedule.min_lr_ratio={schedule.min_lr_ratio:g} with decay_shape=exponential",
            allowed="more than 0",
            fix="set optim.schedule.min_lr_ratio=0.01, or another decay_shape",
        )


def _ranges(prefix: str, config: Any) -> Iterator[ConfigError]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _RANGES or value is None:
            continue
        allowed, fits = _RANGES[field.name]
        for index, number in enumerate(value if isinstance(value, tuple) else (value,)):
            if not fits(number):
                key = f"{prefix}.{field.name}" + (f"[{index}]" if isinstance(value, tuple) else "")
                yield ConfigError(f"'{key}' is out of range", got=number, allowed=allowed, fix=f"set {key}=...")


def _own(config: OwnOptimConfig) -> Iterator[ConfigError]:
    if config._target_ in ("", "???"):
        yield ConfigError(
            "'optim._target_' names no optimizer",
            got=ascii(config._target_),
            allowed="package.module.Class, or the name of an installed entry point",
            fix="set optim._target_=torch.optim.RAdam, for instance",
        )
    for key in ("params", "lr"):
        if key in config.arguments:
            fix = "set optim.lr=..." if key == "lr" else "leave it out: the model's parameters are given"
            yield ConfigError(f"'optim.arguments.{key}' is not an argument to give", got=config.arguments[key], fix=fix)
