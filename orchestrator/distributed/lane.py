"""Bytes from the memory of one process of a job to that of another, beside the training."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist


class Lane:
    """A gloo group of its own, so that one thread can use it whatever the training does. All ranks call alike.

    Args:
        rank: of this process.
        size: processes of the job.
        group: of all of them; None for a process that is alone.
    """

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None = None):
        assert size == 1 or group is not None
        self.rank, self.size, self._group = rank, size, group

    def exchange(self, mine: bytes, merge: Callable[[list[bytes]], bytes]) -> bytes:
        """Gather the bytes of each rank on rank 0, merge them there, and give the result to every rank.

        Args:
            mine: of this rank.
            merge: called on rank 0 with what the ranks gave, in their order. It must not raise: the others wait.
        """
        if self.size == 1:
            return merge([mine])
        return self.broadcast(merge(parts) if (parts := self._gather(mine)) else b"")

    def broadcast(self, content: bytes, source: int = 0) -> bytes:
        """Return the bytes of rank `source` on every rank.

        Args:
            content: that of `source` counts.
            source: the rank whose content it is.
        """
        if self.size == 1:
            return content
        length = torch.tensor([len(content)])
        dist.broadcast(length, source, group=self._group)
        data = _bytes(content) if self.rank == source else torch.empty(int(length), dtype=torch.uint8)
        if len(data):
            dist.broadcast(data, source, group=self._group)
        return content if self.rank == source else data.numpy().tobytes()

    def transfer(self, sends: Mapping[int, memoryview], receives: Mapping[int, memoryview]) -> None:
        """Send and receive at the same time; each receiver knows how much comes.

        Args:
            sends: writable memory with what each rank is to get.
            receives: memory to fill with what comes from each rank.
        """
        works = [dist.isend(_view(data), rank, group=self._group) for rank, data in sends.items() if len(data)]
        works += [dist.irecv(_view(into), rank, group=self._group) for rank, into in receives.items() if len(into)]
        for work in works:
            assert work is not None, "every rank belongs to the group"
            work.wait()

    def _gather(self, mine: bytes) -> list[bytes]:
        """Return the bytes of all ranks on rank 0, nothing on the others."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]), group=self._group)
        if self.rank:
            self.transfer({0: memoryview(bytearray(mine))}, {})
            return []
        parts = [bytearray(int(length)) for length in lengths]
        self.transfer({}, {rank: memoryview(part) for rank, part in enumerate(parts) if rank})
        return [mine, *(bytes(part) for part in parts[1:])]


def _bytes(content: bytes) -> torch.Tensor:
    return _view(memoryview(bytearray(content))) if content else torch.empty(0, dtype=torch.uint8)


def _view(memory: memoryview) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)


def pack(header: bytes, files: Mapping[str, bytes]) -> bytes:
    """Put a header and files by name into one message, which `unpack` takes apart.

    Args:
        header: any bytes.
        files: content by name.
    """
    parts = [header, *(part for name, content in files.items() for part in (name.encode(), content))]
    return b"".join(struct.pack("<q", len(part)) + part for part in parts)


def unpack(message: bytes) -> tuple[bytes, dict[str, bytes]]:
    """Return header and files of a message.

    Args:
        message: what `pack` returned.
    """
    parts, offset = [], 0
    while offset < len(message):
        (length,) = struct.unpack_from("<q", message, offset)
        parts.append(message[offset + 8 : offset + 8 + length])
        offset += 8 + length
    names = [name.decode() for name in parts[1::2]]
    return parts[0], dict(zip(names, parts[2::2], strict=True))
