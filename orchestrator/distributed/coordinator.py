"""Votes, broadcasts and a key-value store for the processes of a job, on their CPUs, by torch.distributed.

Both strategies meet through it, each with its own process group for what the devices compute.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.distributed.address import await_listener, reachable
from orchestrator.distributed.heartbeat import Beat, BeatFile, read_beat
from orchestrator.distributed.lane import Lane
from orchestrator.distributed.world import World
from orchestrator.errors import HardwareError
from orchestrator.output import tell

_POLL_SECONDS = 0.05
_SPARE_SECONDS = 15.0


def collective_timeout(timeout_seconds: float) -> timedelta:
    """Return the time after which a collective fails: later than who watches over hangs, and says more of one, ends it.

    Args:
        timeout_seconds: after which a job that does not get on hangs.
    """
    return timedelta(seconds=timeout_seconds + min(_SPARE_SECONDS, timeout_seconds))


class Vote:
    """The result of a vote, already known.

    Args:
        value: the answer.
    """

    def __init__(self, value: int):
        self._value = int(value)

    def result(self) -> int:
        """Return the largest value that a rank voted for. Waits for the ranks that have not voted."""
        return self._value


class ProcessCoordinator:
    """Coordinates the processes of `world`. A single one needs no `meet`.

    Args:
        world: this process among the job's.
        timeout_seconds: how long a process waits for the others, each time.

    Raises:
        HardwareError: no process answers at the address where they are to meet.
    """

    def __init__(self, world: World, timeout_seconds: float):
        self._world, self._timeout = world, timedelta(seconds=timeout_seconds)
        self._patience = collective_timeout(timeout_seconds)
        with self._waiting():
            store = _open_store(world, self._timeout)
            start = _start_of_job(store, world, self._timeout) if world.store_is_kept else f"attempt{world.attempt}"
            self._store = dist.PrefixStore(start, store)
        self._votes: dist.ProcessGroup | None = None
        self._broadcasts = 0
        self._met = False
        kind, _, path = world.store.partition(":")
        # torch's file store only ever grows.
        self._beats = BeatFile(Path(path), world.rank) if kind == "file" else None

    def meet(self, backend: str) -> None:
        """Wait for all processes and make torch's process group of them, for `backend`.

        Raises:
            HardwareError: not all have come in time.
        """
        size, rank = self._world.size, self._world.rank
        if self._met:
            return  # for another strategy of this process
        with self._waiting():
            dist.init_process_group(backend, store=self._store, rank=rank, world_size=size, timeout=self._patience)
            if size > 1:
                # Votes overlap with the step's collectives, so they need a group of their own.
                self._votes = dist.new_group(backend="gloo", timeout=self._patience)
        self._met = True

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, TimeoutError) as error:  # torch's stores and gloo say it each in a class of its own
            world = self._world
            raise HardwareError(
                "the processes of the job did not meet",
                got=f"process {world.rank} of {world.size}, started by {world.engine}, at {world.store}: "
                + str(error).partition("\n")[0],
                allowed=f"all of them within {self._timeout.total_seconds():g} s (hardware.timeout_seconds)",
                fix="look for the error of the one that did not come; the address must be open between the hosts",
            ) from error

    @property
    def was_left(self) -> bool:
        """Whether the processes had met, and torch's process group is there no more: others may end it, too."""
        return self._met and not dist.is_initialized()

    def leave(self) -> None:
        """Leave torch's process group; the next `coordinator_of` meets the others anew."""
        if _current.get(self._world) is self:
            del _current[self._world]
        if dist.is_initialized():
            dist.destroy_process_group()

    def start_vote(self, value: int) -> Vote:
        """Start the vote for the largest `value` of all ranks, without waiting for the answer."""
        return Vote(value) if self._votes is None else _GroupVote(value, self._votes)

    def broadcast(self, text: str, src: int = 0) -> str:
        """Return the text of rank `src`; all ranks call it, in the same order.

        Args:
            text: that of `src` counts.
            src: the rank whose text it is.
        """
        if self._world.size == 1:
            return text
        self._broadcasts += 1
        key = f"broadcast{self._broadcasts}"
        if self._world.rank == src:
            self._store.set(key, text)
        return self._store.get(key).decode()

    def put(self, key: str, text: str) -> None:
        """Publish `text` to all ranks under a key that is used once.

        Args:
            key: used once.
            text: the value.
        """
        self._store.set(key, text)

    def get_now(self, key: str) -> str | None:
        """Return what a rank has published under `key`, or None. Does not wait."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def count(self, key: str) -> int:
        """Which process this is to count itself under `key`, from 1 on."""
        return int(self._store.add(key, 1))

    def beat(self, text: str) -> None:
        """Publish this process's sign of life. Any thread may call it.

        Args:
            text: the value.
        """
        if self._beats is not None:
            self._beats.write(text)
        elif self._world.store:
            self._store.set(f"beat{self._world.rank}", text)

    def beat_of(self, rank: int) -> Beat | None:
        """Return the last sign of life of a process; None where there is none yet.

        Args:
            rank: of the process.
        """
        kind, _, path = self._world.store.partition(":")
        if kind == "file":
            return read_beat(Path(path), rank)
        text = self.get_now(f"beat{rank}")
        return Beat.from_text(text) if text else None

    def open_lane(self) -> Lane:
        """Open a way for bytes between the processes, for one thread of each. All ranks call it, in the same order."""
        size = self._world.size
        return Lane(self._world.rank, size, dist.new_group(backend="gloo", timeout=self._timeout) if size > 1 else None)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self._votes is not None:
            dist.barrier(group=self._votes)


_current: dict[World, ProcessCoordinator] = {}


def coordinator_of(world: World, timeout_seconds: float) -> ProcessCoordinator:
    """Return the coordinator of this process; the strategies that follow each other in a process share it.

    Args:
        world: this process among the job's.
        timeout_seconds: how long a process waits for the others, where there is none yet.

    Raises:
        HardwareError: nobody answers where the processes are to meet.
    """
    known = _current.get(world)
    if known is None or known.was_left:
        known = _current[world] = ProcessCoordinator(world, timeout_seconds)
    return known


class _GroupVote(Vote):
    def __init__(self, value: int, group: dist.ProcessGroup):
        self._votes = torch.tensor([int(value)])
        self._work = dist.all_reduce(self._votes, dist.ReduceOp.MAX, group=group, async_op=True)

    def result(self) -> int:
        self._work.wait()
        return int(self._votes.item())


def _open_store(world: World, timeout: timedelta) -> dist.Store:
    kind, _, rest = world.store.partition(":")
    if kind == "file":
        return dist.FileStore(rest, world.size)
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        say = _warn if world.local_rank == 0 else lambda text: None
        host = reachable(host.strip("[]"), os.environ, timeout.total_seconds(), say)
        master = world.rank == 0 and not world.store_is_kept
        if not master:
            # torch would print its C++ frames for every attempt.
            await_listener(host, int(port), timeout.total_seconds())
        return dist.TCPStore(host, int(port), world.size, is_master=master, timeout=timeout, wait_for_workers=False)
    return dist.HashStore()


def _warn(text: str) -> None:
    tell(text, level=logging.WARNING)


def _start_of_job(store: dist.Store, world: World, timeout: timedelta) -> str:
    """Agree on a name for this start of the job, where the store has seen other starts.

    The first process makes the name up and greets each other one by it. One that reads the name of an earlier start
    is not greeted, as its first process is gone, and reads again.
    """
    if world.rank == 0:
        name = uuid.uuid4().hex
        store.set("start", name)
        for rank in range(1, world.size):
            store.set(f"{name}/greeting{rank}", store.get(f"{name}/hello{rank}").decode())
        return name
    mine = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    name, greeting = "", ""
    while time.monotonic() < deadline:
        if (read := store.get("start").decode()) != name:
            name, greeting = read, f"{read}/greeting{world.rank}"
            store.set(f"{name}/hello{world.rank}", mine)
        if store.check([greeting]) and store.get(greeting).decode() == mine:
            return name
        time.sleep(_POLL_SECONDS)
    raise RuntimeError("the first process did not answer in time")
