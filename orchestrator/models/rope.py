"""Rotary position embeddings with the frequency scalings that published models use.

Everything is computed in fp32 by device operations from the positions, so a model needs no buffers: it can
be built on the meta device, moved, and sharded without tables to refill. The halves of a head are rotated
against each other (element i with element i + head_dim/2), as in Hugging Face checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orchestrator.config.schema import RopeScalingConfig

Rope = tuple[Tensor, Tensor]  # cosine and signed sine, each [B or 1, T, 1, head_dim], fp32


def rope_tables(positions: Tensor, head_dim: int, theta: float, scaling: RopeScalingConfig) -> Rope:
    """Tables for `apply_rope`, shared by all layers of one forward pass.

    Args:
        positions: [B or 1, T], integers.
        head_dim: even.
        theta: base of the geometric row of wavelengths.
        scaling: how the frequencies are changed for contexts beyond the original one.

    Source: Su et al. 2021, "RoFormer", eq. 15, in the half-split layout.
    """
    frequencies, amplitude = inverse_frequencies(head_dim, theta, scaling, positions.device)
    angles = positions.float().unsqueeze(-1) * frequencies
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    return torch.cat((cos, cos), -1).unsqueeze(2), torch.cat((-sin, sin), -1).unsqueeze(2)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate `x` [B, T, H, head_dim]; the arithmetic is fp32, the result has the dtype of `x`.

    Args:
        x: queries or keys, [B, T, H, head_dim].
        rope: cosines and sines of the positions.
    """
    cos, signed_sin = rope
    # Rolling by half a head puts each element's partner in its place: two passes less than negating and joining halves.
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin).to(x.dtype)


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScalingConfig, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Return the radians per token of each pair of elements, [head_dim / 2] in fp32, and a factor on cosine and sine.

    Args:
        head_dim: width of one head.
        theta: base of the frequencies.
        scaling: how they are scaled to longer texts.
        device: of the result.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if scaling.kind == "yarn":
        amplitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1.0 else 1.0
        return _yarn(frequencies, head_dim, theta, scaling), amplitude
    return frequencies, 1.0


def _llama3(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Long wavelengths stretched by `factor`, short ones kept, a linear blend between.

    Source: `apply_scaling` of Meta's reference code for Llama 3.1.
    """
    wavelengths_per_context = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((wavelengths_per_context - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, head_dim: int, theta: float, scaling: RopeScalingConfig) -> Tensor:
    """Pairs that turn more than `beta_fast` times in the original context kept, below `beta_slow` stretched.

    Source: Peng et al. 2023, "YaRN", section 3.2; the ramp runs over pair indices, bounds rounded outwards.
    """

    def pair_that_turns(times: float) -> float:
        wavelength = scaling.original_max_seq_len / (times * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=frequencies.device)
    stretch = ((pairs - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return (1.0 - stretch) * frequencies + stretch * frequencies / scaling.factor
