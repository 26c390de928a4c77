"""Attention tile by tile on one rank, for models whose scores are bounded: there is no kernel for them."""

from __future__ import annotations

from torch import Tensor

from orchestrator.models.attention import AttentionCore
from orchestrator.models.mask import CausalMask
from orchestrator.models.protocol import ShardableModel, attention_cores
from orchestrator.strategies.ring_attention import RingAttentionCore, SequenceRing
from orchestrator.strategies.sequence_order import SequenceOrder


class TiledAttentionCore(RingAttentionCore):
    """Attention of one rank to its own keys: a ring of one.

    Args:
        core: that it takes the place of.
    """

    def __init__(self, core: AttentionCore):
        super().__init__(core, SequenceRing(None, SequenceOrder(1)))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask | Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Attend; arguments and result as `AttentionCore`, but `mask` is the rule instead of the tensor.

        Where rows of a cache differ it is the tensor.
        """
        if isinstance(mask, Tensor) or mask.past:  # few queries, behind those of a cache
            whole = mask if isinstance(mask, Tensor) else mask.whole()
            return self.core(q, k, v, whole, *(() if sinks is None else (sinks,)))
        return super().forward(q, k, v, mask, sinks)


def attend_in_tiles(model: ShardableModel) -> None:
    """Let a model whose scores are bounded attend tile by tile; whole ones would take T x T elements.

    Args:
        model: on the meta device; one with other scores, or with dropout, which is not drawn here, stays as it is.
    """
    cores = list(attention_cores(model))
    if all(type(core) is AttentionCore and core.softcap is not None and not core.dropout for _, _, core in cores):
        model.make_mask = CausalMask
        for parent, name, core in cores:
            setattr(parent, name, TiledAttentionCore(core))
