"""The one interface for everything that spans several devices.

The model, the optimizer, the data, the checkpoint and the LightningModule call the methods below and never ask which
strategy runs. `ParallelStrategy` is a Lightning strategy, too (`trainer_strategy`): a user's own Trainer takes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from orchestrator.checkpoint.plain_values import PlainEncoder, decode
from orchestrator.config.schema import Auto, ContextKind, HardwareConfig, LayoutConfig, Schedule
from orchestrator.distributed.coordinator import ProcessCoordinator, Vote, coordinator_of
from orchestrator.distributed.heartbeat import Beat
from orchestrator.distributed.lane import Lane
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError, HardwareError, LayoutError
from orchestrator.hardware.fp8_support import check_fp8
from orchestrator.hardware.target import Target
from orchestrator.hardware.target_table import find_world, job_devices, resolve
from orchestrator.models.protocol import ShardableModel, run_on
from orchestrator.sharding.layout import Layout, resolve_layout
from orchestrator.sharding.parts import Parts, WholeParts
from orchestrator.sharding.rules import Placement, place
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.model_copies import ModelCopies
from orchestrator.strategies.module_sharding import move_others, own_parameters
from orchestrator.strategies.module_state import ModuleState, shardable_models
from orchestrator.strategies.replicas import HeldPart
from orchestrator.strategies.text_rows import TextRows
from orchestrator.strategies.trainer_strategy import TrainerStrategy

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepHooks:
    """Functions that are called in the forward and backward passes of a step.

    Attributes:
        begin: before each forward pass: number of the micro-batch, and which of the parts of the model that are here
            is run: 0, but on a rank of a pipeline that has several.
        ran: after each forward pass: its loss; None where it gave none, as those parts do that have no head.
        backward: computes the gradients of a loss.
    """

    begin: Callable[[int, int], None] = lambda micro_batch, part: None
    ran: Callable[[Tensor | None], None] = lambda loss: None
    backward: Callable[[Tensor], None] = Tensor.backward


@dataclass(frozen=True)
class StepParts:
    """What this rank put into the sums of a step, to tell afterwards where a number came from.

    Attributes:
        loss: its part of the loss, a scalar.
        names: of its parameters with gradients.
        norms: reads how large its parts of these gradients are, as they were summed over the ranks: a number for each.
    """

    loss: Tensor
    names: tuple[str, ...]
    norms: Callable[[], Sequence[float]]


@dataclass(frozen=True)
class TokenScores:
    """What a model makes of each target of a batch, on the CPU.

    Attributes:
        losses: [B, T] fp32, the cross-entropy in nats; 0 where there is no target.
        greedy: [B, T] bool, whether the target is the likeliest token; False where there is none.
    """

    losses: Tensor
    greedy: Tensor


class ParallelStrategy(TrainerStrategy, ModelCopies, TextRows):
    """Shards one job over the devices of a layout.

    Life: `join` → `shard` → `initialize` or `load` into `state_shards` → per step `prepare_batch`, `sum_over_data`,
    `forward_backward`, `reduce_and_clip` → `leave`.

    Args:
        target: the hardware of this process.
        world: this process among the job's.
        layout: degrees of the mesh axes; their product is the job's number of devices.
        precision: `fp32`, `bf16` or `fp8` for the matrix products. Master weights, reductions and the loss are fp32.
        timeout_seconds: how long the processes wait for each other.

    Attributes:
        step_parts: of the last `reduce_and_clip`; None before.
    """

    def __init__(self, target: Target, world: World, layout: Layout, precision: str, timeout_seconds: float = 600):
        super().__init__(target, world, layout, precision)
        self.step_parts: StepParts | None = None
        self.timeout_seconds = timeout_seconds
        self.placements: WeakKeyDictionary[ShardableModel, dict[str, Placement]] = WeakKeyDictionary()
        self._coordinator: ProcessCoordinator | None = None

    @classmethod
    def from_environment(
        cls,
        *,
        replicate: int | Auto = 1,
        pipeline: int | Auto = 1,
        fsdp: int | Auto = "auto",
        expert: int | Auto = 1,
        context: int | Auto = 1,
        tensor: int | Auto = 1,
        schedule: Schedule = "1f1b",
        context_kind: ContextKind = "gather",
        precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto",
        hardware: HardwareConfig | None = None,
        **options: Any,
    ) -> Self:
        """Make the strategy of this process, for a Trainer of one's own.

        Which process this is, of how many, is what torchrun, Slurm, MPI or the product's launcher say.

        Args:
            replicate: copies of the model, each over the other axes.
            pipeline: processes among which the layers are divided.
            fsdp: processes among which parameters, gradients and optimizer state are split; `auto` takes those that
                the other axes leave over.
            expert: groups of experts; everything else is split over it as over fsdp.
            context: processes that share a sequence.
            tensor: processes that share each matrix.
            schedule: of a pipeline's micro-batches.
            context_kind: how the parts of a sequence attend to each other.
            precision: of the matrix products; `auto` is what suits the devices.
            hardware: target, devices and more; by default what is found here, on a CPU where no accelerator is.
            options: as the class has them, such as `reduce_gradients`.

        Raises:
            HardwareError: the target cannot be used here, or what started the processes says nothing coherent.
            LayoutError: the degrees do not fit the processes.
        """
        hardware = hardware or HardwareConfig()
        target = resolve(hardware)
        world = find_world(hardware, os.environ) or World()
        degrees = LayoutConfig(
            replicate=replicate,
            pipeline=pipeline,
            fsdp=fsdp,
            expert=expert,
            context=context,
            tensor=tensor,
            schedule=schedule,
            context_kind=context_kind,
        )
        layout = resolve_layout(degrees, job_devices(hardware, target, world))
        chosen = target.default_precision(target.probe()) if precision == "auto" else precision
        if chosen == "fp8":
            check_fp8(target, hardware.fp8.recipe)
            options.setdefault("fp8", hardware.fp8)
        return cls(target, world, layout, chosen, timeout_seconds=hardware.timeout_seconds, **options)

    # --- set-up ---------------------------------------------------------------------------------

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

    def describe_precision(self) -> str:
        """Return the precision of the matrix products, with what a placed model made of it."""
        return self.precision

    @abstractmethod
    def shard(self, model: ShardableModel, placements: Mapping[str, Placement]) -> None:
        """Split `model`, which is on the meta device, in place and allocate this process's part, unfilled.

        Args:
            model: on the meta device.
            placements: of its parameters, by name.
        """

    @abstractmethod
    def initialize(self, model: ShardableModel, seed: int) -> None:
        """Fill the local parts with the initial weights of `seed`: the same global weights on any layout.

        Args:
            model: sharded.
            seed: of the run.
        """

    @abstractmethod
    def state_shards(self, model: ShardableModel, optimizer: torch.optim.Optimizer | None) -> list[Shard]:
        """Return the local parts of all weights and optimizer state, as views that a restore may write into.

        Args:
            model: sharded.
            optimizer: over its parameters; None for the weights alone.
        """

    @abstractmethod
    def gradient_shards(self, model: ShardableModel) -> list[Shard]:
        """Return the local parts of the gradients of a step, summed over this job's ranks; zeros where there is none.

        Their names are those of `state_shards` with `gradient.` for `model.`. What is written into them counts after
        `adopt_gradients`.

        Args:
            model: sharded, after the last backward pass of the step.
        """

    def adopt_gradients(self, model: ShardableModel, shards: Sequence[Shard]) -> None:
        """Take over what was written into the parts that `gradient_shards` gave.

        Args:
            model: sharded.
            shards: the same ones.
        """

    def weight_shards(self, model: ShardableModel, names: Collection[str]) -> list[Shard]:
        """Return the local parts of some weights, as `state_shards` does; `adopt` takes over what is written there.

        Args:
            model: sharded.
            names: of the weights, as shards have them.
        """
        return [shard for shard in self.state_shards(model, None) if shard.name in names]

    def held_parts(self, model: ShardableModel, optimizer: torch.optim.Optimizer) -> list[HeldPart]:
        """Return what each device of this process holds of weights and optimizer state, copies too.

        Args:
            model: sharded.
            optimizer: over its parameters.
        """
        device = str(self.root_device)
        shards = self.state_shards(model, optimizer)
        return [HeldPart(shard.name, shard.slices, device, shard.data) for shard in shards]

    def parameter_count(self, model: ShardableModel) -> int:
        """Return the number of elements of the whole `model`, wherever they are."""
        return sum(math.prod(placement.shape) for placement in self.placements[model].values())

    def release_gathered(self, model: ShardableModel) -> None:
        """Let go of weights that were gathered whole: this rank's parts are changed outside of an optimizer's step.

        Args:
            model: sharded.
        """

    def held_elsewhere(self, model: ShardableModel) -> set[str]:
        """Return the names of parameters of `model` of which this process has no part, as a pipeline divides them."""
        return set(self.placements[model]) - {name for name, _ in local_parameters(model)}

    def prepare_optimizer(self, model: ShardableModel, optimizer: torch.optim.Optimizer) -> None:
        """Place the optimizer's state, which exists, on the devices of its parameters.

        Args:
            model: sharded.
            optimizer: over its parameters.
        """

    def parts(self, model: ShardableModel) -> Parts:
        """Return how the parameters of `model` are split, as an optimizer sees it. All ranks call it together."""
        return WholeParts()

    def adopt(self, model: ShardableModel, optimizer: torch.optim.Optimizer | None, shards: Sequence[Shard]) -> None:
        """Take over what a restore wrote into `state_shards`, where those are copies.

        Args:
            model: sharded.
            optimizer: over its parameters; None for the weights alone.
            shards: as `state_shards` returned them, filled.
        """

    @property
    def data_share(self) -> tuple[int, int]:
        """Which share of a batch this process reads, of how many."""
        return self.layout.data_rank(self.world.rank), self.layout.data_parallel

    @property
    def step_share(self) -> tuple[int, int]:
        """Which share of a step's batch this process reads, of how many; evaluations are divided by `data_share`."""
        return self.data_share

    # --- a LightningModule of the user's -----------------------------------------------------------

    def place(self, module: nn.Module) -> None:
        """Shard the models in `module` that can be sharded, and move everything else to the device.

        Args:
            module: of a Trainer.

        Raises:
            LayoutError: the layout has a pipeline, and the module is the user's.
        """
        unplaced = [model for _, model in shardable_models(module) if model not in self.placements]
        if unplaced or any(True for _ in own_parameters(module)):
            self.refuse_own_trainer()
        for model in unplaced:
            self._place_model(model)
        self._place_others(module)

    def refuse_own_trainer(self) -> None:
        """Refuse a pipeline in a Trainer of the user's.

        Raises:
            LayoutError: the layout has one.
        """
        if self.layout.pipeline > 1:
            raise LayoutError(
                "a Trainer of one's own cannot train on a pipeline, which runs forward and backward passes itself",
                got=f"layout.pipeline={self.layout.pipeline}",
                allowed="1",
                fix="leave pipeline at 1, or train by orchestrator.train or the command line",
            )

    def _place_model(self, model: ShardableModel) -> None:
        """Shard a model that a user has made, on the meta device or with weights, which it keeps."""
        weights = {name: parameter.detach() for name, parameter in local_parameters(model) if not parameter.is_meta}
        if any(isinstance(weight, DTensor) for weight in weights.values()):
            raise LayoutError(
                "the model was placed by another strategy",
                got=type(model).__name__,
                fix="give this Trainer the strategy of the first one, or make the module anew",
            )
        model.to("meta")
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.shard(model, place(model.logical_axes(), shapes))
        self._average_gradients(model)
        if not weights:
            self.initialize(model, int(os.environ.get("PL_GLOBAL_SEED", 0)))
            return
        shards = self.state_shards(model, None)
        with torch.no_grad():
            for shard in shards:
                shard.data.copy_(weights[shard.name.removeprefix("model.")][shard.slices])
        self.adopt(model, None, shards)

    def _average_gradients(self, model: ShardableModel) -> None:
        """Let gradients be means over the processes that read other samples, where they would be sums."""

    def _place_others(self, module: nn.Module) -> None:
        """Shard what is in no model that the rules place."""
        move_others(module, self.root_device)

    def module_state(self, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> ModuleState:
        """Return the state of `module` and of its `optimizers`, as checkpoints hold it."""
        return ModuleState(module, optimizers, self.rank, self.state_shards, self.adopt)

    # --- the step -------------------------------------------------------------------------------

    @abstractmethod
    def prepare_batch(self, batch: Mapping[str, Any]) -> Batch:
        """Bring this rank's sequences ([B, T] arrays) onto the device, cut along T where `context` says so.

        Args:
            batch: arrays [B, T] by name.
        """

    def forward_context(self) -> AbstractContextManager[Any]:
        """Wrap every forward pass, where the precision is not a property of the placed parameters."""
        return nullcontext()

    @property
    def checkpoint(self) -> Callable[..., Any]:
        """The function that recomputes activations on this backend, called as `checkpoint(function, *args)`."""
        return torch.utils.checkpoint.checkpoint

    @abstractmethod
    def backward_context(self, model: ShardableModel, last: bool) -> AbstractContextManager[None]:
        """Wrap the backward pass of a micro-batch: the gradients of a step are complete after its `last`.

        Args:
            model: sharded.
            last: whether it is the last micro-batch of the step.
        """

    def forward_backward(
        self, model: ShardableModel, batch: Batch, micro_batch: int, divisor: Tensor, hooks: StepHooks = StepHooks()
    ) -> Tensor:
        """Compute the gradients of a batch: a micro-batch after the other, or as the schedule of a pipeline says.

        Args:
            model: sharded.
            batch: this rank's share, as `prepare_batch` gives it, with targets.
            micro_batch: sequences of a forward pass; the last one may have fewer.
            divisor: what the sum of the cross-entropies is divided by, a scalar.
            hooks: called on the way.

        Returns:
            This rank's part of the loss, as `reduce_and_clip` takes it.
        """
        return self._forward_backward(model, _micro_batches(batch, micro_batch), divisor, hooks)

    def _forward_backward(
        self, model: ShardableModel, parts: Sequence[Batch], divisor: Tensor, hooks: StepHooks
    ) -> Tensor:
        total = torch.zeros((), device=self.root_device)
        for index, part in enumerate(parts):
            hooks.begin(index, 0)
            with self.backward_context(model, index + 1 == len(parts)):
                with self.forward_context():
                    loss = run_on(model, part) / divisor
                hooks.ran(loss)
                hooks.backward(loss)
            total += loss.detach()
        return total

    @torch.no_grad()
    def token_scores(self, model: ShardableModel, batch: Mapping[str, Any]) -> TokenScores:
        """Return what `model`, in its mode of training or evaluation, makes of each target. No gradients.

        All ranks call it together, with equal shapes. Where programs are compiled there is one for each shape.

        Args:
            model: sharded.
            batch: this rank's rows, arrays [B, T] as `prepare_batch` takes them, with targets; `weights` do not count.

        Returns:
            The scores of this rank's rows, the whole of each, also where their positions or the layers are split.

        Raises:
            LayoutError: the layout cannot split sequences of this length.
        """
        length, split = batch["targets"].shape[1], self.layout.sequence_split
        if length % split:
            raise LayoutError(
                "the sequences cannot be split evenly",
                got=f"{length} positions on layout {self.layout}",
                allowed=f"multiples of {split}",
                fix="pad them with tokens whose targets are -100",
            )
        placed = self.prepare_batch({name: value for name, value in batch.items() if name != "weights"})
        with self.uncompiled(), self.forward_context(), model.head.scoring() as found:
            run_on(model, placed)
        whole = self._whole_rows(model, found[0] if found else None)
        self.finish_step()
        losses, greedy = whole.cpu().unbind(-1)
        return TokenScores(losses, greedy != 0.0)

    @abstractmethod
    def _whole_rows(self, model: ShardableModel, part: Tensor | None) -> Tensor:
        """Return what all ranks that share sequences have of them.

        Args:
            model: sharded.
            part: [B, this rank's positions, 2]; None where the rank has no head.
        """

    def sum_of_parts(self, values: Tensor) -> Tensor:
        """Sum `values` as `sum_over_data`, where each rank of a pipeline has its part of them.

        Args:
            values: of this rank; zeros where it has no part.
        """
        return self.sum_over_data(values)

    @abstractmethod
    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum `values` over the ranks that hold different tokens, counting each token once."""

    def once_per_row(self, values: Tensor) -> Tensor:
        """Return `values`, or zeros where another rank has them of the same sequences: for `sum_over_data`.

        Args:
            values: that each rank has of its sequences, whole ones, as `token_scores` gives them.
        """
        return values

    @abstractmethod
    def reduce_and_clip(
        self, model: ShardableModel, loss_part: Tensor, max_norm: float | None
    ) -> tuple[Tensor, Tensor]:
        """Sum what a step needs to know, in one reduction, and clip the gradients by it.

        Args:
            model: sharded, with gradients.
            loss_part: this rank's part of the loss, a scalar.
            max_norm: scale the gradients so that their norm is at most this; None: leave them.

        Returns:
            The global loss, and the global L2 norm of the gradients before they were scaled: fp32 scalars, the same
            bits on all ranks, so that what depends on them is decided alike everywhere. Neither is finite where a
            rank's copy of a gradient is not, which counts for nothing else.
        """

    @abstractmethod
    def update_unless(
        self, model: ShardableModel, optimizer: torch.optim.Optimizer, bad: Tensor
    ) -> AbstractContextManager[None]:
        """Wrap an optimizer's step: where `bad` is true weights and state stay bitwise as they are.

        Args:
            model: sharded.
            optimizer: over its parameters.
            bad: bool scalar on the device, the same on all ranks. The host need not know it, and does not wait for it.
        """

    def seed_masks(self, key: str) -> None:
        """Make what is drawn next (dropout) a function of `key` and of the part of the batch that is here."""
        self._seed(key, self.rank)

    def _seed(self, key: str, rank: int) -> None:
        digest = hashlib.sha256(f"{key}/{rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little"))

    def finish_step(self) -> None:
        """End a step: called after the optimizer's step, and after each batch of an evaluation."""

    def fetch(self, values: Sequence[Tensor]) -> list[float]:
        """Return scalars on the host.

        Args:
            values: scalar tensors.
        """
        return [float(value) for value in torch.stack(list(values)).tolist()] if values else []

    def fetch_later(self, value: Tensor) -> Callable[[], float]:
        """Return a function that reads a scalar when later work has been started: the host waits for it alone.

        Args:
            value: a scalar tensor.
        """
        return lambda: float(value.item())

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Wrap a forward pass of another shape than the step's, for which nothing shall be compiled."""
        return nullcontext()

    def compilations(self) -> int | None:
        """Return the number of graphs compiled so far by this process; None where nothing is compiled."""
        return None

    # --- decisions that all ranks must take alike --------------------------------------------------

    @property
    def coordinator(self) -> ProcessCoordinator:
        """The processes of the job; opened on first use."""
        if self._coordinator is None:
            self._coordinator = coordinator_of(self.world, self.timeout_seconds)
        return self._coordinator

    def start_vote(self, value: int) -> Vote:
        """Ask all ranks for the largest `value`, such as a flag, without waiting for the answer."""
        return self.coordinator.start_vote(value)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give one rank's object to every rank; all ranks call it, in the same order.

        Args:
            obj: what JSON can carry, a tuple, a path, or a small tensor. Anything else would have to be pickled. Only
                that of rank `src` counts.
            src: the rank that the processes hear.

        Returns:
            A copy of that rank's object.

        Raises:
            ConfigError: it is something else.
        """
        if self.world.size == 1:
            return obj
        text, encoder = "", PlainEncoder()
        if self.rank == src:
            text = json.dumps([encoder.encode(obj), encoder.left_out])
        value, left_out = json.loads(self.coordinator.broadcast(text, src))
        if left_out:
            raise ConfigError(
                "an object cannot be sent to the other processes, as it would have to be pickled",
                got="; ".join(left_out),
                allowed="what JSON can carry, tuples, paths and small tensors",
            )
        return decode(value)

    def any_raised(self, flag: bool) -> bool:
        """Return whether any rank calls with `flag` set; waits for all of them."""
        return bool(self.start_vote(flag).result())

    def put(self, key: str, text: str) -> None:
        """Publish `text` to all ranks under `key`, which is used once. Any thread may call it."""
        self.coordinator.put(key, text)

    def get_now(self, key: str) -> str | None:
        """Return what a rank has published under `key`, or None. Does not wait. Any thread may call it."""
        return self.coordinator.get_now(key)

    def open_lane(self) -> Lane:
        """Open a way for bytes from host to host, beside the training. All ranks call it, in the same order."""
        return self.coordinator.open_lane()

    def count(self, key: str) -> int:
        """Count this process under `key`, and return its number, from 1 on. Does not wait."""
        return self.coordinator.count(key)

    def beat(self, text: str) -> None:
        """Publish this process's sign of life, `text` of `Beat.to_text`. Any thread may call it."""
        self.coordinator.beat(text)

    def beat_of(self, rank: int) -> Beat | None:
        """Return the last sign of life of process `rank`; None where there is none yet."""
        return self.coordinator.beat_of(rank)

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks; `name` is Lightning's, and not used."""
        self.coordinator.barrier()

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.world.rank

    @property
    def size(self) -> int:
        """Processes of the job."""
        return self.world.size


def _micro_batches(batch: Batch, size: int) -> list[Batch]:
    """Cut `batch` into parts of `size` sequences; the last one may have fewer."""
    rows = len(batch["targets"])
    return [{name: value[at : at + size] for name, value in batch.items()} for at in range(0, rows, size)]


def local_parameters(model: ShardableModel) -> Iterable[tuple[str, nn.Parameter]]:
    """Yield names and parameters of `model` in a fixed order, a tied one once."""
    return model.named_parameters(remove_duplicate=True)


def strategy_of(trainer: Any) -> ParallelStrategy:
    """Return the strategy of a Lightning Trainer.

    Args:
        trainer: Lightning's.

    Raises:
        ConfigError: it is none of the product's.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ParallelStrategy):
        raise ConfigError(
            "this module and its data need a strategy of orchestrator's",
            got=type(strategy).__name__,
            fix="lightning.Trainer(strategy=orchestrator.DTensorStrategy.from_environment())",
        )
    return strategy
