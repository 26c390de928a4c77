"""Ring attention: keys and values travel round the ranks of a context group, queries stay.

Each rank's queries attend to one rank's keys after the other's, tile by tile, and the results are merged by their
log-sum-exp. A rank holds its own part of a sequence, the part that it works on and the one that arrives. The backward
pass computes the scores again, and the gradients of keys and values travel on with them until they are home. Source:
Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor

from orchestrator.models.attention import AttentionCore
from orchestrator.models.mask import CausalMask
from orchestrator.strategies.block_attention import (
    Range,
    Scores,
    Visible,
    attend,
    attend_backward,
    merge,
    tiles,
    uses_kernel,
    visible,
)
from orchestrator.strategies.sequence_order import SequenceOrder


@dataclass(frozen=True)
class SequenceRing:
    """The ranks of a context group, as a ring.

    Attributes:
        group: the ranks; None: this rank has the whole sequence.
        order: which chunks of the sequence each holds.
    """

    group: dist.ProcessGroup | None
    order: SequenceOrder

    def parts(self, packed: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield every rank and what it has put in, this rank's first; the next one travels meanwhile.

        Args:
            packed: this rank's.
        """
        rank, size = self.rank, self.order.ranks
        for step in range(size):
            arriving = self.pass_on(packed) if step + 1 < size else None
            yield (rank - step) % size, packed
            if arriving is not None:
                packed = arriving.wait()

    def pass_on(self, tensor: Tensor) -> Arriving:
        """Send `tensor` to the next rank, and receive the one of the rank before.

        Args:
            tensor: of equal shape on all ranks; to be left alone until the other one is there.
        """
        rank, size = self.rank, self.order.ranks
        there = torch.empty_like(tensor)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, group=self.group, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, there, group=self.group, group_peer=(rank - 1) % size),
            ]
        )
        return Arriving(there, tensor, works)

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)


@dataclass(frozen=True)
class Arriving:
    """A tensor that is on its way; `sent` is kept until it has left."""

    tensor: Tensor
    sent: Tensor
    works: list[Any]

    def wait(self) -> Tensor:
        """Return it when it is there."""
        for work in self.works:
            work.wait()
        return self.tensor


class RingAttentionCore(nn.Module):
    """Attention of this rank's queries over the whole sequence, of which every rank of the ring has a part.

    Args:
        core: that it takes the place of.
        ring: the ranks of the sequence.
        tile: queries and keys whose scores exist at one time.
    """

    def __init__(self, core: AttentionCore, ring: SequenceRing, tile: tuple[int, int] = Scores.tile):
        super().__init__()
        self.core, self.ring, self.tile = core, ring, tile

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask, sinks: Tensor | None = None) -> Tensor:
        """Attend; arguments and result as `AttentionCore`, but `mask` is the rule of the whole sequence."""
        sinks = None if sinks is None else local_sinks(sinks)
        return ring_attend(q, k, v, sinks, mask, self.ring, scores_of(self.core, q, self.tile))


def scores_of(core: AttentionCore, q: Tensor, tile: tuple[int, int]) -> Scores:
    """Return how `core` makes scores.

    Args:
        core: which is not called.
        q: queries [..., head_dim].
        tile: queries and keys whose scores exist at one time.
    """
    return Scores(1.0 / math.sqrt(q.shape[-1]) if core.scale is None else core.scale, core.softcap, tile)


def local_sinks(sinks: Tensor) -> Tensor:
    """Return the sinks of this rank's heads, where tensor parallelism has cut them.

    Args:
        sinks: [H].
    """
    return sinks.to_local() if isinstance(sinks, DTensor) else sinks


@torch.compiler.disable
def ring_attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, rule: CausalMask, ring: SequenceRing, scores: Scores
) -> Tensor:
    """Attend over the whole sequence, of which each rank of the ring has a part.

    Args:
        q: this rank's queries [B, H, T / c, head_dim].
        k: its keys [B, H / n, T / c, head_dim]; each key head serves n query heads in a row.
        v: its values [B, H / n, T / c, width].
        sinks: [H], a further score of each head that takes weight and gives nothing; None: there is none.
        rule: the mask of the whole sequence.
        ring: the ranks.
        scores: how scores are made.

    Returns:
        [B, H, T / c, width]; of `sinks` each rank's gradient is that of its queries.
    """
    out: Tensor = _RingAttention.apply(q, k, v, sinks, rule, ring, scores)
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        rule: CausalMask,
        ring: SequenceRing,
        scores: Scores,
    ) -> Tensor:
        given = (rule.documents, rule.window, scores.scale, scores.soft_cap, list(scores.tile))
        name = "" if ring.group is None else ring.group.group_name
        out, lse = _ring_attention(q, k, v, sinks, *given, name, ring.order.chunks)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.given = (rule, ring, scores)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grad, (rule, ring, scores) = grads[0].contiguous(), ctx.given
        delta = (grad.float() * out.float()).sum(-1)
        grad_q, grad_k, grad_v = _backward(q, k, v, (grad, out, lse, delta), rule, ring, scores)
        grad_sinks = None
        if sinks is not None:
            grad_sinks = -((sinks.float()[:, None] - lse).exp() * delta).sum((0, 2)).to(sinks.dtype)
        return grad_q, grad_k, grad_v, grad_sinks, None, None, None


# An operation of its own, so that selective recomputation keeps its result and none of what it is made of.
@torch.library.custom_op("orchestrator::ring_attention", mutates_args=())
def _ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    documents: Tensor | None,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    tile: list[int],
    group: str,
    chunks: int,
) -> tuple[Tensor, Tensor]:
    """Compute the output of this rank's queries [B, H, T / c, width], and their log-sum-exp [B, H, T / c]."""
    ring = SequenceRing(None, SequenceOrder(1))
    if group:
        members = _resolve_process_group(cast(Any, group))
        ring = SequenceRing(members, SequenceOrder(dist.get_world_size(members), chunks))
    length = q.shape[2] * ring.order.ranks
    rule = CausalMask(queries=length, past=0, documents=documents, window=window, device=q.device)
    scores = Scores(scale, soft_cap, (tile[0], tile[1]))
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    for source, packed in ring.parts(_pack(k, v)):
        keys, values = _unpack(packed, k, v)
        for rows, columns, seen in _tiles(rule, ring, source, q, v, scores):
            found = attend(q[:, :, rows], keys[:, :, columns], values[:, :, columns], seen, scores)
            merge(out[:, :, rows], lse[:, :, rows], *found)
    if sinks is not None:
        # One more score that takes weight and gives nothing.
        whole = torch.logaddexp(lse, sinks.float()[:, None])
        out.mul_((lse - whole).exp_().unsqueeze(-1))
        lse = whole
    return out.to(q.dtype), lse


@_ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, of_out: tuple[Tensor, ...], rule: CausalMask, ring: SequenceRing, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = torch.zeros_like(q, dtype=torch.float32)
    collected: Tensor = q
    arriving: Arriving | None = None
    for source, packed in ring.parts(_pack(k, v)):
        keys, values = _unpack(packed, k, v)
        here = torch.zeros_like(packed, dtype=torch.float32)
        grad_keys, grad_values = _unpack(here, k, v)
        for rows, columns, seen in _tiles(rule, ring, source, q, v, scores):
            grad, out, lse, delta = (tensor[:, :, rows] for tensor in of_out)
            tensors = (grad, q[:, :, rows], keys[:, :, columns], values[:, :, columns], out, lse, delta)
            found = attend_backward(*tensors, seen, scores)
            for into, part in zip(
                (grad_q[:, :, rows], grad_keys[:, :, columns], grad_values[:, :, columns]), found, strict=True
            ):
                into.add_(part)
        # What the ranks before have collected for this part has come while this rank worked on it.
        collected = here if arriving is None else here.add_(arriving.wait())
        if ring.order.ranks > 1:
            arriving = ring.pass_on(collected)
    grad_k, grad_v = _unpack(collected if arriving is None else arriving.wait(), k, v)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _tiles(
    rule: CausalMask, ring: SequenceRing, source: int, q: Tensor, v: Tensor, scores: Scores
) -> Iterator[tuple[slice, slice, Visible]]:
    """Yield this rank's queries and the keys of rank `source`, both as parts of what the ranks hold, tile by tile."""
    rank, length = ring.rank, q.shape[2]
    size = scores.tile
    if rule.documents is None and rule.window is None and uses_kernel(q, v, "all", scores):
        size = (length, length)  # the kernel makes tiles of its own
    at = 0
    for queries in ring.order.ranges(rank, length):
        key_at = 0
        for keys in ring.order.ranges(source, length):
            for rows, columns in tiles(rule, queries, keys, size):
                seen = visible(rule, rows, columns)
                yield _moved(rows, at - queries[0]), _moved(columns, key_at - keys[0]), seen
            key_at += keys[1] - keys[0]
        at += queries[1] - queries[0]


def _moved(positions: Range, by: int) -> slice:
    return slice(positions[0] + by, positions[1] + by)


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """One tensor of both, so that one message carries them."""
    return torch.cat((k.reshape(-1), v.reshape(-1)))


def _unpack(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return packed[: k.numel()].view(k.shape), packed[k.numel() :].view(v.shape)
