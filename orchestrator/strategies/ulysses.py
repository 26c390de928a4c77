"""Ulysses: between the ranks of a context group heads are exchanged for positions before attention, and back after it.

A rank then has some heads of the whole sequence, and attends by itself. Source: Jacobs et al. 2023, "DeepSpeed
Ulysses".
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

from orchestrator.errors import LayoutError
from orchestrator.models.attention import AttentionCore
from orchestrator.models.mask import CausalMask
from orchestrator.strategies.block_attention import Scores
from orchestrator.strategies.ring_attention import SequenceRing, local_sinks, ring_attend, scores_of
from orchestrator.strategies.sequence_order import SequenceOrder


class UlyssesAttentionCore(nn.Module):
    """Attention of this rank's heads over the whole sequence, for queries of which every rank has a part.

    Args:
        core: that attends, where it needs no mask. Otherwise scores are computed tile by tile, as by a ring of one.
        group: the ranks of the sequence, in its order.
        tile: queries and keys whose scores exist at one time.
    """

    def __init__(self, core: AttentionCore, group: dist.ProcessGroup, tile: tuple[int, int] = Scores.tile):
        super().__init__()
        self.core, self.group, self.tile = core, group, tile

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask, sinks: Tensor | None = None) -> Tensor:
        """Attend; arguments and result as `AttentionCore`, but `mask` is the rule of the whole sequence."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        k, v = (_repeated(tensor, q.shape[1], size) for tensor in (k, v))
        q, k, v = self._to_heads(q, k, v)
        if sinks is not None:
            sinks = local_sinks(sinks).chunk(size)[rank]
        return self._to_positions(self._attend(q, k, v, mask, sinks))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask, sinks: Tensor | None) -> Tensor:
        if mask.documents is None and mask.window is None and self.core.softcap is None:
            out: Tensor = self.core(q, k, v, None) if sinks is None else self.core(q, k, v, None, sinks)
            return out
        return ring_attend(
            q, k, v, sinks, mask, SequenceRing(None, SequenceOrder(1)), scores_of(self.core, q, self.tile)
        )

    def _to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """[B, H, T / c, d] each -> [B, H / c, T, d]; one collective carries all."""
        size = dist.get_world_size(self.group)
        # [c, B, H / c, T / c, d]: what goes to each rank.
        cut = [tensor.unflatten(1, (size, -1)).movedim(1, 0) for tensor in tensors]
        shapes = [tensor.shape[1:] for tensor in cut]
        got = self._exchange(torch.cat([tensor.flatten(1) for tensor in cut], 1))
        parts = got.split([math.prod(shape) for shape in shapes], 1)
        whole = [part.unflatten(1, shape).movedim(0, 2) for part, shape in zip(parts, shapes, strict=True)]
        return [tensor.flatten(2, 3) for tensor in whole]

    def _to_positions(self, out: Tensor) -> Tensor:
        """[B, H / c, T, d] -> [B, H, T / c, d]."""
        size = dist.get_world_size(self.group)
        got = self._exchange(out.unflatten(2, (size, -1)).movedim(2, 0))
        return got.movedim(0, 1).flatten(1, 2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """Send the i-th of `parts` to rank i; return what every rank has sent here."""
        sizes = [1] * parts.shape[0]
        return funcol.wait_tensor(funcol.all_to_all_single_autograd(parts.contiguous(), sizes, sizes, self.group))


def _repeated(k: Tensor, heads: int, size: int) -> Tensor:
    """Repeat key heads so that every rank has one where there are fewer than ranks."""
    if k.shape[1] % size == 0 and heads % size == 0:
        return k
    if size % k.shape[1] or heads % size:
        raise LayoutError(
            "heads do not divide over the ranks of a sequence",
            got=f"{heads} query heads and {k.shape[1]} key heads of a rank, layout.context={size}",
            allowed="query heads a multiple of layout.context; key heads a multiple or a divisor of it",
            fix="lower layout.context, or set layout.context_kind=ring",
        )
    return k.repeat_interleave(size // k.shape[1], 1)
