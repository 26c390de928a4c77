"""Bring a replica group that comes back the state of one that has gone on, rank by rank, without pickle.

torchft's own transports pickle what they send. Here the tensors go as raw bytes over the process group that torchft has
just made of the groups, behind a header of JSON that names each of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torchft.checkpointing.transport import CheckpointTransport
from torchft.process_group import ProcessGroup

from orchestrator.errors import RunFailedError
from orchestrator.sharding.shard import Shard

RUN = "run"  # torchft's name for what is sent of the run, beside its own counters
_TAG = 77


class ShardTransport(CheckpointTransport[dict[str, Any]]):
    """Sends shards by name over the groups' process group.

    What is sent is `{"user": {RUN: {"shards": ..., "notes": ...}}, "torchft": ...}`; what comes has `tensors`, a list
    of (name, tensor) in place of the shards.

    Args:
        group: of processes, one of each replica group.
        device: where its tensors are.
    """

    def __init__(self, group: ProcessGroup, device: torch.device):
        self._group, self._device = group, device

    def metadata(self) -> str:
        """Nothing: both sides know the process group."""
        return ""

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:
        """Send the state to those that are behind, one after the other. Returns when it is sent.

        Args:
            dst_ranks: places in the process group.
            step: optimizer steps completed.
            state_dict: as torchft composes it.
            timeout: unused; the process group has its own.
        """
        run = state_dict["user"][RUN]
        shards: Sequence[Shard] = run["shards"]
        about = [[shard.name, str(shard.data.dtype).removeprefix("torch."), list(shard.data.shape)] for shard in shards]
        header = json.dumps({"tensors": about, "notes": run["notes"], "torchft": state_dict["torchft"], "step": step})
        data = torch.frombuffer(bytearray(header.encode()), dtype=torch.uint8)
        for rank in dst_ranks:
            self._send(torch.tensor([len(data)]), rank)
            self._send(data, rank)
            for shard in shards:
                if shard.data.numel():
                    self._send(as_bytes(shard.data), rank)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, Any]:
        """Receive the state that `send_checkpoint` sends, into memory of its own: it may break off in the middle.

        Args:
            src_rank: place in the process group.
            metadata: unused.
            step: that the others have completed.
            timeout: unused.

        Raises:
            RunFailedError: it is the state of another step.
        """
        size = self._receive(torch.zeros(1, dtype=torch.int64), src_rank)
        text = self._receive(torch.empty(int(size), dtype=torch.uint8), src_rank)
        header = json.loads(bytes(text.cpu().numpy()))
        if header["step"] != step:
            raise RunFailedError(
                "a replica group sent the state of another step", got=header["step"], allowed=str(step)
            )
        tensors = []
        for name, dtype, shape in header["tensors"]:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
            if tensor.numel():
                self._receive(as_bytes(tensor), src_rank)
            tensors.append((name, tensor))
        return {"user": {RUN: {"tensors": tensors, "notes": header["notes"]}}, "torchft": header["torchft"]}

    def _send(self, data: Tensor, rank: int) -> None:
        self._group.send([data.to(self._device)], rank, _TAG).wait()

    def _receive(self, into: Tensor, rank: int) -> Tensor:
        here = into.to(self._device)
        self._group.recv([here], rank, _TAG).wait()
        return here


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a flat view of a contiguous tensor's bytes; of another one, of a copy.

    Args:
        tensor: of any type.
    """
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def fill(shards: Sequence[Shard], state: Mapping[str, Any]) -> None:
    """Write what was received into this process's shards.

    Args:
        shards: of this process.
        state: `{"tensors": ...}` as `recv_checkpoint` gives it.

    Raises:
        RunFailedError: the groups do not hold the same tensors.
    """
    ours = [(shard.name, tuple(shard.data.shape), shard.data.dtype) for shard in shards]
    theirs = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state["tensors"]]
    if ours != theirs:
        other = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), (len(ours), len(theirs)))
        raise RunFailedError(
            "the replica groups do not hold the same tensors", got=f"{other[0]} here, {other[1]} there"
        )
    with torch.no_grad():
        for shard, (_, tensor) in zip(shards, state["tensors"], strict=True):
            shard.data.copy_(tensor)
