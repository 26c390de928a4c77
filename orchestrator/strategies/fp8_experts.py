"""Products of experts in 8-bit floats, in the place of `models.expert_dispatch.grouped_linear`.

Operands are scaled by row, with `tensorwise` too, or in blocks of 32 (mxfp8): torchao's grouped products know no other,
and with `rowwise_gw_hp` experts stay in bf16. Along the sum of a product each row of one operand and each column of the
other has a scale; where a product sums over tokens, over those of one expert. Where the device has no such products,
operands are rounded, and each expert's rows are multiplied in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(E4M3).max
_LEAST = 1e-12  # what a row of zeros is scaled by, as torchao does
_BLOCK = 32


class GroupedProduct(Protocol):
    """The product of each expert's rows with its matrix."""

    def __call__(self, rows: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply; as `models.expert_dispatch.grouped_linear`.

        Args:
            rows: [N, in], sorted by expert.
            weight: [E, out, in].
            counts: [E] int64, rows of each.
            bias: [E, out], or None.
        """


@dataclass(frozen=True)
class Rounding:
    """What the operands of a product are rounded to.

    Attributes:
        block: elements along the sum that share a scale; None: all of a row.
    """

    block: int | None = None

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        """Round to what e4m3 holds of a scaled row, in fp32.

        Args:
            x: a matrix.
            dim: along which a product sums over it.
        """
        rows = x.float() if dim in (-1, x.dim() - 1) else x.float().T
        given, blocked = rows, rows
        if self.block is not None:
            padded = F.pad(rows, (0, -rows.shape[-1] % self.block))
            blocked = padded.unflatten(-1, (-1, self.block))
        largest = blocked.abs().amax(-1, keepdim=True).clamp(min=_LEAST)
        exponent = torch.log2(_LARGEST / largest).floor()
        scale = torch.exp2(exponent)
        rounded = (blocked * scale).clamp(-_LARGEST, _LARGEST).to(E4M3).float() / scale
        if self.block is not None:
            rounded = rounded.flatten(-2)[..., : given.shape[-1]]
        return rounded if dim in (-1, x.dim() - 1) else rounded.T


class _RoundedLinear(torch.autograd.Function):
    """x W^T of rounded operands, and its gradients likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rounding = rounding
        return (rounding(x, -1) @ rounding(weight, -1).T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), rounding, gradient = ctx.saved_tensors, ctx.rounding, upstream[0]
        of_x = rounding(gradient, -1) @ rounding(weight, 0)
        of_weight = rounding(gradient, 0).T @ rounding(x, 0)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None


def emulated_product(recipe: str) -> GroupedProduct:
    """Return the product whose operands are rounded and multiplied in fp32.

    Args:
        recipe: as `hardware.fp8.recipe` has it.
    """
    rounding = Rounding(_BLOCK if recipe == "mxfp8" else None)

    def product(rows: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
        parts = rows.split(counts.tolist())
        found = []
        for number, (part, matrix) in enumerate(zip(parts, weight.unbind(), strict=True)):
            if len(part):
                result = _RoundedLinear.apply(part, matrix, rounding)
            else:
                # An expert without rows: the gradient is zero, and not missing on one rank.
                result = F.linear(part, matrix)
            found.append(result if bias is None else result + bias[number].to(result.dtype))
        return torch.cat(found)

    return product


def native_product(recipe: str) -> GroupedProduct:
    """Return torchao's product, on a GPU. Never run on one yet.

    Each expert's rows are padded with zeros to a multiple of what the kernels take, without a read on the host.

    Args:
        recipe: as `hardware.fp8.recipe` has it.
    """
    multiple, multiply = (_BLOCK, _mx_product()) if recipe == "mxfp8" else (16, _rowwise_product())

    def product(rows: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
        number, experts = rows.shape[0], weight.shape[0]
        ends = ((counts + multiple - 1) // multiple * multiple).cumsum(0)
        shift = ends - ((counts + multiple - 1) // multiple * multiple) - (counts.cumsum(0) - counts)
        places = torch.arange(number, device=rows.device) + shift.repeat_interleave(counts, output_size=number)
        room = -(-number // multiple) * multiple + experts * multiple
        padded = rows.new_zeros(room, rows.shape[1]).index_copy(0, places, rows)
        answers = multiply(padded, weight.transpose(-2, -1), ends.to(torch.int32)).index_select(0, places)
        if bias is None:
            return answers
        return answers + bias.to(answers.dtype).repeat_interleave(counts, 0, output_size=number)

    return product


def _rowwise_product() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torchao.float8.config import e4m3_dtype
    from torchao.prototype.moe_training.fp8_grouped_mm import _to_fp8_rowwise_then_scaled_grouped_mm

    def multiply(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        result: Tensor = _to_fp8_rowwise_then_scaled_grouped_mm(
            rows, weight, ends, torch.bfloat16, e4m3_dtype, pad_token_groups_for_grouped_mm=False
        )
        return result

    return multiply


def _mx_product() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torchao.prototype.moe_training.mxfp8_grouped_mm import _to_mxfp8_then_scaled_grouped_mm

    def multiply(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        result: Tensor = _to_mxfp8_then_scaled_grouped_mm(rows, weight, ends)
        return result

    return multiply
