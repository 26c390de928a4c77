"""The one interface through which everything that touches more than one device goes.

`ParallelStrategy` is a Lightning strategy. Lightning sees one process that trains one model: it is told a
world of one, because its own multi-process steps (a broadcast per batch, a sampler, whole-model
checkpoints) are ours to do. The model, the optimizer, the data, the checkpoint and the LightningModule
call the methods below and never ask which strategy runs.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from orchestrator.distributed.coordinator import ProcessCoordinator, Vote
from orchestrator.distributed.heartbeat import Beat
from orchestrator.distributed.world import World
from orchestrator.errors import HardwareError
from orchestrator.hardware.target import Target
from orchestrator.models.protocol import ShardableModel
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.parts import Parts, WholeParts
from orchestrator.sharding.rules import Placement
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.accelerator import TargetAccelerator

Batch = dict[str, Tensor]


class ParallelStrategy(Strategy):
    """Shards one job over the devices of a layout.

    Life: `join` → `shard` → `initialize` or `load` into `state_shards` → per step `prepare_batch`,
    `backward_context`, `sum_over_data`, `reduce_and_clip` → `leave`.

    Args:
        target: the hardware of this process.
        world: this process among the job's.
        layout: degrees of the mesh axes; their product is the job's number of devices.
        precision: `fp32` or `bf16` for the matrix products. Master weights, reductions and the loss are fp32.
        timeout_seconds: how long the processes wait for each other.
    """

    def __init__(self, target: Target, world: World, layout: Layout, precision: str, timeout_seconds: float = 600):
        super().__init__(accelerator=TargetAccelerator(target))
        self.target, self.world, self.layout, self.precision = target, world, layout, precision
        self.timeout_seconds = timeout_seconds
        self._coordinator: ProcessCoordinator | None = None

    # --- set-up ---------------------------------------------------------------------------------

    @abstractmethod
    def join(self) -> None:
        """Meet the other processes and build the device mesh."""

    def check_agreement(self) -> None:
        """See that all processes have the same layout and precision, before a mesh is made of them.

        Raises:
            HardwareError: one has not; on all of them.
        """
        mine = f"{self.layout}, {self.precision}, {self.layout.devices} devices"
        first = self.broadcast(mine)
        if self.any_raised(mine != first):
            raise HardwareError(
                "the processes of this job do not have the same layout",
                got=f"{mine} in process {self.world.rank}, {first} in process 0",
                fix="start the same command on every host, on hosts with the same devices",
            )

    def leave(self) -> None:
        """Leave the job's process group."""
        if self._coordinator is not None:
            self._coordinator.leave()

    @abstractmethod
    def shard(self, model: ShardableModel, placements: Mapping[str, Placement]) -> None:
        """Split `model`, which is on the meta device, in place and allocate this process's part, unfilled."""

    @abstractmethod
    def initialize(self, model: ShardableModel, seed: int) -> None:
        """Fill the local parts with the initial weights of `seed`: the same global weights on any layout."""

    @abstractmethod
    def state_shards(self, model: ShardableModel, optimizer: torch.optim.Optimizer | None) -> list[Shard]:
        """The local parts of all weights and optimizer state, as views that a restore may write into."""

    def prepare_optimizer(self, model: ShardableModel, optimizer: torch.optim.Optimizer) -> None:
        """Place the optimizer's state, which exists, beside its parameters."""

    def parts(self, model: ShardableModel) -> Parts:
        """How the parameters of `model` are split, as an optimizer sees it. All ranks call it together."""
        return WholeParts()

    def adopt(self, model: ShardableModel, optimizer: torch.optim.Optimizer | None, shards: Sequence[Shard]) -> None:
        """Take over what a restore wrote into `state_shards`, where those are copies."""

    @property
    def data_share(self) -> tuple[int, int]:
        """Which share of a batch this process reads, of how many."""
        return self.layout.data_rank(self.world.rank), self.layout.data_parallel

    # --- the step -------------------------------------------------------------------------------

    @abstractmethod
    def prepare_batch(self, batch: Mapping[str, Any]) -> Batch:
        """Bring this rank's sequences ([B, T] arrays) onto the device, cut along T where `context` says so."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """Around every forward pass, where the precision is not a property of the placed parameters."""
        return nullcontext()

    @property
    def checkpoint(self) -> Callable[..., Any]:
        """The function that recomputes activations on this backend, called as `checkpoint(function, *args)`."""
        return torch.utils.checkpoint.checkpoint

    @abstractmethod
    def backward_context(self, model: ShardableModel, last: bool) -> AbstractContextManager[None]:
        """Around the backward pass of a micro-batch: the gradients of a step are complete after its `last`."""

    @abstractmethod
    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum over the ranks that hold different tokens, counting each token once."""

    @abstractmethod
    def reduce_and_clip(
        self, model: ShardableModel, loss_part: Tensor, max_norm: float | None
    ) -> tuple[Tensor, Tensor]:
        """Sum up what a step needs to know, in one reduction, and clip the gradients by it.

        Args:
            loss_part: this rank's part of the loss, a scalar.
            max_norm: scale the gradients so that their norm is at most this; None: leave them.

        Returns:
            The global loss, and the global L2 norm of the gradients before they were scaled: fp32 scalars, the same
            bits on all ranks, so that what depends on them is decided alike everywhere.
        """

    @abstractmethod
    def update_unless(
        self, model: ShardableModel, optimizer: torch.optim.Optimizer, bad: Tensor
    ) -> AbstractContextManager[None]:
        """Around an optimizer's step: where `bad` is true weights and state stay to the bit as they are.

        Args:
            bad: bool scalar on the device, the same on all ranks. The host need not know it, and does not wait for it.
        """

    def seed_masks(self, key: str) -> None:
        """Let what is drawn next (dropout) be a function of `key` and of the part of the batch that is here."""
        digest = hashlib.sha256(f"{key}/{self.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little"))

    def finish_step(self) -> None:
        """After the optimizer's step, and after each batch of an evaluation."""

    def fetch(self, values: Sequence[Tensor]) -> list[float]:
        """Scalars on the host."""
        return [float(value) for value in torch.stack(list(values)).tolist()] if values else []

    def fetch_later(self, value: Tensor) -> Callable[[], float]:
        """A scalar that is asked for when work that follows it has been started: the host waits for it alone."""
        return lambda: float(value.item())

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Around a forward pass of another shape than the step's, for which nothing shall be compiled."""
        return nullcontext()

    def compilations(self) -> int | None:
        """Graphs compiled so far by this process; None where nothing is compiled."""
        return None

    # --- decisions that all ranks must take alike --------------------------------------------------

    @property
    def coordinator(self) -> ProcessCoordinator:
        """The processes of the job; opened on first use."""
        if self._coordinator is None:
            self._coordinator = ProcessCoordinator(self.world, self.timeout_seconds)
        return self._coordinator

    def start_vote(self, value: int) -> Vote:
        """Ask all ranks for the largest `value`, such as a flag, without waiting for the answer."""
        return self.coordinator.start_vote(value)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give rank 0's object to every rank; all ranks call it, in the same order.

        Args:
            obj: what JSON can carry. Anything else would have to be pickled. Only rank 0's counts.
            src: 0, the one rank that the processes hear.

        Returns:
            A copy of rank 0's object: a tuple comes back as a list.

        Raises:
            ValueError: another source than rank 0.
        """
        if src:
            raise ValueError(f"objects are broadcast from rank 0, not from rank {src}")
        if self.world.size == 1:
            return obj
        return json.loads(self.coordinator.broadcast(json.dumps(obj if self.rank == 0 else None)))

    def any_raised(self, flag: bool) -> bool:
        """Whether any rank calls with `flag` set; waits for all of them."""
        return bool(self.start_vote(flag).result())

    def put(self, key: str, text: str) -> None:
        """Publish `text` to all ranks under a key that is used once. Any thread may call it."""
        self.coordinator.put(key, text)

    def get_now(self, key: str) -> str | None:
        """Return what a rank has published under `key`, or None. Does not wait. Any thread may call it."""
        return self.coordinator.get_now(key)

    def count(self, key: str) -> int:
        """Which process this is to count itself under `key`, from 1 on. Waits for nobody."""
        return self.coordinator.count(key)

    def beat(self, text: str) -> None:
        """Leave this process's sign of life (`Beat.to_text`). Any thread may call it."""
        self.coordinator.beat(text)

    def beat_of(self, rank: int) -> Beat | None:
        """The last sign of life of a process; None where there is none yet."""
        return self.coordinator.beat_of(rank)

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        self.coordinator.barrier()

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def size(self) -> int:
        """Processes of the job."""
        return self.world.size

    # --- what Lightning asks of a strategy ------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        return self.target.device(self.world.local_rank)

    @property
    def is_global_zero(self) -> bool:
        return self.world.rank == 0

    @property
    def global_rank(self) -> int:
        return self.world.rank

    @property
    def local_rank(self) -> int:
        return self.world.local_rank

    def setup(self, trainer: Any) -> None:
        # The model is placed and the optimizer built before the trainer exists: see training/job.py.
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.setup_optimizers(trainer)

    def batch_to_device(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        return self.prepare_batch(batch)

    def model_to_device(self) -> None:
        """`shard` has put every parameter where it belongs."""

    def teardown(self) -> None:
        """Lightning would gather the model on the host here."""

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def all_gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor


def local_parameters(model: ShardableModel) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and parameters in a fixed order, a tied one once."""
    return model.named_parameters(remove_duplicate=True)
