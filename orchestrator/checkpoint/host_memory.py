"""Snapshots of a run in the memory of its hosts: who shares a memory, and who keeps a copy of whose.

Each host has the files of its own ranks and a copy of those of the host before it, so that one lost host takes nothing
with it. A snapshot is a checkpoint in the one format, whose files may lie in the memories of several hosts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.memory_folder import MemoryFolder
from orchestrator.distributed.lane import Lane
from orchestrator.errors import CheckpointError


@dataclass(frozen=True)
class Hosts:
    """Which ranks share a memory, and which of them send their files where.

    Attributes:
        groups: ranks of each host, in the order of their first ones.
    """

    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, memories: Sequence[str]) -> Hosts:
        """Group ranks by the memory that they see.

        Args:
            memories: its identity, for each rank.
        """
        order = list(dict.fromkeys(memories))
        return cls(tuple(tuple(rank for rank, seen in enumerate(memories) if seen == one) for one in order))

    def host_of(self, rank: int) -> int:
        """Return the number of a rank's host.

        Args:
            rank: of the job.
        """
        return next(host for host, ranks in enumerate(self.groups) if rank in ranks)

    def is_first(self, rank: int) -> bool:
        """Whether a rank is the first one of its host, which does what is done once for each.

        Args:
            rank: of the job.
        """
        return self.groups[self.host_of(rank)][0] == rank

    def peer_of(self, rank: int) -> int | None:
        """Return the rank of the next host that keeps the copy of what `rank` writes; None on a host that is alone.

        Args:
            rank: of the job.
        """
        if len(self.groups) == 1:
            return None
        host = self.host_of(rank)
        there = self.groups[(host + 1) % len(self.groups)]
        return there[self.groups[host].index(rank) % len(there)]

    def kept_by(self, rank: int) -> list[int]:
        """List the ranks whose copies `rank` keeps.

        Args:
            rank: of the job.
        """
        return [other for ranks in self.groups for other in ranks if self.peer_of(other) == rank]


@dataclass(frozen=True)
class HostMemory:
    """The memory of this process's host, for snapshots of one run.

    Attributes:
        folder: of the run there.
        lane: to the other ranks.
        hosts: which ranks share a memory.
    """

    folder: MemoryFolder
    lane: Lane
    hosts: Hosts

    @classmethod
    def open(cls, place: Path, run: str, lane: Lane) -> HostMemory:
        """Open the folder of `run` on all hosts or on none. All ranks call it together.

        Args:
            place: folder of the memory file system.
            run: uuid of the run.
            lane: to the other ranks.

        Raises:
            CheckpointError: a rank cannot; on all of them.
        """
        folder, problem = None, ""
        try:
            folder = MemoryFolder(place, run)
        except CheckpointError as error:
            problem = f"{error.what} ({error.got})"
        told = json.dumps([problem, folder.identity if folder else ""]).encode()
        answers = json.loads(lane.exchange(told, lambda parts: b"[%b]" % b",".join(parts)))
        if found := first_of(text for text, _ in answers):
            if folder is not None:
                folder.release()
            raise CheckpointError(found)
        assert folder is not None
        return cls(folder, lane, Hosts.of([identity for _, identity in answers]))

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.lane.rank

    @property
    def first_here(self) -> bool:
        """Whether this process does what is done once for each host."""
        return self.hosts.is_first(self.rank)

    def agree(self, problem: str) -> str:
        """Return the first problem that a rank has, with its number; empty where none has. All ranks call it.

        Args:
            problem: of this rank.
        """
        return self.lane.exchange(
            problem.encode(), lambda parts: first_of(part.decode() for part in parts).encode()
        ).decode()

    def keep_only(self, name: str | None) -> None:
        """Remove on all hosts every snapshot but one. All ranks call it, and none writes before all are done.

        Args:
            name: of the one to keep; None: none.
        """
        if self.first_here:
            self.folder.keep_only(name)
        self.agree("")


def first_of(problems: Iterable[str]) -> str:
    """Return the first problem that there is, with the rank whose it is.

    Args:
        problems: of the ranks, in their order; empty ones are none.
    """
    return next((f"{text} (rank {rank})" for rank, text in enumerate(problems) if text), "")
