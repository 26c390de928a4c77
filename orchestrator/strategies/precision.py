"""Lightning's precision plugins for parameters that are split over devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor
from torch.distributed.tensor import DTensor

from orchestrator.errors import ConfigError
from orchestrator.hardware.target import Target

_MIXED = ("bf16", "fp8")  # what is no product, and products that stay, are the same with both


class PreciseStrategy(Protocol):
    """What of a strategy its precision depends on."""

    target: Target
    precision: str

    def forward_context(self) -> AbstractContextManager[Any]:
        """Wrap a forward pass in the precision."""


class ShardedPrecision(Precision):
    """Lightning's default: the strategy's precision, and the norm over all parts of the gradients.

    Args:
        strategy: whose precision it is.
    """

    def __init__(self, strategy: PreciseStrategy):
        self._strategy = strategy
        if strategy.precision in _MIXED:
            self.precision = "bf16-mixed"

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Wrap a forward pass in the strategy's precision."""
        with self._strategy.forward_context():
            yield

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Clip the global norm of the gradients of `optimizer` to `clip_val`."""
        clip_by_norm(list(self.main_params(optimizer)), clip_val)


class ShardedMixedPrecision(MixedPrecision):
    """Autocast over fp32 parameters, with the norm over all parts of the gradients."""

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Clip the global norm of the gradients of `optimizer` to `clip_val`."""
        clip_by_norm(list(self.main_params(optimizer)), clip_val)


def sharded_precision(plugin: Precision, strategy: PreciseStrategy) -> Precision:
    """Return the plugin that does what `plugin`, which the Trainer was given, does, on parts of parameters.

    Args:
        plugin: of the Trainer.
        strategy: whose parameters they are.

    Raises:
        ConfigError: it changes the type of the parameters, or contradicts the strategy's precision.
    """
    if isinstance(plugin, (ShardedPrecision, ShardedMixedPrecision)):
        return plugin
    if type(plugin) is Precision:
        return ShardedPrecision(strategy)
    if type(plugin) is MixedPrecision and plugin.precision == "bf16-mixed":
        if strategy.precision in _MIXED:
            return ShardedPrecision(strategy)
        return ShardedMixedPrecision("bf16-mixed", strategy.target.device_type)
    raise ConfigError(
        "the precision of the Trainer is none that this strategy trains in",
        got=f"Trainer(precision={plugin.precision!r})",
        allowed="32-true, which leaves it to the strategy, or bf16-mixed",
        fix="leave it out, and give the strategy precision='fp32', 'bf16' or 'fp8': master weights are fp32",
    )


def clip_by_norm(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that their global L2 norm is at most `max_norm`.

    Parameters may lie on different meshes, as where some are split by tensor parallelism and some are not, which
    `torch.nn.utils.clip_grad_norm_` refuses.

    Args:
        parameters: plain or DTensors.
        max_norm: of all gradients together.

    Returns:
        The norm before.
    """
    grads: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            grads.setdefault(mesh, []).append(parameter.grad)
    if not grads:
        return torch.zeros(())
    norms = [_whole(torch.nn.utils.get_total_norm(group)) for group in grads.values()]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for group in grads.values():
        torch._foreach_mul_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in group], scale)
    return norm


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
