"""What the processes of a job decide together, on their CPUs: votes, agreements and a board, by torch.distributed.

Both strategies meet through it, each with its own process group for what the devices compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from orchestrator.errors import HardwareError
from orchestrator.hardware.world import World


class Vote:
    """The answer to a vote, already known."""

    def __init__(self, flag: bool):
        self._flag = flag

    def result(self) -> bool:
        """Whether any rank raised its flag. Waits for the ranks that have not voted."""
        return self._flag


class Council:
    """The processes of `world`. A single one needs no `meet`.

    Args:
        timeout_seconds: how long a process waits for the others, each time.

    Raises:
        HardwareError: nobody answers where the processes are to meet.
    """

    def __init__(self, world: World, timeout_seconds: float):
        self._world, self._timeout = world, timedelta(seconds=timeout_seconds)
        with self._waiting():
            self._store = dist.PrefixStore(f"attempt{world.attempt}", _open_store(world, self._timeout))
        self._votes: dist.ProcessGroup | None = None
        self._agreements = 0

    def meet(self, backend: str) -> None:
        """Wait for all processes and make torch's process group of them, for `backend`.

        Raises:
            HardwareError: not all have come in time.
        """
        size, rank = self._world.size, self._world.rank
        with self._waiting():
            dist.init_process_group(backend, store=self._store, rank=rank, world_size=size, timeout=self._timeout)
            if size > 1:
                # Votes overlap with the step's collectives, so they need a group of their own.
                self._votes = dist.new_group(backend="gloo", timeout=self._timeout)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of torch's stores and of gloo, which say it each in its own class
            world = self._world
            raise HardwareError(
                "the processes of the job did not meet",
                got=f"process {world.rank} of {world.size}, started by {world.engine}, at {world.store}: "
                + str(error).partition("\n")[0],
                allowed=f"all of them within {self._timeout.total_seconds():g} s (hardware.timeout_seconds)",
                fix="look for the error of the one that did not come; the address must be open between the hosts",
            ) from error

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def start_vote(self, flag: bool) -> Vote:
        return Vote(flag) if self._votes is None else _GroupVote(flag, self._votes)

    def agree(self, text: str) -> str:
        if self._world.size == 1:
            return text
        self._agreements += 1
        key = f"agree{self._agreements}"
        if self._world.rank == 0:
            self._store.set(key, text)
        return self._store.get(key).decode()

    def post(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def look(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def barrier(self) -> None:
        if self._votes is not None:
            dist.barrier(group=self._votes)


class _GroupVote(Vote):
    def __init__(self, flag: bool, group: dist.ProcessGroup):
        self._votes = torch.tensor([int(flag)])
        self._work = dist.all_reduce(self._votes, dist.ReduceOp.MAX, group=group, async_op=True)

    def result(self) -> bool:
        self._work.wait()
        return bool(self._votes.item())


def _open_store(world: World, timeout: timedelta) -> dist.Store:
    kind, _, rest = world.store.partition(":")
    if kind == "file":
        return dist.FileStore(rest, world.size)
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        # torchrun's agent holds the store at this address already; elsewhere rank 0 opens it.
        master = world.rank == 0 and world.engine != "torchrun"
        return dist.TCPStore(host, int(port), world.size, is_master=master, timeout=timeout, wait_for_workers=False)
    return dist.HashStore()
