"""Normalisations over the last dim, of the residual stream and of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.config.schema import ModelConfig


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square over the last dim, times a weight. Source: Zhang and Sennrich 2019."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., width]; the statistics are fp32, the result has the dtype of `x`."""
        # Under autocast the weight is fp32 where x is not, and torch has fused kernels for equal dtypes only.
        weight = self.weight.to(x.dtype) if self.weight is not None else None
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class OffsetRMSNorm(nn.RMSNorm):
    """The same with `1 + weight`, as Gemma has it: weights begin at zero, and bf16 holds small ones better."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., width] in fp32; the result has the dtype of `x`."""
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)


class WidthRMSNorm(nn.Module):
    """RMS norm over all heads together, of which a rank of a tensor group holds a part.

    Written in elementary operations, which torch and a compiler reduce over the parts by themselves.

    Args:
        width: of all heads.
        eps: added to the mean square.
        offset: the factor is `1 + weight`.
    """

    def __init__(self, width: int, eps: float, offset: bool = False):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., width] in fp32; the result has the dtype of `x`."""
        values, weight = x.float(), self.weight.float()
        normal = values * (values.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (normal * (1.0 + weight if self.offset else weight)).to(x.dtype)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """Make the configured normalisation over the last dim.

    Args:
        config: of the model.
        width: size of that dim.
    """
    if config.norm == "layer" or config.norm == "layer_no_bias":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm == "layer")
    if config.norm == "layer_plain":
        return nn.LayerNorm(width, eps=config.norm_eps, elementwise_affine=False)
    if config.norm == "rms_offset":
        return OffsetRMSNorm(width, eps=config.norm_eps)
    return RMSNorm(width, eps=config.norm_eps, elementwise_affine=config.norm == "rms")


def make_qk_norm(config: ModelConfig, width: int) -> nn.Module | None:
    """Make the normalisation of queries or of keys: an RMS norm, also beside layer norms.

    Args:
        config: of the model.
        width: of all heads together.
    """
    if not config.qk_norm:
        return None
    offset = config.norm == "rms_offset"
    if config.qk_norm_over == "width":
        return WidthRMSNorm(width, config.norm_eps, offset)
    if offset:
        return OffsetRMSNorm(config.head_width, eps=config.norm_eps)
    return RMSNorm(config.head_width, eps=config.norm_eps, elementwise_affine=config.norm != "rms_plain")
