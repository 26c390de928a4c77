"""The outer optimizer: what islands have learned together becomes a step of the outer weights. NumPy in fp32.

DiLoCo (arXiv 2311.08105): the outer gradient is the mean of what the islands have moved away from the outer weights,
and the outer optimizer is SGD with Nesterov momentum, as `torch.optim.SGD` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]


class OuterOptimizer:
    """SGD with momentum over named tensors.

    Args:
        lr: factor of a step; 1 without momentum averages the islands.
        momentum: that is left of the steps before.
        nesterov: look ahead by the momentum.

    Attributes:
        momentum: of each tensor, from its first step on.
    """

    def __init__(self, lr: float, momentum: float, nesterov: bool = True):
        self.lr, self._kept, self._nesterov = lr, momentum, nesterov
        self.momentum: dict[str, Array] = {}

    def step(self, name: str, gradient: Array, part: float = 1.0) -> Array:
        """Return what is to be added to a tensor.

        Args:
            name: of the tensor.
            gradient: outer gradient, fp32; it is overwritten, since new memory costs as much as the numbers in it.
            part: of a whole round's tokens that is in it. Steps whose parts add up to 1 are about one whole step:
                the gradient and the step of the momentum count by their part, and momentum decays by its power.

        Returns:
            The update, fp32.
        """
        counted = gradient if part == 1.0 else np.multiply(gradient, np.float32(part), out=gradient)
        if not self._kept:
            return np.multiply(counted, np.float32(-self.lr), out=counted)
        momentum = self.momentum.get(name)
        decay = np.float32(self._kept if part == 1.0 else self._kept**part)
        momentum = counted.copy() if momentum is None else np.asarray(momentum * decay + counted)
        self.momentum[name] = momentum
        # Momentum makes its step by part, too.
        ahead = np.asarray(momentum * np.float32(part * (self._kept if self._nesterov else 1.0)))
        if self._nesterov:
            ahead += counted
        return np.multiply(ahead, np.float32(-self.lr), out=ahead)


def weighted_mean(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return the weighted mean, summed in the given order.

    Args:
        arrays: fp32, of one shape.
        weights: of the arrays, whose sum is more than 0.
    """
    total = float(sum(weights))
    mean = np.multiply(arrays[0], np.float32(weights[0] / total), out=np.empty_like(arrays[0]))
    for array, weight in zip(arrays[1:], weights[1:], strict=True):
        mean += array * np.float32(weight / total)
    return mean


def bits(array: Array) -> int:
    """Return the sum of the elements' bits, as 32-bit integers, modulo 2^64.

    Sums of the parts of a tensor add up to that of the whole, however it is cut, and any change of one element changes
    it: it compares weights over layouts. It is no hash.

    Args:
        array: fp32.
    """
    words = np.ascontiguousarray(array).reshape(-1).view(np.int32)
    return int(words.sum(dtype=np.int64)) % (1 << 64)
