"""Copies of one part of a tensor, on several devices: whether they hold the same bits, and which device does not."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.distributed.lane import Lane

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMED = 4  # tensors that are listed


@dataclass(frozen=True)
class HeldPart:
    """A part of a tensor, as one device holds it.

    Attributes:
        name: of the tensor.
        slices: which part, one slice per dim.
        device: that holds it.
        data: its elements.
    """

    name: str
    slices: tuple[slice, ...]
    device: str
    data: Tensor

    @property
    def key(self) -> str:
        """What is the same for all copies of the part."""
        return f"{self.name}[{', '.join(f'{part.start}:{part.stop}' for part in self.slices)}]"


@dataclass(frozen=True)
class ReplicaComparison:
    """The result of comparing copies over all processes.

    Attributes:
        compared: parts of more than one element of which there is more than one copy.
        suspects: the devices that hold other bits than most copies; all that hold copies, where there is no majority.
        certain: the suspects are outvoted, everywhere.
        tensors: names of the tensors whose copies differ.
    """

    compared: int
    suspects: tuple[str, ...] = ()
    certain: bool = True
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = f" and {len(self.tensors) - _NAMED} more" if len(self.tensors) > _NAMED else ""
        who = "; ".join(self.suspects)
        which = f"{who}, against the other copies" if self.certain else f"one of: {who}"
        return f"{', '.join(self.tensors[:_NAMED])}{more} on {which}"


def bit_sums(tensors: Sequence[Tensor]) -> list[int]:
    """Sum the bits of each tensor, read as integers of its elements' width: in 64 bits that wrap, in whatever order.

    One flipped bit always changes the sum. Elements that changed places do not.

    Args:
        tensors: of any dtype, on any device; each device is waited for once.
    """
    sums = [0] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        there = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        parts = [_words(tensors[index]).sum(dtype=torch.int64) for index in there]
        for index, total in zip(there, torch.stack(parts).tolist(), strict=True):
            sums[index] = total
    return sums


def _words(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.view(_WORDS[tensor.element_size()]) if tensor.element_size() in _WORDS else torch.view_as_real(tensor)


def compare(parts: Sequence[HeldPart], lane: Lane, host: str) -> ReplicaComparison:
    """Hold the copies of each part against each other, over all processes. All of them call it together.

    Args:
        parts: that the devices of this process hold.
        lane: to the other processes.
        host: name of this one's host.
    """
    sums = bit_sums([part.data for part in parts])
    keys = [int.from_bytes(hashlib.sha256(part.key.encode()).digest()[:8], "little", signed=True) for part in parts]
    table = np.array([keys, sums, [part.data.numel() for part in parts]], dtype=np.int64)
    told = json.loads(lane.exchange(table.tobytes(), _merge))
    if not told["differ"]:
        return ReplicaComparison(told["compared"])
    different = set(told["differ"])
    mine = [
        [part.name, part.key, f"rank {lane.rank} ({host}, {part.device})", total]
        for part, key, total in zip(parts, keys, sums, strict=True)
        if key in different
    ]
    result = json.loads(lane.exchange(json.dumps(mine).encode(), _find))
    suspects, tensors = tuple(result["suspects"]), tuple(result["tensors"])
    return ReplicaComparison(told["compared"], suspects, result["certain"], tensors)


def _merge(tables: list[bytes]) -> bytes:
    """Which parts have copies of other sums, and how many have copies at all."""
    all_of = np.concatenate([np.frombuffer(table, dtype=np.int64).reshape(3, -1) for table in tables], axis=1)
    order = np.lexsort((all_of[1], all_of[0]))
    keys, sums, sizes = all_of[:, order]
    same_key = keys[1:] == keys[:-1]
    differ = np.unique(keys[1:][same_key & (sums[1:] != sums[:-1])])
    compared = np.unique(keys[1:][same_key & (sizes[1:] > 1)])
    return json.dumps({"compared": len(compared), "differ": differ.tolist()}).encode()


def _find(told: list[bytes]) -> bytes:
    """Name the devices that are outvoted, or all where no majority is."""
    copies: dict[str, list[tuple[str, int]]] = {}
    tensors: dict[str, None] = {}
    for name, key, holder, total in _rows(told):
        copies.setdefault(key, []).append((holder, total))
        tensors[name] = None
    suspects, certain = dict[str, None](), True
    for holders in copies.values():
        usual, votes = Counter(total for _, total in holders).most_common(1)[0]
        outvoted = 2 * votes > len(holders)
        certain = certain and outvoted
        suspects |= dict.fromkeys(holder for holder, total in holders if not outvoted or total != usual)
    return json.dumps({"suspects": list(suspects), "certain": certain, "tensors": sorted(tensors)}).encode()


def _rows(told: Iterable[bytes]) -> Iterable[Sequence[Any]]:
    for text in told:
        yield from json.loads(text)


def described(found: ReplicaComparison) -> Mapping[str, Any]:
    """Return a comparison that found something, as JSON data.

    Args:
        found: the comparison.
    """
    return {"suspects": list(found.suspects), "certain": found.certain, "tensors": list(found.tensors)}
