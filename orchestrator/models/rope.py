"""Rotary position embeddings with the frequency scalings that published models use.

Everything is computed in fp32 by device operations from the positions, so a model needs no buffers: it can
be built on the meta device, moved, and sharded without tables to refill. The halves of what is turned are rotated
against each other (element i with element i + width/2), as in most Hugging Face checkpoints, or neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orchestrator.config.schema import RopeScalingConfig

Rope = tuple[Tensor, Tensor]  # cosine and signed sine, each [B or 1, T, 1, width], fp32
_UNSCALED = RopeScalingConfig()


def rope_tables(
    positions: Tensor, width: int, theta: float, scaling: RopeScalingConfig = _UNSCALED, interleaved: bool = False
) -> Rope:
    """Tables for `apply_rope`, shared by all layers of one kind in one forward pass.

    Args:
        positions: [B or 1, T], integers.
        width: elements of a head that are turned; even.
        theta: base of the geometric row of wavelengths.
        scaling: how the frequencies are changed for contexts beyond the original one.
        interleaved: neighbours turn together, instead of elements half the width apart.

    Source: Su et al. 2021, "RoFormer", eq. 15; in the half-split layout, or as it stands there.
    """
    frequencies, amplitude = inverse_frequencies(width, theta, scaling, positions.device)
    angles = positions.float().unsqueeze(-1) * frequencies
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    if interleaved:
        tables = torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)
    else:
        tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return tables[0].unsqueeze(2), tables[1].unsqueeze(2)


def apply_rope(x: Tensor, rope: Rope, interleaved: bool = False) -> Tensor:
    """Rotate `x` [B, T, H, head_dim]; the arithmetic is fp32, the result has the dtype of `x`.

    Args:
        x: queries or keys, [B, T, H, head_dim]; what is beyond the width of the tables stays as it is.
        rope: cosines and sines of the positions.
        interleaved: as the tables were made.
    """
    cos, signed_sin = rope
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((apply_rope(x[..., :width], rope, interleaved), x[..., width:]), -1)
    # Rolling by half a head puts each element's partner in its place: two passes less than negating and joining halves.
    partners = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(width // 2, -1)
    return (x * cos + partners * signed_sin).to(x.dtype)


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
        given = scaling.attention_factor
        return _yarn(frequencies, head_dim, theta, scaling), amplitude if given is None else given
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

    Source: Peng et al. 2023, "YaRN", section 3.2; the ramp runs over pair indices, bounds rounded outwards where
    `truncate` says so.
    """

    def pair_that_turns(times: float) -> float:
        wavelength = scaling.original_max_seq_len / (times * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=frequencies.device)
    stretch = ((pairs - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return (1.0 - stretch) * frequencies + stretch * frequencies / scaling.factor
