"""Context parallelism: each rank of a context group holds a part of every sequence.

Three ways, `layout.context_kind`, in which its queries meet the keys of the others:

- `gather`: keys and values are gathered over the group; the backward pass reduce-scatters their gradients. The mask
  has the rank's rows and is built from the whole sequence's documents.
- `ring`: keys and values travel round the group, `strategies.ring_attention`.
- `ulysses`: heads are exchanged for positions, `strategies.ulysses`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.config.schema import ContextKind
from orchestrator.errors import LayoutError
from orchestrator.models.attention import AttentionCore
from orchestrator.models.loss import positions_of
from orchestrator.models.mask import CausalMask
from orchestrator.models.protocol import Mask, ShardableModel, attention_cores
from orchestrator.strategies.ring_attention import RingAttentionCore, SequenceRing
from orchestrator.strategies.sequence_order import SequenceOrder, gather
from orchestrator.strategies.ulysses import UlyssesAttentionCore

_SEQUENCE_DIM = 2  # of keys and values [B, H, T, head_dim]


def parallelize_context(
    model: ShardableModel, group: dist.ProcessGroup, kind: ContextKind, order: SequenceOrder
) -> None:
    """Let `model`, which will get its part of each sequence, attend over the whole of it.

    Args:
        model: on the meta device.
        group: the ranks that hold the parts of the same sequences.
        kind: how the parts attend to each other.
        order: which part each rank holds.

    Raises:
        LayoutError: it has no attention core in which positions meet, or one that this kind cannot replace.
    """
    cores = list(attention_cores(model))
    if not cores:
        raise LayoutError(
            "sequences cannot be split: the model has no attention core where their positions meet",
            got=f"{type(model).__name__} with layout.context > 1",
            fix="let its attention call an orchestrator.models.attention.AttentionCore, or set layout.context=1",
        )
    model.make_mask = _mask_maker(group, order, whole=kind != "gather")
    for parent, name, core in cores:
        if kind == "gather":
            core.register_forward_pre_hook(_gather_keys(group))
        else:
            check_core(core, kind)
            ours = (
                UlyssesAttentionCore(core, group)
                if kind == "ulysses"
                else RingAttentionCore(core, SequenceRing(group, order))
            )
            setattr(parent, name, ours)
    ops = model.head.ops
    parts = ops.logits

    def logits(hidden: Tensor, weight: Tensor, at: Tensor | None) -> Tensor:
        return positions_of(order.restore(gather(parts(hidden, weight, None), group, dim=1)), at)

    model.head.ops = replace(ops, logits=logits)


def check_core(core: AttentionCore, kind: ContextKind) -> None:
    """Check that a kind which computes attention itself knows what `core` computes.

    Args:
        core: of the model.
        kind: `ring` or `ulysses`.

    Raises:
        LayoutError: it is a class of its own, or draws dropout.
    """
    if type(core) is not AttentionCore or core.dropout > 0.0:
        raise LayoutError(
            f"layout.context_kind={kind} computes attention itself, and not as this model does",
            got=type(core).__name__ + (f" with dropout {core.dropout:g}" if core.dropout > 0.0 else ""),
            allowed="orchestrator.models.attention.AttentionCore without dropout",
            fix="set layout.context_kind=gather",
        )


def _mask_maker(group: dist.ProcessGroup, order: SequenceOrder, whole: bool) -> Callable[..., Mask]:
    """Return a model's `make_mask`: the rule of the `whole` sequence, or the mask of this rank's rows."""
    rank = dist.get_rank(group)

    def make_mask(
        *, queries: int, past: int, documents: Tensor | None, window: int | None, device: torch.device
    ) -> Mask:
        if documents is not None:
            documents = order.restore(gather(documents, group, dim=1))
        length = queries * order.ranks
        rule = CausalMask(queries=length, past=past, documents=documents, window=window, device=device)
        # Only this rank's rows: the whole mask of a sequence of 128k tokens would take 16 GiB.
        return rule if whole else rule.part((rank * queries, (rank + 1) * queries), (0, past + length))

    return make_mask


def _gather_keys(group: dist.ProcessGroup) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        q, k, v, mask, *sinks = args
        # One collective for both: each is a latency, not a bandwidth.
        both = gather(torch.cat((k, v), -1), group, _SEQUENCE_DIM)
        return (q, *both.split((k.shape[-1], v.shape[-1]), -1), mask, *sinks)

    return hook
