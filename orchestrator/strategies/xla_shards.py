"""Shards of torch_xla's devices: copied to the host, and sent back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch_xla.distributed.spmd as xs
from torch import Tensor

from orchestrator.sharding.shard import Shard

_WHOLE = (xs.ShardingType.REPLICATED, xs.ShardingType.MAXIMAL)


def copied(named: Iterable[tuple[str, Tensor]], main: bool) -> list[Shard]:
    """Copy the shards of this host's devices to the host.

    Args:
        named: global tensors, with their full names.
        main: whether this host writes what every host has.
    """
    shards = []
    for name, tensor in named:
        if tensor.dim() == 0:
            shards.append(Shard(name, (), (), tensor.cpu(), main))
            continue
        for part in xs.wrap_if_sharded(tensor.data).local_shards:
            # What the compiler padded is not part of the tensor, and it cuts uneven dims in its own way.
            slices = slices_of(part.indices, tensor.shape)
            # Copies are numbered over all hosts, and those of a whole tensor by their devices (torch_xla 2.9.0,
            # GetShardReplicaAndIndicesForDevices in csrc/xla_sharding_util.cpp): one host has number 0.
            owned = part.replica_id == 0
            shards.append(Shard(name, tuple(tensor.shape), slices, part.unpadded_data.clone(), owned))
    return shards


def send_back(named: Iterable[tuple[str, Tensor]], shards: Sequence[Shard]) -> None:
    """Send filled shards back to the devices.

    Args:
        named: global tensors, with their full names; those of which there are no shards stay as they are.
        shards: as `copied` gave them.
    """
    parts: dict[str, list[Tensor]] = {}
    for shard in shards:
        parts.setdefault(shard.name, []).append(shard.data)
    for name, tensor in named:
        if name not in parts:
            continue
        wrapped = xs.wrap_if_sharded(tensor.data)
        if tensor.dim() == 0 or wrapped.sharding_type in _WHOLE:
            with torch.no_grad():
                tensor.copy_(parts[name][0])
            continue
        local = wrapped.local_shards
        for part, value in zip(local, parts[name], strict=True):
            part.data = _pad(value, part.data.shape)
        wrapped.load_local_shards_(local)


def slices_of(indices: Any, shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the part of the global tensor that torch_xla's `indices` name; an ellipsis is the whole.

    Args:
        indices: of a shard.
        shape: of the tensor.
    """
    if indices is Ellipsis:
        return tuple(slice(0, size) for size in shape)
    return tuple(slice(min(part.start, size), min(part.stop, size)) for part, size in zip(indices, shape, strict=True))


def _pad(value: Tensor, shape: Sequence[int]) -> Tensor:
    """`value` with zeros behind each dim, up to `shape`."""
    widths: list[int] = []
    for have, want in zip(reversed(value.shape), reversed(shape), strict=True):
        widths += [0, want - have]
    return F.pad(value, widths).contiguous()
