"""Numbers in fewer bits: stochastic rounding to bf16, and 8-bit codes that share a scale in blocks.

Rounding up or down is drawn so that its mean is the number itself: what is too small to change a rounded number by
itself adds up over the steps all the same. What is drawn is a function of a key, the step and the place of the element
in the whole tensor, so every layout and backend draws the same, and a resumed run what it would have drawn.

8-bit codes lie densest at zero: code c of n stands for (c / n)^p times the largest number of its block. A block is a
stretch of the last dim, so tensors that are cut along other dims, or along that one in whole blocks, have equal codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.constants import CODE_BLOCK

_MASK = 0xFFFFFFFF
_HIGH = -65536  # the bits of an fp32 that bf16 has, as int32
_TINY = 1e-38  # what a block of zeros is divided by


def draw_bits(key: int, step: Tensor, start: Sequence[int], local: Sequence[int], whole: Sequence[int]) -> Tensor:
    """Draw 32 bits for each element of a part of a tensor.

    Args:
        key: of the tensor, 32 bits.
        step: scalar, on the device where they are drawn.
        start: where the part begins in the whole tensor.
        local: shape of the part.
        whole: shape of the whole tensor.

    Returns:
        int64 of shape `local`, below 2^32.
    """
    index = torch.zeros((), dtype=torch.int64, device=step.device)
    for dim, (first, size) in enumerate(zip(start, local, strict=True)):
        stride = 1
        for other in whole[dim + 1 :]:
            stride *= other
        place = torch.arange(first, first + size, dtype=torch.int64, device=step.device) * stride
        index = index.unsqueeze(-1) + place
    seed = _mixed(_mixed(step.to(torch.int64) & _MASK) ^ key)
    return _mixed(_mixed((index & _MASK) ^ seed) ^ (index >> 32))


def _mixed(x: Tensor) -> Tensor:
    """Mix 32 bits so that each depends on all: the finaliser of MurmurHash3 (Austin Appleby, public domain)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)


def to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16, up or down by chance.

    Args:
        x: fp32, finite.
        bits: 16 random bits for each element.
    """
    return ((x.view(torch.int32) + bits.to(torch.int32)) & _HIGH).view(torch.float32).to(torch.bfloat16)


@dataclass(frozen=True)
class Code:
    """An 8-bit code: (c / levels)^(2^roots) times the largest number of a block.

    Attributes:
        dtype: of the codes; with a sign or without.
        levels: the largest code.
        roots: square roots that a share of the largest number goes through; more lie closer at zero.
        block: elements that share a scale.
    """

    dtype: torch.dtype
    levels: int
    roots: int
    block: int = CODE_BLOCK

    def encode(self, x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Round to codes, up or down by chance; of an unsigned code nothing above 0 becomes 0.

        Args:
            x: fp32 [..., n x block], finite.
            bits: 16 random bits for each element.

        Returns:
            Codes, shaped as `x`; scales [..., n] fp32.
        """
        blocks = x.unflatten(-1, (-1, self.block))
        scale = blocks.abs().amax(-1)
        share = blocks.abs() / scale.clamp(min=_TINY).unsqueeze(-1)
        root = share
        for _ in range(self.roots):
            root = root.sqrt()
        low = (root * self.levels).floor().clamp(max=self.levels - 1)
        below, above = self._value(low), self._value(low + 1)
        chance = (bits.to(torch.float32) / 65536).view(share.shape)
        code = low + (chance < (share - below) / (above - below)).to(low.dtype)
        if self.dtype == torch.uint8:
            code = torch.where(blocks > 0, code.clamp(min=1), torch.zeros_like(code))
        else:
            code = code * blocks.sign()
        return code.flatten(-2).to(self.dtype), scale

    def decode(self, code: Tensor, scale: Tensor) -> Tensor:
        """Return what codes stand for, in fp32.

        Args:
            code: [..., n x block].
            scale: [..., n].
        """
        number = code.to(torch.float32).unflatten(-1, (-1, self.block))
        value = self._value(number.abs()) * scale.unsqueeze(-1)
        return (value if self.dtype == torch.uint8 else value * number.sign()).flatten(-2)

    def _value(self, code: Tensor) -> Tensor:
        """Return the share of the block's largest number that a code stands for."""
        share = code / self.levels
        for _ in range(self.roots):
            share = share * share
        return share


CODES = {"exp_avg": Code(torch.int8, 127, 1), "exp_avg_sq": Code(torch.uint8, 255, 2)}
"""Of AdamW's moments, by the key of the state: the first has a sign, the second spans more."""
