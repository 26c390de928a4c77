"""Adafactor on split parameters: the mathematics of `torch.optim.Adafactor`, with sums over all parts.

torch's own asks the host for every norm, which would cut XLA's graph at each, and knows no parts. Shazeer and Stern,
"Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv 1804.04235.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from orchestrator.optim.steps import GuardedOptimizer, store
from orchestrator.sharding.parts import Parts


class Adafactor(GuardedOptimizer):
    """`torch.optim.Adafactor` for parameters of which each process may hold a part.

    State: `step`, a scalar; of a matrix [R, C] `row_var` [R, 1] and `col_var` [1, C]; of a vector, and of what experts
    have, `variance`, of its shape.

    Args:
        params: matrices and vectors, or groups of them.
        parts: how they are split.
        lr: largest relative step size; what is used is at most 1 / sqrt(step).
        beta2_decay: the variances' decay after n steps is 1 - n^beta2_decay.
        eps: least update variance's root, and least root mean square of a parameter that a step is relative to. None:
            the dtype's resolution.
        d: largest root mean square of an update.
        weight_decay: decoupled.
        factored: of which a row's and a column's variances are kept; None: all with two dims.
    """

    reduced_dims = MappingProxyType({"row_var": (1,), "col_var": (0,)})

    def __init__(
        self,
        params: Iterable[Any],
        parts: Parts,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        factored: Sequence[Tensor] | None = None,
    ):
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._parts = parts
        chosen = None if factored is None else {id(parameter) for parameter in factored}
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parts.local(parameter).device)
                }
                if parameter.dim() == 2 and (chosen is None or id(parameter) in chosen):
                    names = ("row_var", "col_var")
                    factors = {name: parts.zeros(parameter, self.reduced_dims[name]) for name in names}
                    self.state[parameter].update(factors)
                else:
                    self.state[parameter]["variance"] = torch.zeros_like(parameter)

    def update(self) -> None:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            if parameters := self.with_gradients(group):
                self._update_group(group, parameters)

    def _update_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        parts = self._parts
        step = self._count(parameters)
        rates = self._rates(group, parameters, step)
        means = self._average(group, parameters, step ** group["beta2_decay"])
        updates = []
        for parameter in parameters:
            gradient, floor = parts.local(parameter.grad), _floor(group, parameter)  # type: ignore[arg-type]
            state = self.state[parameter]
            if parameter in means:
                variance = parts.local(state["row_var"]) @ parts.local(state["col_var"]) / means[parameter]
            else:
                variance = parts.local(state["variance"]).clone()
            # In the gradient's memory, which is not read after the step: all updates must be there at one time.
            updates.append(gradient.mul_(variance.clamp_(min=floor * floor).rsqrt_()))
        squares = parts.sum([update.square().sum() for update in updates], parameters, (0, 1))
        for parameter, update, rate, square in zip(parameters, updates, rates, squares, strict=True):
            local = parts.local(parameter)
            root_mean_square = (square / parts.numel(parameter)).sqrt()
            scale = rate / (root_mean_square / group["d"]).clamp(min=1.0)
            decayed = local * (1 - group["lr"] * group["weight_decay"])
            store(local, decayed.sub_(update * scale), self.bad)

    def _average(self, group: dict[str, Any], parameters: list[Tensor], share: Tensor) -> dict[Tensor, Tensor]:
        """Take the gradients into the variances.

        Args:
            group: of the parameters.
            parameters: with gradients.
            share: of the new gradient in the average, a scalar.

        Returns:
            Matrix -> mean of its `row_var`, a scalar that is not 0.
        """
        parts, gradients = self._parts, {p: self._parts.local(p.grad) for p in parameters}  # type: ignore[arg-type]
        matrices = [parameter for parameter in parameters if "row_var" in self.state[parameter]]
        for key, (dim,) in self.reduced_dims.items():
            sums = [gradients[matrix].square().sum(dim, keepdim=True) for matrix in matrices]
            for matrix, total in zip(matrices, parts.sum(sums, matrices, (dim,)), strict=True):
                self._mix(matrix, key, total / parts.shape(matrix)[dim], share)
        for parameter in parameters:
            if "variance" in self.state[parameter]:
                self._mix(parameter, "variance", gradients[parameter].square(), share)
        sums = [parts.local(self.state[matrix]["row_var"]).sum() for matrix in matrices]
        totals = parts.sum(sums, matrices, (0,))
        return {
            matrix: (total / parts.shape(matrix)[0]).clamp(min=_floor(group, matrix))
            for matrix, total in zip(matrices, totals, strict=True)
        }

    def _mix(self, parameter: Tensor, key: str, new: Tensor, share: Tensor) -> None:
        old = self._parts.local(self.state[parameter][key])
        store(old, old.lerp(new, share), self.bad)

    def _count(self, parameters: list[Tensor]) -> Tensor:
        """Count the step, and return its number: that of all parameters."""
        one = 1.0 if self.bad is None else (~self.bad).float()
        for parameter in parameters:
            self.state[parameter]["step"] += one
        return self.state[parameters[0]]["step"]

    def _rates(self, group: dict[str, Any], parameters: list[Tensor], step: Tensor) -> list[Tensor]:
        """Return the size of each parameter's step, which is relative to the parameter's own size."""
        relative = step.rsqrt().clamp(max=group["lr"])
        squares = [self._parts.local(parameter).square().sum() for parameter in parameters]
        return [
            (total / self._parts.numel(parameter)).sqrt().clamp(min=group["eps"][1]) * relative
            for parameter, total in zip(parameters, self._parts.sum(squares, parameters, (0, 1)), strict=True)
        ]


def _floor(group: dict[str, Any], parameter: Tensor) -> float:
    least = group["eps"][0]
    return torch.finfo(parameter.dtype).eps if least is None else float(least)
