"""HSDP whose copies of the model may be lost and come back: torchft in place of the `replicate` axis.

Each copy is a replica group, a world of its own: its store, its meshes, its votes. Within a group everything is as in
`DTensorStrategy`. What only the step's arithmetic needs goes over the groups: the sums over target tokens, loss and
gradients. A step counts where nothing has failed on the way; otherwise the groups that are left compute it again, as a
mean over the tokens that they have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from orchestrator import stopping
from orchestrator.distributed import standing
from orchestrator.distributed.replica_group import ReplicaGroup
from orchestrator.distributed.world import World
from orchestrator.errors import LostPeerError, RunFailedError
from orchestrator.hardware.target import Target
from orchestrator.models.protocol import ShardableModel
from orchestrator.sharding.layout import Layout
from orchestrator.strategies.dtensor import DTensorStrategy
from orchestrator.strategies.group_manager import TRAINING, WAITING, Gathered, GroupManager
from orchestrator.strategies.group_transport import fill
from orchestrator.strategies.model_copies import Carried, CopyChange
from orchestrator.strategies.parallel_strategy import local_parameters
from orchestrator.strategies.sharded_parts import local_part

T = TypeVar("T")
_BUCKET_ELEMENTS = 16 << 20  # gradients are summed over the groups in buffers of at most so many
_POLL_SECONDS = 0.2


class ReplicaGroupStrategy(DTensorStrategy):
    """See `DTensorStrategy`; its layout is that of one group.

    Args:
        target: the hardware of this process.
        world: this process among those of its group.
        layout: of the whole job; `replicate` is the number of groups.
        precision: of the matrix products.
        group: this process's.
        timeout_seconds: how long processes, and groups, wait for each other.
        options: as `DTensorStrategy` has them.
    """

    def __init__(
        self,
        target: Target,
        world: World,
        layout: Layout,
        precision: str,
        group: ReplicaGroup,
        *,
        timeout_seconds: int = 600,
        **options: Any,
    ):
        super().__init__(
            target, world, replace(layout, replicate=1), precision, timeout_seconds=timeout_seconds, **options
        )
        self._whole, self.group = layout, group
        self._changes: list[CopyChange] = []
        self._manager: GroupManager | None = None
        self._gathered: Gathered | None = None  # for the operation that comes next
        self._last: Gathered | None = None
        self._across = False
        self._missed = self._steps = 0

    # --- what others ask -------------------------------------------------------------------------

    @property
    def job_layout(self) -> Layout:
        """The layout of all groups together."""
        return self._whole

    @property
    def step_share(self) -> tuple[int, int]:
        """Each group reads its own share of a step, whoever else is there."""
        mine, shares = self.data_share
        return self.group.number * shares + mine, self._whole.replicate * shares

    @property
    def changes(self) -> Sequence[CopyChange]:
        """When groups were lost, and came back, in this leg."""
        return self._changes

    @property
    def leads(self) -> bool:
        """Whether this group speaks and saves: of those present the one that trains for longest."""
        if self._last is None:
            return self.group.number == 0 and not self.group.rejoins
        return self._last.leader == self.group.number

    @property
    def replaceable(self) -> bool:
        """True: where this group fails others may go on."""
        return True

    def figures(self, tokens: int) -> dict[str, Tensor]:
        """Return how many groups took part in the step, and what was not trained on so far, in this leg.

        Args:
            tokens: of the global batch.
        """
        present = len(self._last.present) if self._last else 0
        skipped = self._missed * tokens // self._whole.replicate
        return {
            "replica_groups": torch.tensor(float(present)),
            "skipped_tokens": torch.tensor(float(skipped), dtype=torch.float64),
        }

    def seed_masks(self, key: str) -> None:
        """Make masks as the rank of the whole job would that has this part of the batch."""
        self._seed(key, self.group.number * self.size + self.rank)

    def heard(self, signal: int) -> int:
        """Return the request to stop that the groups heard of at this step, the same in all of them.

        Args:
            signal: of this process; the groups hear of it at the next step.
        """
        return self._last.stop if self._last else signal

    # --- to come into the run -----------------------------------------------------------------------

    def catch_up(
        self, model: ShardableModel, optimizer: torch.optim.Optimizer, step: int, carried: Carried
    ) -> int | None:
        """Meet the other groups, and take over their state where they are ahead.

        Args:
            model: sharded, with weights.
            optimizer: with state.
            step: that this group has completed.
            carried: what else of the run a group that comes back needs.

        Returns:
            The step from which all go on; None where the others are concluding the run.

        Raises:
            RunFailedError: nobody is there who could be joined.
            Stopped: a group was asked to stop.
        """
        self._state, self._carried = (model, optimizer), carried  # Lightning has names for one of these itself
        self._manager = GroupManager(
            self.group,
            self._whole.replicate,
            self.rank,
            self.size,
            self.coordinator.broadcast,
            self.root_device,
            self.timeout_seconds,
            self._save,
            self._load,
        )
        self._manager.step = step
        seen = self._await_groups(self._manager)
        if seen.ending:
            self._conclude(self._manager)
            return None
        if self.rank == 0:
            self.group.say_joined()
        self._gathered = seen
        return self._manager.step

    def _await_groups(self, manager: GroupManager) -> Gathered:
        """Wait until all groups are there, or this one comes to others that train."""
        deadline, count = time.monotonic() + self.timeout_seconds, self._whole.replicate
        while True:
            standing.mark()
            late = self.any_raised(time.monotonic() > deadline)
            complete = manager.meet() == count
            begins = not self.group.rejoins and (complete or late)
            seen = manager.greet(TRAINING if begins else WAITING, stopping.requested(), ending=False)
            if self.any_raised(manager.failed):
                manager.commit()  # no, which lets the groups connect anew
                continue
            if number := self.start_vote(seen.stop).result():
                raise stopping.Stopped(number)
            if seen.trains:
                return seen
            if late or (complete and self.group.rejoins):
                raise RunFailedError(
                    "this replica group came back, and no other is left that has gone on with the run",
                    got=f"group {self.group.number} of {count}, with groups {list(seen.present)}",
                    fix="go on from the newest checkpoint with resume=",
                )
            time.sleep(_POLL_SECONDS)

    def _save(self) -> dict[str, Any]:
        notes = {
            "missed": self._missed,
            "changes": [asdict(one) for one in self._changes],
            "carried": self._carried.save(),
        }
        return {"shards": self.state_shards(*self._state), "notes": notes}

    def _load(self, state: dict[str, Any]) -> None:
        shards = self.state_shards(*self._state)
        fill(shards, state)
        self.adopt(*self._state, shards)
        notes = state["notes"]
        self._missed = notes["missed"]
        self._changes = [CopyChange(one["step"], tuple(one["present"]), tuple(one["came"])) for one in notes["changes"]]
        self._carried.load(notes["carried"])

    # --- the step -----------------------------------------------------------------------------------

    def settled(self, model: ShardableModel, step: int, compute: Callable[[], T]) -> T:
        """Compute a step's gradients until nothing fails on the way: with fewer groups where one is lost.

        Args:
            model: sharded; gradients of an attempt that failed are dropped.
            step: that are completed.
            compute: computes them.

        Raises:
            LostPeerError: the others have completed steps without this group, which starts again.
        """
        assert self._manager is not None, "catch_up() comes first"
        while True:
            seen = self._gather(self._manager, ending=False)
            if self._manager.step != step or seen.ending:
                raise LostPeerError(
                    f"replica group {self.group.number} has fallen behind the others and comes back to them anew",
                    got=f"step {step}; the others are at step {self._manager.step}",
                )
            with self._over_groups():
                result = compute()
            if self._manager.commit():
                self._count(seen, step + 1)
                return result
            standing.mark()
            for _, parameter in local_parameters(model):
                parameter.grad = None

    def _gather(self, manager: GroupManager, ending: bool) -> Gathered:
        """Return who takes part in what comes next; as it was heard when this group came."""
        seen, self._gathered = self._gathered, None
        if seen is None:
            manager.meet()
            seen = manager.greet(TRAINING + self._steps, stopping.requested(), ending)
        return seen

    def _count(self, seen: Gathered, step: int) -> None:
        self._last, present = seen, seen.present
        self._steps += 1
        self._missed += self._whole.replicate - len(present)
        came = tuple(number for number in present if seen.states[number] < TRAINING)
        if came or present != (self._changes[-1].present if self._changes else tuple(range(self._whole.replicate))):
            self._changes.append(CopyChange(step, present, came))

    @contextmanager
    def _over_groups(self) -> Iterator[None]:
        self._across = True
        try:
            yield
        finally:
            self._across = False

    def _sum(self, values: Tensor, once: Sequence[str]) -> Tensor:
        values = super()._sum(values, once)
        return self._sum_over_groups(values) if self._across else values

    def _sum_over_groups(self, values: Tensor) -> Tensor:
        assert self._manager is not None
        result = values.detach().clone().contiguous()
        self._manager.sum([result])
        return result

    def reduce_and_clip(
        self, model: ShardableModel, loss_part: Tensor, max_norm: float | None
    ) -> tuple[Tensor, Tensor]:
        """Sum the gradients over the groups; then every group has the same norm, and clips alike."""
        if self._across:
            self._sum_gradients(model)
        loss, norm = super().reduce_and_clip(model, loss_part, max_norm)
        return (self._sum_over_groups(loss) if self._across else loss), norm

    def _sum_gradients(self, model: ShardableModel) -> None:
        assert self._manager is not None
        grads = []
        for _, parameter in local_parameters(model):
            if parameter.requires_grad:
                if parameter.grad is None:  # nothing of this group's share has come to it
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(local_part(parameter.grad))
        buckets = list(_buckets(grads))
        flat = [torch.cat([grad.reshape(-1) for grad in bucket]) for bucket in buckets]
        self._manager.sum(flat)
        for bucket, summed in zip(buckets, flat, strict=True):
            for grad, part in zip(bucket, summed.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view(grad.shape))

    # --- what one group does for all -------------------------------------------------------------------

    def by_one(self, action: Callable[[], T]) -> T | None:
        """Let the leading group do something while the others wait; the next one does it where that is lost.

        Args:
            action: done by all ranks of the group; harmless to do again.

        Returns:
            What `action` returned; None in the groups that have waited.
        """
        if self._manager is None:
            return action() if self.leads else None
        while True:
            self._last = self._gather(self._manager, ending=True)
            result = action() if self.leads and not self.any_raised(self._manager.failed) else None
            if self._conclude(self._manager):
                return result

    def _conclude(self, manager: GroupManager) -> bool:
        manager.sum([torch.ones(1, device=self.root_device)])
        if not self.any_raised(manager.failed):
            return True
        standing.mark()
        manager.commit()  # no: those that are left connect anew
        return False

    def leave(self) -> None:
        """Leave the groups, and the job's process group."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None
        super().leave()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Divide tensors into lists of one type and of a limited number of elements, in their order."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            if bucket and sum(one.numel() for one in bucket) + tensor.numel() > _BUCKET_ELEMENTS:
                yield bucket
                bucket = []
            bucket.append(tensor)
        if bucket:
            yield bucket
