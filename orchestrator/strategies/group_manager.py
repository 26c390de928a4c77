"""The replica groups of a run, as one process sees them: who takes part in a step, sums over them, and the verdict.

torchft's Manager does the work. It agrees by the lighthouse which groups take part (a quorum), makes a process group of
each rank's counterparts in them, and lets all ranks of a group judge alike whether a step counts.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torchft.manager import Manager
from torchft.process_group import ProcessGroup, ProcessGroupGloo, ProcessGroupNCCL

from orchestrator.distributed.replica_group import ReplicaGroup
from orchestrator.errors import LostPeerError
from orchestrator.strategies.group_transport import RUN, ShardTransport

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
WAITING, TRAINING = 1, 2  # states of a group; one that trains has as much more as steps, so that the senior is known


@dataclass(frozen=True)
class Gathered:
    """Who takes part in a step.

    Attributes:
        states: of each group: 0 where it is not there, WAITING, or TRAINING and the steps since it came.
        stop: the signal that asked some group to stop; 0 where none did.
        ending: the run is being concluded.
    """

    states: tuple[int, ...]
    stop: int
    ending: bool

    @property
    def present(self) -> tuple[int, ...]:
        """Numbers of the groups that take part."""
        return tuple(number for number, state in enumerate(self.states) if state)

    @property
    def leader(self) -> int:
        """The group that speaks and saves: the one that trains for longest, of several the first."""
        return max(range(len(self.states)), key=lambda number: (self.states[number], -number))

    @property
    def trains(self) -> bool:
        """Whether one of them trains."""
        return max(self.states) >= TRAINING


class GroupManager:
    """This process's part in torchft. All ranks of a group call the methods together, in the same order.

    Args:
        group: this process's.
        count: groups of the run.
        rank: of this process in its group.
        size: of its group.
        tell: gives all ranks of the group a text of rank 0.
        device: of the tensors that are summed.
        timeout_seconds: how long one group waits for another.
        save: returns what a group that comes back needs.
        load: takes that over.
    """

    def __init__(
        self,
        group: ReplicaGroup,
        count: int,
        rank: int,
        size: int,
        tell: Callable[[str], str],
        device: torch.device,
        timeout_seconds: float,
        save: Callable[[], dict[str, Any]],
        load: Callable[[dict[str, Any]], None],
    ):
        # It logs whole tracebacks of what is part of its work; the run says in its own words who has gone.
        logging.getLogger("torchft").setLevel(logging.CRITICAL)
        # A group that hangs is given up by its own processes first; the others wait for that.
        address, seconds = group.address(timeout_seconds), timedelta(seconds=timeout_seconds)
        host = "127.0.0.1" if urlsplit(address).hostname in _LOOPBACK else socket.gethostname()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
        port = int(tell(str(self._store.port if self._store else 0)))
        self._group, self._count, self._device = group, count, device
        reduces: ProcessGroup = ProcessGroupNCCL(seconds) if device.type == "cuda" else ProcessGroupGloo(seconds)
        with _lighthouse_asked(address):
            self._manager = Manager(
                reduces,
                min_replica_size=1,
                # The state is sent while nothing is computed: FSDP2 would gather and free units under it.
                use_async_quorum=False,
                # All groups draw the same initial weights.
                init_sync=False,
                timeout=seconds,
                quorum_timeout=4 * seconds,
                connect_timeout=seconds,
                rank=rank,
                world_size=size,
                store_addr=tell(host),
                store_port=port,
                lighthouse_addr=address,
                replica_id=f"group-{group.number:05d}",
                hostname=host,
                checkpoint_transport=ShardTransport(reduces, device),
                load_state_dict=None,
                state_dict=None,
            )
        self._manager.register_state_dict_fn(RUN, load, save)
        self._address, self._reduces = address, reduces

    @property
    def step(self) -> int:
        """Optimizer steps completed."""
        return self._manager.current_step()

    @step.setter
    def step(self, step: int) -> None:
        """Say that `step` are completed."""
        self._manager.load_state_dict({"step": step, "batches_committed": 0})

    def meet(self) -> int:
        """Agree on who takes part; one that is behind is given the state. Returns the number of groups.

        Raises:
            LostPeerError: the lighthouse does not answer.
        """
        with _lighthouse_asked(self._address):
            self._manager.start_quorum()
        return int(self._manager.num_participants())

    def greet(self, state: int, stop: int, ending: bool) -> Gathered:
        """Tell the groups that take part the state of this one, and hear theirs. Worth nothing where it has `failed`.

        Args:
            state: WAITING, or TRAINING and more.
            stop: the signal that asks this process to stop, or 0.
            ending: this group concludes the run.
        """
        told = torch.zeros(2 + self._count, dtype=torch.int64, device=self._device)
        told[0], told[1], told[2 + self._group.number] = stop, int(ending), state
        self._manager.allreduce(told, reduce_op=dist.ReduceOp.MAX).wait()
        heard = told.tolist()
        return Gathered(tuple(heard[2:]), heard[0], bool(heard[1]))

    def sum(self, values: list[Tensor]) -> None:
        """Add up each of `values` over the groups, in place. Worth nothing where it has `failed`.

        Args:
            values: of this process.
        """
        # All are under way before the first is waited for.
        for work in [self._manager.allreduce(value, reduce_op=dist.ReduceOp.SUM) for value in values]:
            work.wait()

    @property
    def failed(self) -> bool:
        """Whether something since `meet` has failed on this rank, because a group has gone."""
        return self._manager.errored() is not None

    def commit(self) -> bool:
        """Return whether the step counts: nothing has failed on any rank of this group. If so, it is completed.

        If not, the counterparts in other groups, who may wait for this one, notice at once; `meet` connects all anew.
        """
        counts = bool(self._manager.should_commit())
        if not counts:
            self._reduces.abort()
        return counts

    def close(self) -> None:
        """Leave the groups."""
        self._manager.shutdown(wait=False)


class _lighthouse_asked:
    """Within it an error of the lighthouse's client is one of a lost process."""

    def __init__(self, address: str):
        self._address = address

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (RuntimeError, TimeoutError)):
            raise LostPeerError(
                "this process cannot agree with the replica groups on who takes part",
                got=f"{str(error).partition(chr(10))[0]} (by the manager of its group, and lighthouse {self._address})",
                fix="look for what the first process of the group, the lighthouse and the other groups say",
            ) from error
