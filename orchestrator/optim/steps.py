"""Common base of the optimizers: an update is skipped where its step was not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from orchestrator.sharding.parts import Reduced


class GuardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose step can be called off by a flag on the device, as fused ones of torch.

    Attributes:
        found_inf: scalar, 0 or None: take the step; else leave weights and state to the bit as they are. The name and
            the meaning are those of `torch.amp.GradScaler`.
        reduced_dims: key of a state tensor -> dims of its parameter in which it has size 1.
        blocks: key of a state tensor -> elements of its parameter's last dim that share a number of it.
    """

    # Read by GradScaler and by strategies: this optimizer looks at `found_inf` itself.
    _step_supports_amp_scaling = True
    reduced_dims: Mapping[str, Reduced] = MappingProxyType({})
    blocks: Mapping[str, int] = MappingProxyType({})
    found_inf: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        """Take one step, unless `found_inf` calls it off.

        Args:
            closure: evaluates the model again and returns the loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self.update()
        return loss

    def update(self) -> None:
        """Update the parameters that have a gradient."""
        raise NotImplementedError

    @property
    def bad(self) -> Tensor | None:
        """`found_inf` as a bool scalar."""
        return None if self.found_inf is None else self.found_inf.bool()

    def with_gradients(self, group: dict[str, Any]) -> list[Tensor]:
        """Return the parameters of a group that have a gradient.

        Args:
            group: of the optimizer.
        """
        return [parameter for parameter in group["params"] if parameter.grad is not None]


@contextmanager
def evaluated(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Within it the weights are those to be evaluated and saved, where an optimizer trains others.

    Args:
        optimizer: of the run; one that has methods `train` and `eval` is switched, any other left alone.
    """
    for name in ("eval", "train"):
        if callable(switch := getattr(optimizer, name, None)):
            switch()
        if name == "eval":
            yield


def store(target: Tensor, value: Tensor, bad: Tensor | None) -> None:
    """Write `value` into `target`, or nothing where `bad` is true."""
    if bad is None:
        target.copy_(value)
    else:
        torch.where(bad, target, value, out=target)
