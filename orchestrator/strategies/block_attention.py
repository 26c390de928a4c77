"""Attention tile by tile: some queries over some keys, with the log-sum-exp by which tiles are merged.

Nothing here holds more scores than a tile has. Source: Dao et al. 2022, "FlashAttention"; Liu et al. 2023, "Ring
Attention with Blockwise Transformers".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orchestrator.models.mask import CausalMask

Range = tuple[int, int]
Visible = Tensor | Literal["all", "causal"]  # bool [B or 1, 1, queries, keys], or what needs none

_KERNEL_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys.

    Attributes:
        scale: factor on the products.
        soft_cap: they become `cap * tanh(score / cap)`; None: they stay. Source: Gemma 2.
        tile: queries and keys whose scores exist at one time.
    """

    scale: float
    soft_cap: float | None = None
    tile: tuple[int, int] = (512, 1024)


def tiles(rule: CausalMask, queries: Range, keys: Range, size: tuple[int, int]) -> Iterator[tuple[Range, Range]]:
    """Yield the tiles of some queries over some keys in which any query may see any key, causality and window alone.

    Args:
        rule: the mask.
        queries: positions in the sequence.
        keys: positions in the sequence.
        size: queries and keys of a tile at most.
    """
    for start in range(*queries, size[0]):
        stop = min(start + size[0], queries[1])
        first, end = rule.visible_keys(start, stop)
        first, end = max(first, keys[0]), min(end, keys[1])
        for key in range(first, end, size[1]):
            yield (start, stop), (key, min(key + size[1], end))


def visible(rule: CausalMask, queries: Range, keys: Range) -> Visible:
    """Return what of a tile may be seen, without a mask where there need be none.

    Args:
        rule: the mask.
        queries: positions in the sequence.
        keys: positions in the sequence.
    """
    (start, stop), (first, end) = queries, keys
    if rule.documents is None and end <= start + 1 and (rule.window is None or stop - first <= rule.window):
        return "all"
    mask = rule.part(queries, keys)
    return mask if mask is not None else "causal" if stop - start > 1 else "all"


def uses_kernel(q: Tensor, v: Tensor, seen: Visible, scores: Scores) -> bool:
    """Return whether torch's flash kernel for CUDA takes this tile.

    Args:
        q: queries.
        v: values.
        seen: of the tile.
        scores: how scores are made.
    """
    plain = isinstance(seen, str) and scores.soft_cap is None
    return plain and q.is_cuda and q.dtype in _KERNEL_DTYPES and q.shape[-1] == v.shape[-1]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Visible, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attend within a tile.

    Args:
        q: [B, H, queries, head_dim].
        k: [B, H / n, keys, head_dim]; each key head serves n query heads in a row.
        v: [B, H / n, keys, width].
        seen: of the tile.
        scores: how scores are made.

    Returns:
        the output [B, H, queries, width] and the scores' log-sum-exp [B, H, queries], fp32; 0 and minus infinity where
        nothing is seen.
    """
    if uses_kernel(q, v, seen, scores):
        # Never run on a chip here: written by the schema, which fake tensors check.
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, seen == "causal", scale=scores.scale)
        return found[0].float(), found[1]
    heads = k.shape[1]
    weights = _score(_grouped(q, heads), _rows(k), heads, seen, scores)
    highest = weights.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights.sub_(highest).exp_()
    sums = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights, _rows(v)).div_(sums.clamp(min=torch.finfo(torch.float32).tiny))
    shape = (*q.shape[:3], -1)
    return out.view(shape), (highest + sums.log()).view(shape).squeeze(-1)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    seen: Visible,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate what a tile adds to an output that is merged of several.

    Args:
        grad: of the merged output, [B, H, queries, width].
        q: as in `attend`.
        k: as in `attend`.
        v: as in `attend`.
        out: the merged output.
        lse: of all tiles together, [B, H, queries], fp32.
        delta: `(grad * out).sum(-1)`, [B, H, queries], fp32.
        seen: of the tile.
        scores: how scores are made.

    Returns:
        gradients of q, k and v, fp32.
    """
    if uses_kernel(q, v, seen, scores):
        return _kernel_backward(grad, q, k, v, out, lse, seen, scores)
    heads, grouped = k.shape[1], (*k.shape[:2], -1)
    queries, keys, values = _grouped(q, heads), _rows(k), _rows(v)
    grads, statistics = _grouped(grad, heads), _grouped(torch.stack((lse, delta), -1), heads)
    score = _score(queries, keys, heads, seen, scores)
    # A row that sees nothing has minus infinity in both: no weight, and not NaN.
    base = statistics[..., :1].clamp(min=torch.finfo(torch.float32).min)
    weights = (score.sub_(base) if scores.soft_cap is None else score - base).exp_()
    grad_v = torch.bmm(weights.transpose(1, 2), grads)
    grad_score = torch.bmm(grads, values.transpose(1, 2)).sub_(statistics[..., 1:]).mul_(weights)
    if scores.soft_cap is not None:
        slope = 1 - score.div_(scores.soft_cap).square_()
        grad_score.mul_(torch.where(weights > 0, slope, 0.0))
    grad_score.mul_(scores.scale)
    grad_q, grad_k = torch.bmm(grad_score, keys), torch.bmm(grad_score.transpose(1, 2), queries)
    return grad_q.view(*q.shape), grad_k.view(*grouped, k.shape[-1]), grad_v.view(*grouped, v.shape[-1])


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add a tile to the output of the queries so far, in place.

    Args:
        out: [B, H, queries, width], fp32.
        lse: [B, H, queries], fp32; minus infinity where nothing was seen yet.
        more: as `out`, of the tile.
        more_lse: as `lse`, of the tile.
    """
    both = torch.logaddexp(lse, more_lse)
    # Where neither has seen anything both are minus infinity, and their difference would be NaN.
    base = both.clamp(min=torch.finfo(torch.float32).min)
    out.mul_((lse - base).exp_().unsqueeze(-1)).add_(more * (more_lse - base).exp_().unsqueeze(-1))
    lse.copy_(both)


def _grouped(q: Tensor, heads: int) -> Tensor:
    """[B, H, queries, d] -> [B * heads, H / heads * queries, d] in fp32: queries of one key head are rows of one."""
    return q.float().reshape(q.shape[0] * heads, -1, q.shape[-1])


def _rows(k: Tensor) -> Tensor:
    return k.float().flatten(0, 1)


def _score(q: Tensor, k: Tensor, heads: int, seen: Visible, scores: Scores) -> Tensor:
    """Scores [B * heads, rows, keys] in fp32, minus infinity where nothing may be seen."""
    score = torch.bmm(q, k.transpose(1, 2)).mul_(scores.scale)
    if scores.soft_cap is not None:
        score.div_(scores.soft_cap).tanh_().mul_(scores.soft_cap)
    if isinstance(seen, str):
        if seen == "all":
            return score
        size = k.shape[1]
        seen = torch.ones(size, size, dtype=torch.bool, device=k.device).tril_()[None, None]
    queries, keys = seen.shape[-2:]
    # [B, heads, heads of a group, queries, keys]; the mask is one for all heads.
    score.view(-1, heads, score.shape[1] // queries, queries, keys).masked_fill_(~seen.unsqueeze(1), float("-inf"))
    return score


def _kernel_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Visible, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    # The merged output and log-sum-exp make the kernel's weights those of all tiles together. Never run on a chip here.
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, seen == "causal", unused, unused),
        scale=scores.scale,
    )
    return found[0].float(), found[1].float(), found[2].float()
