"""Muon on split matrices: `torch.optim.Muon`, whose orthogonalisation sees each matrix whole.

Keller Jordan, https://kellerjordan.github.io/posts/muon/; "Muon is Scalable for LLM Training", arXiv 2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from orchestrator.optim.steps import GuardedOptimizer, store
from orchestrator.sharding.parts import Parts


class Muon(GuardedOptimizer):
    """`torch.optim.Muon` for matrices of which each process may hold a part.

    Args:
        params: matrices, or stacks [E, rows, columns] of experts' matrices, each of which is one by itself; or groups.
        parts: how they are split.
        lr: learning rate, before `adjust_lr`.
        weight_decay: decoupled.
        momentum: of the average of gradients.
        nesterov: look ahead along the momentum.
        ns_coefficients: of the Newton-Schulz iteration's polynomial.
        ns_steps: of the iteration.
        eps: least norm that a matrix is divided by.
        adjust_lr: `original` scales the update by sqrt(max(1, rows / columns)); `match_rms_adamw` by
            0.2 sqrt(max(rows, columns)), which makes learning rates of AdamW fit.
        dtype: of the iteration.
    """

    def __init__(
        self,
        params: Iterable[Any],
        parts: Parts,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        eps: float = 1e-7,
        adjust_lr: Literal["original", "match_rms_adamw"] = "original",
        dtype: torch.dtype = torch.bfloat16,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "eps": eps,
            "adjust_lr": adjust_lr,
        }
        super().__init__(params, defaults)
        self._parts, self._dtype = parts, dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.dim() in (2, 3), f"Muon is for matrices, not for {tuple(parameter.shape)}"
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    def update(self) -> None:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            self._update_group(group, self.with_gradients(group))

    def _update_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        def direction(parameter: Tensor) -> Tensor:
            gradient = self._parts.local(parameter.grad)  # type: ignore[arg-type]
            buffer = self._parts.local(self.state[parameter]["momentum_buffer"])
            store(buffer, buffer.lerp(gradient, 1 - group["momentum"]), self.bad)
            ahead = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
            return ahead.to(self._dtype)

        def whole(matrix: Tensor) -> Tensor:
            return orthogonalize(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])

        for parameter, update in self._parts.on_wholes(direction, parameters, whole):
            local = self._parts.local(parameter)
            rate = group["lr"] * shape_factor(group["adjust_lr"], self._parts.shape(parameter))
            decayed = local * (1 - group["lr"] * group["weight_decay"])
            store(local, decayed.add_(update, alpha=-rate), self.bad)


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of a matrix near 1, by a quintic Newton-Schulz iteration.

    Args:
        matrix: [rows, columns], or [E, rows, columns], each by itself; its dtype is that of the iteration.
        coefficients: a, b, c of X <- a X + (b A + c A A) X, where A = X X^T.
        steps: of the iteration.
        eps: least norm that the matrix is divided by.

    Returns:
        Of the same shape, near U V^T of the singular value decomposition.
    """
    a, b, c = coefficients
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    norm = x.norm() if x.dim() == 2 else x.square().sum((-2, -1), keepdim=True).sqrt()
    x = x / norm.clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = _add_product(x, _add_product(gram, gram, gram, b, c), x, a, 1.0)
    return x.mT if tall else x


def _add_product(base: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> Tensor:
    """Return beta base + alpha left right."""
    if base.device.type == "xla":
        # torch_xla 2.9 takes a product with factors to the host, and cuts the step's graph there.
        return beta * base + alpha * (left @ right)
    if base.dim() == 3:
        return torch.baddbmm(base, left, right, beta=beta, alpha=alpha)
    return torch.addmm(base, left, right, beta=beta, alpha=alpha)


def shape_factor(adjust_lr: str, shape: tuple[float, ...]) -> float:
    """Return what the update of a matrix is multiplied by.

    Args:
        adjust_lr: `original` or `match_rms_adamw`.
        shape: of the matrix, or of a stack of them.
    """
    rows, columns = shape[-2:]
    return 0.2 * math.sqrt(max(rows, columns)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
