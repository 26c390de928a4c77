"""`torch.optim.SGD` on split parameters: its fused kernel on the local parts, as DTensor has none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from orchestrator.optim.steps import GuardedOptimizer
from orchestrator.sharding.parts import Parts


class SGD(GuardedOptimizer):
    """Stochastic gradient descent; state is `momentum_buffer`, of the parameter's shape, or nothing without momentum.

    Args:
        params: parameters, or groups of them.
        parts: how they are split.
        lr: learning rate.
        momentum: of the sum of gradients.
        nesterov: look ahead along the momentum.
        weight_decay: added to the gradient, times the weight.
        fused: by torch's fused kernel.
    """

    def __init__(
        self,
        params: Iterable[Any],
        parts: Parts,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        fused: bool = False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._parts, self._fused = parts, fused
        for group in self.param_groups:
            for parameter in group["params"]:
                # Zeros: without dampening the first step is that of a buffer that begins as the gradient.
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)} if momentum else {}

    def update(self) -> None:
        """Update the parameters that have a gradient."""
        local = self._parts.local
        for group in self.param_groups:
            # An empty part has nothing to update.
            parameters = [p for p in self.with_gradients(group) if local(p).numel()]
            if not parameters:
                continue
            buffers: list[Tensor | None] = [None] * len(parameters)
            if group["momentum"]:
                buffers = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
            sgd(
                [local(parameter) for parameter in parameters],
                [local(parameter.grad) for parameter in parameters],  # type: ignore[arg-type]
                buffers,
                foreach=False,
                fused=self._fused,
                found_inf=self.found_inf,
                grad_scale=None,
                lr=group["lr"],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                weight_decay=group["weight_decay"],
                dampening=0.0,
                maximize=False,
            )
