"""The batches of an island: what the hub leases to it, read ahead as those of any run."""

from __future__ import annotations

import collections
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.stream import Batch, Position, StepLoader, TokenStream
from orchestrator.islands.island_messages import Lease
from orchestrator.islands.ledger import Range
from orchestrator.training.island_exchange import LeavingError


@dataclass(frozen=True)
class LeasePosition:
    """Where an island is in its leases.

    Attributes:
        step: inner steps completed.
        lease: number of the lease that comes next, or that is under way.
        done: its steps that are completed.
        sequences: that the island has trained on.
    """

    step: int = 0
    lease: int = 0
    done: int = 0
    sequences: int = 0


class IslandLoader(StepLoader):
    """The share of one data rank of the steps that an island is given.

    Args:
        stream: the training sequences.
        global_batch: sequences of a step of the run.
        data_rank: number of this share.
        data_world: number of shares.
        prefetch: steps that are read ahead.
        ask: returns a lease of a number; waits for it.
        wait: returns what a future has, on all ranks or on none; raises `LeavingError`.

    Attributes:
        ended: the lease behind the last one; None as long as there are more.
        left: the signal by which the island was asked to stop while it waited for a lease; 0: it was not.
    """

    def __init__(
        self,
        stream: TokenStream,
        global_batch: int,
        data_rank: int,
        data_world: int,
        prefetch: int,
        ask: Callable[[int], Lease],
        wait: Callable[[Future[Any]], Any] = Future.result,
    ):
        super().__init__(stream, global_batch * data_world, data_rank, data_world, Position(), 0, prefetch)
        self.global_batch = global_batch
        self._ask, self._wait = ask, wait
        self.ended: Lease | None = None
        self.left = 0
        self._begin = LeasePosition()
        self._leases: dict[int, Lease] = {}
        self._firsts: list[tuple[int, int]] = []  # inner step with which a lease begins, and its number

    def begin(self, at: LeasePosition) -> None:
        """Begin there.

        Args:
            at: position of the island.
        """
        self._begin, self.start = at, Position(at.step, 0, at.sequences * self.stream.seq_len)
        self._firsts, self._leases, self.ended = [(at.step - at.done, at.lease)], {}, None

    def __len__(self) -> int:
        return 1 << 62

    def __iter__(self) -> Iterator[Batch]:
        source, pool = self._batches(), ThreadPoolExecutor(1, thread_name_prefix="island-loader")
        ahead = collections.deque(pool.submit(next, source, None) for _ in range(max(1, self.prefetch)))
        step, left = self._begin.step, 0  # batches of the lease that are left
        try:
            while True:
                # Only between two leases the hub may let the island wait.
                batch = ahead[0].result() if left else self._wait(ahead[0])
                if batch is None:
                    return
                ahead.popleft()
                ahead.append(pool.submit(next, source, None))
                if batch and not left:
                    lease, index = self.lease_at(step)
                    left = len(lease.steps) - index
                step, left = step + bool(batch), max(0, left - 1)
                yield batch
        except LeavingError as leaving:
            self.left = leaving.number
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self) -> Iterator[Batch]:
        number, done, step = self._begin.lease, self._begin.done, self._begin.step
        while True:
            lease = self._leases[number] = self._ask(number)
            if not lease.steps and lease.versions:
                self.ended = lease
                return
            if not lease.steps:
                yield {}
            for _ in lease.steps[done:]:
                yield self.step(step)
                step += 1
            number, done = number + 1, 0
            if self._firsts[-1][0] == step:
                self._firsts[-1] = (step, number)
            else:
                self._firsts.append((step, number))

    # --- which lease -------------------------------------------------------------------------------------

    def lease_at(self, step: int) -> tuple[Lease, int]:
        """Return the lease of an inner step, and which of its steps that is.

        Args:
            step: inner steps completed before.
        """
        first, number = self._firsts[bisect_right(self._firsts, (step, 1 << 62)) - 1]
        return self._leases[number], step - first

    def paused(self, step: int, after: int) -> Lease | None:
        """Return the lease without steps that comes before an inner step, if that is what comes next.

        Args:
            step: inner steps completed.
            after: number of the last lease that was dealt with.
        """
        lease = self._leases.get(after + 1)
        return lease if lease is not None and not lease.steps and not lease.versions else None

    def step(self, step: int) -> Batch:
        """Return this rank's share of one inner step; rows behind those that are leased have no targets."""
        lease, index = self.lease_at(step)
        rows = [row for start, stop in lease.steps[index].rows for row in range(start, stop)]
        filled = rows + [rows[0] if rows else 0] * (max(lease.rows, len(rows)) - len(rows))
        mine = filled[self.data_rank :: self.data_world]
        real = len(rows[self.data_rank :: self.data_world])
        batch = self.stream.batch(mine)
        batch["targets"][real:] = IGNORE_INDEX
        if len(self.stream.windows) > 1:
            sources = np.array([[self.stream.locate(index)[0]] for index in mine], dtype=np.int32)
            batch["sources"] = np.repeat(sources, self.stream.seq_len, axis=1)
        return batch

    def position(self, step: int) -> LeasePosition:
        """Return where the island is after so many inner steps.

        Args:
            step: inner steps completed.
        """
        sequences = self._sequences(step)
        if step == self._begin.step:
            return LeasePosition(step, self._begin.lease, self._begin.done, sequences)
        lease, index = self.lease_at(step - 1)
        done = index + 1
        if done == len(lease.steps):
            return LeasePosition(step, lease.lease + 1, 0, sequences)
        return LeasePosition(step, lease.lease, done, sequences)

    def forget_before(self, number: int) -> None:
        """Forget leases that are done with.

        Args:
            number: of the first one that is kept.
        """
        ahead = [at for at, (_, lease) in enumerate(self._firsts) if lease < number]
        if len(ahead) > 1:
            step = self._firsts[ahead[-1]][0]
            sequences = self._sequences(step)
            self._begin = LeasePosition(step, self._firsts[ahead[-1]][1], 0, sequences)
            self._firsts = self._firsts[ahead[-1] :]
            self._leases = {key: lease for key, lease in self._leases.items() if key >= self._begin.lease}

    # --- what others ask ----------------------------------------------------------------------------------

    def _ranges(self, step: int) -> Iterator[Range]:
        for at in range(self._begin.step, step):
            lease, index = self.lease_at(at)
            yield from lease.steps[index].rows

    def _sequences(self, step: int) -> int:
        return self._begin.sequences + sum(stop - start for start, stop in self._ranges(step))

    def tokens_after(self, step: int) -> int:
        """Return the tokens that this island was trained on after so many inner steps."""
        return self._sequences(step) * self.stream.seq_len

    def first(self, step: int) -> int:
        """Return the first sequence of a step."""
        lease, index = self.lease_at(step)
        rows = lease.steps[index].rows if index < len(lease.steps) else ()
        return rows[0][0] if rows else 0

    def taken(self, step: int) -> tuple[int, ...]:
        """Return how many sequences of each store this start of the island was trained on."""
        found = [0] * len(self.stream.windows)
        for start, stop in self._ranges(step):
            upto = zip(self.stream.counts(stop), self.stream.counts(start), strict=True)
            found = [number + high - low for number, (high, low) in zip(found, upto, strict=True)]
        return tuple(found)

    def state(self, step: int) -> dict[str, Any]:
        """Return the position after so many inner steps, for JSON."""
        at = self.position(step)
        return {
            "next_sequence": at.sequences,
            "tokens": at.sequences * self.stream.seq_len,
            "fingerprint": self.stream.fingerprint,
            "facts": self.stream.facts,
            "lease": [at.step, at.lease, at.done, at.sequences],
        }


def lease_position(state: Mapping[str, Any]) -> LeasePosition:
    """Return the position that the state of an island's checkpoint says.

    Args:
        state: of the checkpoint.
    """
    return LeasePosition(*(int(number) for number in state["data"]["lease"]))
