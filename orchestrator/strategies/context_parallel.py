"""Context parallelism: each rank of a context group holds a part of every sequence.

Queries stay where they are, keys and values are gathered over the group (the all-gather variant of context
parallelism; its backward pass reduce-scatters their gradients). The mask has the rank's rows and is built from the
whole sequence's documents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

from orchestrator.errors import LayoutError
from orchestrator.models.mask import CausalMask
from orchestrator.models.protocol import ShardableModel, attention_cores

_SEQUENCE_DIM = 2  # of keys and values [B, H, T, head_dim]


def parallelize_context(model: ShardableModel, group: dist.ProcessGroup) -> None:
    """Let `model`, which will get its part of each sequence, attend over the whole of it.

    Args:
        model: on the meta device.
        group: the ranks that hold the parts of the same sequences.

    Raises:
        LayoutError: it has no attention core in which positions meet.
    """
    cores = [core for _, _, core in attention_cores(model)]
    if not cores:
        raise LayoutError(
            "sequences cannot be split: the model has no attention core where their positions meet",
            got=f"{type(model).__name__} with layout.context > 1",
            fix="let its attention call an orchestrator.models.attention.AttentionCore, or set layout.context=1",
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def make_mask(
        *, queries: int, past: int, documents: Tensor | None, window: int | None, device: torch.device
    ) -> Tensor | None:
        whole = _gather(documents, group, dim=1) if documents is not None else None
        rule = CausalMask(queries=queries * size, past=past, documents=whole, window=window, device=device)
        # Only this rank's rows: the whole mask of a sequence of 128k tokens would take 16 GiB.
        return rule.part((rank * queries, (rank + 1) * queries), (0, past + queries * size))

    model.make_mask = make_mask
    for core in cores:
        core.register_forward_pre_hook(_gather_keys(group))
    ops = model.head.ops
    logits = ops.logits
    model.head.ops = replace(ops, logits=lambda hidden, weight: _gather(logits(hidden, weight), group, dim=1))


def _gather_keys(group: dist.ProcessGroup) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        q, k, v, mask, *sinks = args
        # One collective for both: each is a latency, not a bandwidth.
        both = _gather(torch.stack((k, v)), group, _SEQUENCE_DIM + 1)
        return (q, both[0], both[1], mask, *sinks)

    return hook


def _gather(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Concatenate over the group along `dim`; backward sums the gradients over the group and keeps the rank's part."""
    return funcol.wait_tensor(funcol.all_gather_single_autograd(tensor.contiguous(), dim, group))
