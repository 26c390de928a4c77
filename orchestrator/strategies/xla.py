"""The XLA strategy: torch_xla in SPMD mode, one process per host over all devices of all hosts.

The program is written as for one device; the placement of parameters and batches says how the compiler splits
it (GSPMD, arXiv 2105.04663) and it puts in the collectives. Layout and rules are those of the torch-native
strategy. One graph is compiled per optimizer step, one more per micro-batch where gradients are accumulated.

Every host runs the same program in the same order, else the devices wait for each other for ever: nothing here may
depend on the rank but what is written to files. What hosts decide together they decide on their CPUs, by
`ProcessCoordinator`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch_xla.utils.checkpoint import checkpoint as xla_checkpoint

from orchestrator.distributed.world import World
from orchestrator.errors import HardwareError
from orchestrator.hardware.mesh import order_devices
from orchestrator.hardware.target import Target
from orchestrator.models.expert_dispatch import SlotDispatch
from orchestrator.models.init import draw_slice
from orchestrator.models.lora import differentiate_stream
from orchestrator.models.loss import HeadOps, ZLoss, default_head_ops
from orchestrator.models.protocol import ShardableModel, attend_in_blocks, mixtures
from orchestrator.sharding.axes import MESH_AXES
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.parts import Reduced, reduced_dims
from orchestrator.sharding.pipeline import no_pipelines
from orchestrator.sharding.rules import Placement
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.parallel_strategy import Batch, ParallelStrategy, StepParts, local_parameters
from orchestrator.strategies.replicas import HeldPart
from orchestrator.strategies.xla_shards import copied, send_back, slices_of

_BATCH_AXES = ("replicate", "fsdp", "expert")
_ATTENTION_BLOCK = 512  # queries whose scores exist at one time


class XlaStrategy(ParallelStrategy):
    """See `ParallelStrategy`."""

    static_shapes = True

    def __init__(self, target: Target, world: World, layout: Layout, precision: str, timeout_seconds: float = 600):
        super().__init__(target, world, layout, precision, timeout_seconds)
        self._mesh: Any = None

    # --- set-up ---------------------------------------------------------------------------------

    @property
    def joined(self) -> bool:
        """Whether the device mesh has been built."""
        return self._mesh is not None

    def join(self) -> None:
        """Meet the other hosts, start the runtime in SPMD mode and build the mesh."""
        if self.layout.pipeline > 1:
            raise no_pipelines(self.layout)
        if self.world.size > 1:
            # Before the runtime starts, which waits for the devices of all hosts and does not say for whom.
            self.coordinator.meet("gloo")
            self.check_agreement()
        xr.use_spmd()
        devices = self._devices()
        self._check_devices(len(devices))
        degrees = tuple(self.layout.as_dict().values())
        self._mesh = self._make_mesh(order_devices(devices, degrees).flatten(), degrees)

    def _make_mesh(self, device_ids: np.ndarray, degrees: tuple[int, ...]) -> xs.Mesh:
        """Return the mesh of `degrees`, one for each mesh axis, over the devices of these numbers."""
        return xs.Mesh(device_ids, degrees, MESH_AXES)

    def _execute(self) -> None:
        """Compile and run what has been traced so far."""
        torch_xla.sync()

    def _devices(self) -> list[Mapping[str, Any]]:
        """Attributes of all devices of the job, in the order of their numbers (`TPU:12`)."""
        found: list[Mapping[str, Any]] = xr.global_runtime_device_attributes()
        return sorted(found, key=lambda device: int(device["name"].rpartition(":")[2]))

    def _check_devices(self, count: int) -> None:
        processes = xr.process_count()
        if processes != self.world.size:
            raise HardwareError(
                "the runtime has another number of processes than were started",
                got=f"{processes} by the runtime, {self.world.size} by the launcher ({self.world.engine})",
                fix="start one process on every host of every slice: docs/xla.md",
            )
        if count != self.layout.devices:
            per_host = f" on {self.world.size} hosts" if self.world.size > 1 else ""
            raise HardwareError(
                "the runtime has another number of devices than the layout",
                got=f"{count} devices{per_host}, layout {self.layout} = {self.layout.devices}",
                fix=f"set hardware.devices={count // self.world.size}",
            )

    @property
    def root_device(self) -> torch.device:
        """torch_xla's device: all devices of the mesh as one."""
        return torch_xla.device()

    @property
    def data_share(self) -> tuple[int, int]:
        """Return (0, 1): every host reads the whole batch and sends its devices their parts."""
        # Every host reads the whole batch and sends its devices their parts: see `_send`. Tokens are small: four
        # arrays of int64 are 64 MiB for 2,097,152 tokens, and rows need not be where a host's devices want them.
        return 0, 1

    def shard(self, model: ShardableModel, placements: Mapping[str, Placement]) -> None:
        """Send zeros for every parameter, split over the mesh on the way, and chunk attention and loss."""
        self.placements[model] = dict(placements)
        for name, parameter in list(model.named_parameters()):
            path, _, leaf = name.rpartition(".")
            # Split on the way from the host: no device ever holds the whole.
            placed = self._send(torch.zeros(parameter.shape), self._spec(model, name))
            setattr(model.get_submodule(path), leaf, nn.Parameter(placed, parameter.requires_grad))
        model.tie_weights()
        differentiate_stream(model)  # torch_xla's checkpoint is reentrant
        for block in model.blocks:
            # Else the compiler may begin the backward pass of many blocks together and keep all their gathered
            # weights: 8B over fsdp 256 on v5e then needs 17 GiB a device, with it 5.3 (its own memory analysis).
            xs.apply_backward_optimization_barrier(block)
        attend_in_blocks(model, _ATTENTION_BLOCK, self.checkpoint)
        for _, mixture in mixtures(model):
            # Shapes that do not depend on the router: else every step would be another program.
            mixture.experts.dispatch = SlotDispatch(self._to_experts, self._to_tokens)
            mixture.router.register_forward_hook(lambda router, args, logits: self._whole_scores(logits))
        model.head.ops = self._head_ops(model.head.ops)

    def _to_experts(self, slots: Tensor) -> Tensor:
        """Divide slots [B, E, C, D] over the ranks that have their experts: the compiler puts in an all-to-all."""
        return self._constrain(slots, ("replicate", "fsdp"), "expert")

    def _to_tokens(self, answers: Tensor) -> Tensor:
        return self._constrain(answers, _BATCH_AXES, None)

    def _constrain(self, slots: Tensor, rows: tuple[str, ...], experts: str | None) -> Tensor:
        # Rows that the devices cannot share, such as a sample's one, are on all of them.
        shared = rows if slots.shape[0] % self.layout.data_parallel == 0 else None
        constrained: Tensor = xs.mark_sharding_with_gradients(slots, self._mesh, (shared, experts, None, None))
        return constrained

    def _whole_scores(self, logits: Tensor) -> Tensor:
        """Keep a router's scores [B, T, E] whole along the experts: divided, the partitioner cannot take the best."""
        shared = _BATCH_AXES if logits.shape[0] % self.layout.data_parallel == 0 else None
        constrained: Tensor = xs.mark_sharding_with_gradients(logits, self._mesh, (shared, "context", None))
        return constrained

    def _head_ops(self, ops: HeadOps) -> HeadOps:
        """Compute the loss in chunks along the sequence: each then holds the same share of every device's rows."""

        def chunks(hidden: Tensor) -> Iterator[tuple[slice, HeadOps]]:
            rows = max(1, hidden.shape[0] // self.layout.data_parallel)
            length = max(1, ops.chunk_tokens // rows)
            for start in range(0, hidden.shape[1], length):
                at = slice(start, min(start + length, hidden.shape[1]))
                yield at, default_head_ops(hidden.shape[0] * (at.stop - at.start), ops.softcap)

        def loss(
            hidden: Tensor,
            weight: Tensor,
            targets: Tensor,
            weights: Tensor | None = None,
            penalty: ZLoss | None = None,
            found: list[Tensor] | None = None,
        ) -> Tensor:
            total = torch.zeros((), device=hidden.device)
            for at, part in chunks(hidden):
                factors = None if weights is None else weights[:, at]
                total = total + part.loss(hidden[:, at], weight, targets[:, at], factors, penalty, found)
            return total

        def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            parts = [part.token_losses(hidden[:, at], weight, targets[:, at]) for at, part in chunks(hidden)]
            losses, greedy = zip(*parts, strict=True)
            return torch.cat(losses, 1), torch.cat(greedy, 1)

        return replace(ops, loss=loss, token_losses=token_losses)

    def _spec(self, model: ShardableModel, name: str, reduced: Reduced = ()) -> tuple[Any, ...]:
        """Return the parameter's partition: as `Placement.slices`, tensor outside, fsdp and context inside."""
        placement = self.placements[model][name]
        spec: list[tuple[str, ...]] = [() for _ in placement.shape]
        if placement.expert_dim is not None:
            spec[placement.expert_dim] = ("expert",)
        if placement.tensor_dim is not None:
            spec[placement.tensor_dim] = ("tensor",)
        if spec and placement.fsdp_dim is not None:
            inside = ("fsdp", "expert", "context") if placement.expert_dim is None else ("fsdp", "context")
            spec[placement.fsdp_dim] = (*spec[placement.fsdp_dim], *inside)
        return tuple(None if dim in reduced else axes or None for dim, axes in enumerate(spec))

    def _send(self, tensor: Tensor, spec: tuple[Any, ...]) -> Tensor:
        # Under SPMD the host keeps the data until it is known how to split it. The transfer that takes a
        # `ShardingSpec` itself fails where fewer mesh axes than there are split every dim (torch_xla 2.9).
        # The tensor is the global one on every host, and a host sends what its own devices hold: torch_xla 2.9.0,
        # CreateTensorsData in csrc/tensor_util.cpp cuts it by ShardTensor for GetLocalDevices.
        placed = tensor.to(self.root_device)
        xs.mark_sharding(placed, self._mesh, spec)
        return placed

    def prepare_optimizer(self, model: ShardableModel, optimizer: torch.optim.Optimizer) -> None:
        """Send zeros for the optimizer's state, split as its parameters."""
        reduced = reduced_dims(optimizer)
        for name, parameter in local_parameters(model):
            state = optimizer.state[parameter]
            for key, value in state.items():
                if value.dim():
                    spec = self._spec(model, name, reduced.get(key, ()))
                    state[key] = self._send(torch.zeros(value.shape, dtype=value.dtype), spec)
        self._execute()

    def initialize(self, model: ShardableModel, seed: int) -> None:
        """Draw the shards of this host's devices on the host, and send them."""
        initializers, shards = model.starts(), self.state_shards(model, None)
        for shard in shards:
            name = shard.name.removeprefix("model.")
            shard.data.copy_(draw_slice(initializers[name], name, seed, shard.shape, shard.slices))
        self.adopt(model, None, shards)

    def _named(self, model: ShardableModel, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Tensor]]:
        """Full names and global tensors of all state."""
        for name, parameter in local_parameters(model):
            yield f"model.{name}", parameter
            for key, value in (optimizer.state[parameter] if optimizer else {}).items():
                yield f"optimizer.{key}.{name}", value

    def _updated(self, model: ShardableModel, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
        """Of all state what a step may change."""
        frozen = {f"model.{name}" for name, parameter in local_parameters(model) if not parameter.requires_grad}
        return ((name, tensor) for name, tensor in self._named(model, optimizer) if name not in frozen)

    def state_shards(self, model: ShardableModel, optimizer: torch.optim.Optimizer | None) -> list[Shard]:
        """Copy the shards of this host's devices to the host."""
        self._execute()
        return copied(self._named(model, optimizer), self.is_global_zero)

    def weight_shards(self, model: ShardableModel, names: Collection[str]) -> list[Shard]:
        """Copy the shards of some weights to the host."""
        self._execute()
        return copied(((name, one) for name, one in self._named(model, None) if name in names), self.is_global_zero)

    def gradient_shards(self, model: ShardableModel) -> list[Shard]:
        """Copy this host's parts of the gradients to the host."""
        for name, parameter in local_parameters(model):
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                xs.mark_sharding(parameter.grad, self._mesh, self._spec(model, name))
        # What the program has not computed yet has no value that could be read.
        torch_xla.sync(wait=True)
        return copied(self._gradients_of(model), self.is_global_zero)

    def adopt_gradients(self, model: ShardableModel, shards: Sequence[Shard]) -> None:
        """Send the filled parts of the gradients back to the devices."""
        send_back(self._gradients_of(model), shards)
        self._execute()

    def _gradients_of(self, model: ShardableModel) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in local_parameters(model):
            if parameter.requires_grad and parameter.grad is not None:
                yield f"gradient.{name}", parameter.grad

    def held_parts(self, model: ShardableModel, optimizer: torch.optim.Optimizer) -> list[HeldPart]:
        """Copy what each device of this host holds to the host, as a save does; a scalar is read from one device."""
        self._execute()
        parts = []
        for name, tensor in self._named(model, optimizer):
            if tensor.dim() == 0:
                parts.append(HeldPart(name, (), "one device of the host", tensor.cpu()))
                continue
            for part in xs.wrap_if_sharded(tensor.data).local_shards:
                slices = slices_of(part.indices, tensor.shape)
                parts.append(HeldPart(name, slices, part.shard_device, part.unpadded_data))
        return parts

    def adopt(self, model: ShardableModel, optimizer: torch.optim.Optimizer | None, shards: Sequence[Shard]) -> None:
        """Send the filled shards back to the devices."""
        send_back(self._named(model, optimizer), shards)
        self._execute()

    # --- the step -------------------------------------------------------------------------------

    def prepare_batch(self, batch: Mapping[str, Any]) -> Batch:
        """Send the batch, split over the data axes and `context`."""
        tensors = {name: torch.as_tensor(value) for name, value in batch.items()}
        return {name: self._send(tensor, (self._rows_of(tensor), "context")) for name, tensor in tensors.items()}

    def _rows_of(self, tensor: Tensor) -> tuple[str, ...] | None:
        """Return the axes that divide the rows: those that devices cannot share, such as a sample's one, are on all."""
        return _BATCH_AXES if tensor.shape[0] % self.layout.data_parallel == 0 else None

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast to bf16, where that is the precision."""
        return torch.autocast("xla", torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def checkpoint(self) -> Callable[..., Any]:
        """torch_xla's function that recomputes activations; torch's needs a module `torch.xla`."""
        # torch's own looks for a module torch.xla, which there is not.
        return xla_checkpoint

    @contextmanager
    def backward_context(self, model: ShardableModel, last: bool) -> Iterator[None]:
        """Mark the gradients of earlier micro-batches as split, and execute each micro-batch."""
        yield
        if not last:
            for name, parameter in local_parameters(model):
                if parameter.grad is not None:
                    # Left alone the compiler gives a whole gradient to every device of fsdp.
                    xs.mark_sharding(parameter.grad, self._mesh, self._spec(model, name))
            self._execute()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Wrap a micro-batch that is not the last one of its step."""
        yield
        for model in self.placements:
            with self.backward_context(model, last=False):
                pass

    def finish_step(self) -> None:
        """Compile and run the step."""
        self._execute()

    def _whole_rows(self, model: ShardableModel, part: Tensor | None) -> Tensor:
        """Let every device have all of it: else reading it would be one more program."""
        assert part is not None
        xs.mark_sharding(part, self._mesh, (None,) * part.dim())
        return part

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Return `values`: a tensor is global here."""
        # A tensor is global here: what a rank has is already the sum.
        return values

    def reduce_and_clip(
        self, model: ShardableModel, loss_part: Tensor, max_norm: float | None
    ) -> tuple[Tensor, Tensor]:
        """Compute the norm of the global gradients, and scale them."""
        named = [(name, grad) for name, parameter in local_parameters(model) if (grad := parameter.grad) is not None]
        grads = [grad for _, grad in named]
        squares = torch.stack([grad.square().sum() for grad in grads])
        norm = squares.sum().sqrt()
        self.step_parts = StepParts(loss_part, tuple(name for name, _ in named), squares.tolist)
        if max_norm is not None:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads:
                grad.mul_(scale)
        return loss_part, norm

    @contextmanager
    def update_unless(self, model: ShardableModel, optimizer: torch.optim.Optimizer, bad: Tensor) -> Iterator[None]:
        """Select old or new values of weights and state on the device, as a part of the step's graph."""
        # Part of the step's graph: the compiler chooses element by element where it computes the update, in place.
        before = {name: tensor.detach().clone() for name, tensor in self._updated(model, optimizer)}
        yield
        with torch.no_grad():
            for name, tensor in self._updated(model, optimizer):
                # What a user's optimizer has made in this step begins as zeros.
                old = before.get(name, torch.zeros_like(tensor))
                tensor.copy_(torch.where(bad, old, tensor))

    def fetch(self, values: Sequence[Tensor]) -> list[float]:
        """Read the scalars one by one: stacking them would compile a graph."""
        # One by one: each is on the device already, while stacking them would compile a graph. Scalars are whole on
        # every device, so a host reads its own copy; of a tensor that is split, a read would be a collective.
        assert all(value.dim() == 0 for value in values)
        return [value.item() for value in values]

    def seed_masks(self, key: str) -> None:
        """Seed the device's generator with a hash of `key`, the same on every host."""
        # A mask is drawn for the global tensor: the same seed on every host. torch.manual_seed does not reach it.
        xm.set_rng_state(_number(key))

    # --- writing text ---------------------------------------------------------------------------

    def prepare_rows(self, array: Tensor) -> Tensor:
        """Send an array [B, ...], its rows divided over the data axes."""
        return self._send(array, (self._rows_of(array), *[None] * (array.dim() - 1)))

    def read_rows(self, logits: Tensor) -> Tensor:
        """Execute the pass, whose logits every host reads whole."""
        logits = logits.detach().float()
        xs.mark_sharding(logits, self._mesh, (None,) * logits.dim())
        self._execute()
        return logits.cpu()

    def share_rows(self, tokens: Tensor) -> Tensor:
        """Return `tokens`: every host has the rows of all."""
        return tokens.unsqueeze(0)

    def make_rows_cache(self, shape: Sequence[int]) -> Tensor:
        """Send zeros for keys or values of a layer, divided over rows and heads."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return self._send(torch.zeros(tuple(shape), dtype=dtype), self._cache_spec(shape))

    def keep_rows_cache(self, buffer: Tensor) -> Tensor:
        """Mark a new buffer as divided like the one that it follows."""
        xs.mark_sharding(buffer, self._mesh, self._cache_spec(buffer.shape))
        return buffer

    def _cache_spec(self, shape: Sequence[int]) -> tuple[Any, ...]:
        heads = "tensor" if shape[1] % self.layout.tensor == 0 else None
        rows = _BATCH_AXES if shape[0] % self.layout.data_parallel == 0 else None
        return rows, heads, None, None

    def compilations(self) -> int | None:
        """Return the runtime's count of compiled graphs."""
        data = met.metric_data("CompileTime")
        return int(data[0]) if data else 0


def _number(key: str) -> int:
    """32 bits of a hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
