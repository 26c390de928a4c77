"""A user's own optimizer: imported, tried on a small parameter, and restricted to state a checkpoint can hold.

Its state has to be tensors, each a scalar or shaped as its parameter: so every layout can read its part of it. That is
looked at before the training, on two parameters of a few elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config.registry import OwnPart
from orchestrator.config.schema import OwnOptimConfig
from orchestrator.errors import ConfigError
from orchestrator.optim.steps import GuardedOptimizer

_SHAPES = ((5, 3), (7,))  # of the parameters that it is tried on: no size twice
_STEPS = 3


@dataclass(frozen=True)
class _Entry:
    """A tensor of the state: whether it is a scalar, its dtype, and whether it lies on the host."""

    scalar: bool
    dtype: torch.dtype
    on_host: bool


class OwnOptimizer(GuardedOptimizer):
    """Steps a user's optimizer, unless the step was not finite; the host waits for that answer.

    Args:
        inner: the user's.
    """

    def __init__(self, inner: torch.optim.Optimizer):
        super().__init__(inner.param_groups, {})
        self.inner = inner
        # The very same objects, so that rates and restored state reach it.
        self.param_groups, self.state = inner.param_groups, inner.state

    def update(self) -> None:
        """Step the user's optimizer, unless the gradients are not finite."""
        if self.bad is not None and bool(self.bad):
            return
        with torch.enable_grad():  # as it would be called by itself
            self.inner.step()


def build_own(
    groups: Sequence[dict[str, Any]], config: OwnOptimConfig, device: torch.device, restoring: bool
) -> OwnOptimizer:
    """Build the user's optimizer.

    Args:
        groups: of the model's placed parameters; a single one without settings of its own is given as a plain list.
        config: names the class and its arguments.
        device: of the parameters.
        restoring: allocate the state, to be filled from a checkpoint; else the optimizer begins it at its first step.

    Raises:
        ConfigError: it cannot be made or stepped, or keeps what cannot be saved.
    """
    part = OwnPart("optimizer", config._target_, "optim", config.arguments)
    entries = _try(part, config, device)
    plain = len(groups) == 1 and groups[0] == {"params": groups[0]["params"], "lr": config.lr}
    optimizer = _make(part, groups[0]["params"] if plain else groups, config)
    if restoring:
        for parameter in (parameter for group in groups for parameter in group["params"]):
            state = optimizer.state[parameter]
            for key, entry in entries[min(parameter.dim(), 2)].items():
                place = torch.device("cpu") if entry.on_host else device
                state[key] = (
                    torch.zeros((), dtype=entry.dtype, device=place)
                    if entry.scalar
                    else torch.zeros_like(parameter, dtype=entry.dtype)
                )
    return OwnOptimizer(optimizer)


def _make(part: OwnPart, parameters: Sequence[Any], config: OwnOptimConfig) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = part.make(parameters, expected=torch.optim.Optimizer, lr=config.lr)
    return made


def _try(part: OwnPart, config: OwnOptimConfig, device: torch.device) -> dict[int, Mapping[str, _Entry]]:
    """Step it on small parameters: number of dims -> state by key."""
    generator = torch.Generator().manual_seed(0)
    tried = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in _SHAPES]
    optimizer = _make(part, tried, config)
    before = [_values(group) for group in optimizer.param_groups]
    for _ in range(_STEPS):
        for parameter in tried:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        try:
            optimizer.step()
        except Exception as error:
            raise ConfigError(
                f"'{config._target_}' cannot take a step: {type(error).__name__}: {error}",
                got=f"lr={config.lr}, optim.arguments={config.arguments}",
                fix="take an optimizer for matrices and vectors alike, or optim=muon",
            ) from error
    changed = [key for old, group in zip(before, optimizer.param_groups, strict=True) for key in _differing(old, group)]
    problems = [f"'{key}' of its parameter groups changes from step to step" for key in changed]
    for parameter in tried:
        problems += [_refusal(key, value, parameter) for key, value in optimizer.state[parameter].items()]
    if problems := list(dict.fromkeys(problem for problem in problems if problem)):
        raise ConfigError(
            f"'{config._target_}' keeps what no checkpoint can hold",
            got="; ".join(problems),
            allowed="tensors, each a scalar or shaped as its parameter",
            fix="take another optimizer, or let it keep its numbers as tensors",
        )
    return {
        parameter.dim(): {
            key: _Entry(value.dim() == 0, value.dtype, value.device.type == "cpu")
            for key, value in optimizer.state[parameter].items()
            if value is not None
        }
        for parameter in tried
    }


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _differing(old: Mapping[str, Any], group: Mapping[str, Any]) -> list[str]:
    return [key for key, value in _values(group).items() if key not in old or repr(old[key]) != repr(value)]


def _refusal(key: str, value: Any, parameter: Tensor) -> str:
    if value is None or (isinstance(value, Tensor) and tuple(value.shape) in ((), tuple(parameter.shape))):
        return ""
    if isinstance(value, Tensor):
        return f"'{key}' has shape {list(value.shape)} for a parameter of {list(parameter.shape)}"
    return f"'{key}' is a {type(value).__name__}"
