"""Test tensors for NaN and infinity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def finite_flags(tensors: Sequence[Tensor]) -> list[bool]:
    """Return for each tensor whether all its elements are finite. Integers always are.

    A sum is finite only where every element is, and takes one pass at the memory's speed; a sum of finite elements that
    overflows is looked at again, element by element. Of the tensors on a device one answer is fetched for all.

    Args:
        tensors: of any dtype, on any device.
    """
    flags = [True] * len(tensors)
    floating = [index for index, data in enumerate(tensors) if data.is_floating_point() and data.numel()]
    # Some optimizers keep a count on the host beside what is on the device.
    for device in {tensors[index].device for index in floating}:
        there = [index for index in floating if tensors[index].device == device]
        sums = torch.stack([_sum(tensors[index].detach()) for index in there])
        for index, known in zip(there, sums.isfinite().tolist(), strict=True):
            flags[index] = known or bool(tensors[index].detach().isfinite().all())
    return flags


def count_nonfinite(data: Tensor) -> tuple[int, int]:
    """Count the elements that are NaN, and those that are infinite.

    Args:
        data: a tensor of any dtype.
    """
    if not data.is_floating_point():
        return 0, 0
    return int(data.isnan().sum()), int(data.isinf().sum())


def describe_nonfinite(data: Tensor) -> str:
    """Describe what of a tensor is not finite: `3 NaN, 1 inf of 4,096 elements`.

    Args:
        data: a tensor of any dtype.
    """
    nan, infinite = count_nonfinite(data)
    parts = [f"{count:,} {what}" for count, what in ((nan, "NaN"), (infinite, "inf")) if count]
    return f"{', '.join(parts) or 'none'} of {data.numel():,} elements"


def _sum(data: Tensor) -> Tensor:
    # In fp64 one that is stored so; half precision would overflow.
    kind = torch.float64 if data.dtype == torch.float64 else torch.float32
    return data.sum(dtype=kind).double()
