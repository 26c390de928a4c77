"""A user's own optimizer: imported, tried on a small parameter, and restricted to state a checkpoint can hold.

Its state has to be tensors, each a scalar or shaped as its parameter: so every layout can read its part of it. That is
looked at before the training, on two parameters of a few elements. Numbers that it counts in its parameter groups are
kept as scalars of each parameter beside that.

Some optimizers train other weights than those to be evaluated and saved (schedule-free ones): what has methods `train`
and `eval` is switched around evaluations, samples and checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from orchestrator.config.registry import OwnPart
from orchestrator.config.schema import OwnOptimConfig
from orchestrator.errors import ConfigError
from orchestrator.optim.steps import GuardedOptimizer

_SHAPES = ((5, 3), (7,))  # of the parameters that it is tried on: no size twice
_STEPS = 3
_Number: TypeAlias = type[int] | type[float]
_GROUP = "group_"  # in front of the key of a number that is kept of a parameter's group


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
        counted: keys of its parameter groups whose numbers change from step to step -> their type.
    """

    def __init__(self, inner: torch.optim.Optimizer, counted: Mapping[str, _Number] = MappingProxyType({})):
        super().__init__(inner.param_groups, {})
        self.inner, self._counted = inner, dict(counted)
        # The very same objects, so that rates and restored state reach it.
        self.param_groups, self.state = inner.param_groups, inner.state

    def update(self) -> None:
        """Step the user's optimizer, unless the gradients are not finite."""
        if self.bad is not None and bool(self.bad):
            return
        self._recall()
        with torch.enable_grad():  # as it would be called by itself
            self.inner.step()
        for group in self.param_groups if self._counted else ():
            for parameter in group["params"]:
                for key in self._counted:
                    value = torch.tensor(float(group[key]), dtype=torch.float64)
                    self.state[parameter][f"{_GROUP}{key}"] = value

    def _recall(self) -> None:
        """Take what was counted from the state, which may be that of a checkpoint."""
        for group in self.param_groups if self._counted else ():
            state = self.state.get(group["params"][0], {})
            for key, kind in self._counted.items():
                if (value := state.get(f"{_GROUP}{key}")) is not None:
                    group[key] = kind(value.item())

    def train(self) -> None:
        """Switch to the weights that are trained, where the user's optimizer has other ones."""
        self._switch("train")

    def eval(self) -> None:
        """Switch to the weights that are evaluated and saved."""
        self._switch("eval")

    def _switch(self, name: str) -> None:
        if _switches(self.inner):
            self._recall()
            getattr(self.inner, name)()


def _switches(optimizer: torch.optim.Optimizer) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


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
    entries, counted = _try(part, config, device)
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
            state |= {f"{_GROUP}{key}": torch.zeros((), dtype=torch.float64) for key in counted}
    return OwnOptimizer(optimizer, counted)


def _make(part: OwnPart, parameters: Sequence[Any], config: OwnOptimConfig) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = part.make(parameters, expected=torch.optim.Optimizer, lr=config.lr)
    return made


def _try(
    part: OwnPart, config: OwnOptimConfig, device: torch.device
) -> tuple[dict[int, Mapping[str, _Entry]], dict[str, _Number]]:
    """Step it on small parameters: number of dims -> state by key, and what it counts in its groups."""
    generator = torch.Generator().manual_seed(0)
    tried = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in _SHAPES]
    optimizer = _make(part, tried, config)
    if _switches(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
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
    pairs = list(zip(before, optimizer.param_groups, strict=True))
    changed = list(dict.fromkeys(key for old, group in pairs for key in _differing(old, group)))
    # What begins with the first step is counted, too.
    counted: dict[str, _Number] = {
        key: type(pairs[0][1][key])
        for key in changed
        if all(_is_number(old.get(key, 0)) and _is_number(new.get(key)) for old, new in pairs)
    }
    problems = [f"'{key}' of its parameter groups changes from step to step" for key in changed if key not in counted]
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
    }, counted


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
