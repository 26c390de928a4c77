"""The torch-native strategy: FSDP2, HSDP, tensor and context parallelism, on any backend that torch has.

One path for every layout: `fully_shard` over the (replicate, shard) mesh, where `shard` joins fsdp and context,
after DTensor's tensor parallelism has cut what the rules give to `tensor`. Only a single device in fp32 goes
without: there `fully_shard` has nothing to split or cast and copies every parameter and gradient, which
costs about 5% of a step of 20M parameters on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.nn.functional import all_gather as differentiable_all_gather

from orchestrator.config.schema import Fp8Config
from orchestrator.distributed.coordinator import collective_timeout
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError, LayoutError
from orchestrator.hardware.target import Target
from orchestrator.models.init import draw_slice
from orchestrator.models.lora import differentiate_stream
from orchestrator.models.protocol import ShardableModel
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.parts import Parts, Reduced, heeds_flag
from orchestrator.sharding.rules import Placement
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.context_parallel import parallelize_context
from orchestrator.strategies.expert_parallel import parallelize_experts
from orchestrator.strategies.fp8_layers import Fp8Layers, choose_layers, convert_layers
from orchestrator.strategies.fully_sharding import divide_gradients, fully_shard_model, make_expert_mesh
from orchestrator.strategies.host_reads import read_later
from orchestrator.strategies.module_sharding import (
    check_reduced,
    fsdp_modules,
    is_sharded,
    materialize,
    move_others,
    own_modules,
    own_parameters,
    shard_children,
    without_gradients,
)
from orchestrator.strategies.module_state import shardable_models
from orchestrator.strategies.optimizer_shards import optimizer_shards
from orchestrator.strategies.parallel_strategy import (
    Batch,
    ParallelStrategy,
    StepHooks,
    StepParts,
    local_parameters,
)
from orchestrator.strategies.pipeline_runner import Pipeline, pipeline_of
from orchestrator.strategies.pipeline_stages import keep_own_stages, present_blocks
from orchestrator.strategies.sequence_order import SequenceOrder, gather
from orchestrator.strategies.sharded_parts import ShardedParts, as_gradients, local_part
from orchestrator.strategies.tensor_parallel import parallelize_tensor
from orchestrator.strategies.tiled_attention import attend_in_tiles

# Of what FSDP2 gathers: a layer that computes in fp8 rounds its operands itself.
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


class DTensorStrategy(ParallelStrategy):
    """See `ParallelStrategy`. `timeout_seconds` bounds a collective, too.

    Args:
        reduce_gradients: `each`: the shards of a step's gradients are summed over the micro-batches, each of which
            is reduce-scattered; `last`: whole gradients are, in fp32 on every rank, and reduced once. Copies of the
            model are summed once a step either way.
        compile: compile every block.
        fp8: the recipe, where `precision` is fp8; on a CPU it is emulated.
    """

    def __init__(
        self,
        target: Target,
        world: World,
        layout: Layout,
        precision: str,
        *,
        timeout_seconds: int = 600,
        reduce_gradients: Literal["each", "last"] = "each",
        compile: bool = False,
        fp8: Fp8Config = Fp8Config(),
    ):
        super().__init__(target, world, layout, precision, timeout_seconds)
        # Where nothing is split a reduction of each micro-batch would save nothing.
        self.reduce_each = reduce_gradients == "each" and layout.shards > 1
        self.compile, self.fp8 = compile, fp8
        self.fp8_layers: Fp8Layers | None = None
        self.mesh: DeviceMesh | None = None

    # --- set-up ---------------------------------------------------------------------------------

    @property
    def joined(self) -> bool:
        """Whether the device mesh has been built."""
        return self.mesh is not None

    def join(self) -> None:
        """Set device and precision, make the process group and build the device mesh."""
        device = self.root_device
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
        if self.precision == "fp32" or self.target.rounds_fp32_products:
            # torch's default; torch_tpu's is "medium". What a bf16 run leaves in fp32 is meant to stay so, too.
            torch.set_float32_matmul_precision("highest")
        backend = self.target.collective_backend
        if device.type != "cpu":
            backend = f"cpu:gloo,{device.type}:{backend}"
        self.coordinator.meet(backend)
        if self.world.size > 1:
            self.check_agreement()
        layout = self.layout
        ranks = torch.arange(self.world.size).reshape(layout.replicate, layout.pipeline, layout.shards, layout.tensor)
        self.mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("replicate", "pipeline", "shard", "tensor"))
        self._expert_mesh = make_expert_mesh(layout, device.type) if layout.expert > 1 else None
        self._context_group = self._make_group("context")
        self._expert_group = self._make_group("expert")
        self._pipeline_group = self._make_group("pipeline")

    def _make_group(self, axis: str) -> dist.ProcessGroup | None:
        """Return the group of this process along a mesh axis; None where it is alone. All processes call it."""
        if self.layout.degree(axis) == 1:
            return None
        seconds = collective_timeout(self.timeout_seconds)
        group, _ = dist.new_subgroups_by_enumeration(self.layout.groups(axis), timeout=seconds)
        return group

    def leave(self) -> None:
        """Leave the job's process group."""
        super().leave()
        self.mesh = None

    def shard(self, model: ShardableModel, placements: Mapping[str, Placement]) -> None:
        """Cut over `tensor`, hook in `context`, wrap in FSDP2, then allocate this rank's shards."""
        assert self.mesh is not None, "join() comes first"
        self.placements[model] = dict(placements)
        if self.precision == "fp8":
            emulated = self.root_device.type == "cpu"
            self.fp8_layers = choose_layers(model, self.fp8, placements, self.layout, emulated)
            convert_layers(model, self.fp8_layers)
        tensor_group = self.mesh.get_group("tensor") if self.layout.tensor > 1 else None
        parallelize_experts(model, placements, self.layout, self._expert_group, tensor_group, self._context_group)
        if tensor_group is not None:
            parallelize_tensor(model, placements, self.mesh["tensor"])
        if self._context_group is not None:
            order = SequenceOrder.of(self.layout)
            parallelize_context(model, self._context_group, self.layout.context_kind, order)
        else:
            attend_in_tiles(model)
        whole = model.embed.weight.shape
        stages = keep_own_stages(model, self.layout, self.world.rank)
        if self.compile:
            for block in present_blocks(model):
                block.compile(**self.target.compile_options)
        if self.layout.devices > 1 or self.precision != "fp32":
            self._fully_shard(model)
        self._allocate(model)
        if any(stage.last for stage in stages):
            model.tie_weights()
        if self._pipeline_group is not None:
            differentiate_stream(model)  # a stage sends a gradient back
            stream = (whole[1], _DTYPES[self.precision], self.root_device)
            Pipeline(model, stages, self.layout, self.world.rank, self._pipeline_group, *stream)
        self._check(model)

    def describe_precision(self) -> str:
        """Return the precision of the matrix products; of fp8 the recipe, and how many layers it computes."""
        return self.precision if self.fp8_layers is None else f"{self.precision} ({self.fp8_layers})"

    def _allocate(self, model: ShardableModel) -> None:
        """Allocate this rank's shards, unfilled, on its device."""
        model.to_empty(device=self.root_device)

    def _fully_shard(self, model: ShardableModel) -> None:
        assert self.mesh is not None
        mesh, expert_mesh = self._fsdp_mesh(self.mesh), self._fsdp_mesh(self._expert_mesh or self.mesh)
        whole = {name for name, placement in self.placements[model].items() if placement.fsdp_dim is None}
        # A pipeline's units are gathered once in a step: doing it for each micro-batch would cost more than it saves.
        fully_shard_model(model, mesh, expert_mesh, _DTYPES[self.precision], whole, self.layout.pipeline == 1)
        # The loss is divided by the global number of target tokens, so gradients add up.
        divide_gradients(model, 1)

    def _fsdp_mesh(self, mesh: DeviceMesh | None) -> DeviceMesh:
        assert mesh is not None, "join() comes first"
        return mesh["replicate", "shard"] if self.layout.replicate > 1 else mesh["shard"]

    def _check(self, model: ShardableModel) -> None:
        """Our arithmetic of who holds what is the library's, for every parameter."""
        for name, parameter in local_parameters(model):
            ours = tuple(part.stop - part.start for part in self._slices(model, name))
            assert ours == (theirs := tuple(local_part(parameter).shape)), f"{name}: {ours}, torch holds {theirs}"

    def _slices(self, model: ShardableModel, name: str) -> tuple[slice, ...]:
        return self.placements[model][name].slices(self.layout, self.world.rank)

    @torch.no_grad()
    def initialize(self, model: ShardableModel, seed: int) -> None:
        """Draw this rank's shards of the initial weights on the host."""
        placements, initializers = self.placements[model], model.starts()
        for name, parameter in local_parameters(model):
            init, local = initializers[name], local_part(parameter)
            if local.numel():
                local.copy_(draw_slice(init, name, seed, placements[name].shape, self._slices(model, name)))

    def state_shards(self, model: ShardableModel, optimizer: torch.optim.Optimizer | None) -> list[Shard]:
        """Return views of this rank's shards; units that stayed gathered are resharded first."""
        self.release_gathered(model)
        shards = []
        for name, parameter in local_parameters(model):
            placement, owns = self.placements[model][name], functools.partial(self._owns, model, name)
            place = placement.shape, self._slices(model, name)
            shards.append(Shard(f"model.{name}", *place, local_part(parameter), owns()))
            if optimizer is not None:
                shards += optimizer_shards(name, parameter, placement, optimizer, owns, (self.layout, self.world.rank))
        return shards

    def gradient_shards(self, model: ShardableModel) -> list[Shard]:
        """Return views of this rank's parts of the gradients."""
        return as_gradients(self.state_shards(model, None), local_parameters(model))

    def release_gathered(self, model: ShardableModel) -> None:
        """Reshard the units that a forward pass without a backward one (evaluation, a sample) has left gathered."""
        for module in fsdp_modules(model):
            module.reshard()

    def _owns(self, model: ShardableModel, name: str, reduced: Reduced = ()) -> bool:
        """Whether this rank writes and counts its part of a parameter: the first of those that have it."""
        pipeline = pipeline_of(model)
        copy = pipeline is not None and name in pipeline.copies
        return not copy and self.placements[model][name].is_owner(self.layout, self.world.rank, reduced)

    def parts(self, model: ShardableModel) -> Parts:
        """Return the shards and the groups that they are reduced over."""
        assert self.mesh is not None, "join() comes first"
        placements = {parameter: self.placements[model][name] for name, parameter in local_parameters(model)}
        return ShardedParts(self.mesh, self.layout, self.world.rank, placements, self._expert_mesh)

    # --- a LightningModule of the user's -----------------------------------------------------------

    def setup_environment(self) -> None:
        """Set up the environment, and give the module the device mesh where it shards itself."""
        super().setup_environment()
        if self.lightning_module is not None and self.world.size > 1 and not self.placements:
            # What Lightning's own ModelParallelStrategy sets, for `self.device_mesh` in `configure_model`.
            self.lightning_module._device_mesh = self.device_mesh

    @functools.cached_property
    def device_mesh(self) -> DeviceMesh:
        """The processes as Lightning's ModelParallelStrategy has them: `data_parallel` and `tensor_parallel`."""
        groups = self.world.size // self.layout.tensor
        ranks = torch.arange(self.world.size).reshape(groups, self.layout.tensor)
        return DeviceMesh(self.root_device.type, ranks, mesh_dim_names=("data_parallel", "tensor_parallel"))

    def _average_gradients(self, model: ShardableModel) -> None:
        # Lightning's users return the mean over the samples of a process.
        divide_gradients(model, self.layout.replicate * self.layout.shards)

    def _place_others(self, module: nn.Module) -> None:
        split = self.layout.devices > 1
        if self.precision == "fp8" and not any(True for _ in shardable_models(module)):
            raise ConfigError(
                "fp8 is for models that say what their parameters are",
                got=type(module).__name__,
                fix="let it hold an orchestrator.models.protocol.ShardableModel, or set precision='bf16'",
            )
        if split and is_sharded(module):
            materialize(own_modules(module), self.root_device)
        elif any(True for _ in own_parameters(module)):
            whole_ranks = self.layout.tensor == self.layout.context == 1
            if not whole_ranks and not any(True for _ in shardable_models(module)):
                raise LayoutError(
                    "only a model that says what its parameters are can be split along the tensor or context axis",
                    got=f"{type(module).__name__} on layout {self.layout}",
                    fix="let it hold an orchestrator.models.protocol.ShardableModel, shard in configure_model over "
                    'self.device_mesh["tensor_parallel"], or leave tensor and context at 1',
                )
            whole = not split and self.precision == "fp32"
            policy = MixedPrecisionPolicy(param_dtype=_DTYPES[self.precision], reduce_dtype=torch.float32)
            shard_children(module, None if whole else self._fsdp_mesh(self.mesh), policy)
        move_others(module, self.root_device)
        check_reduced(module, self.layout.devices // self.layout.tensor, self.layout.tensor, self.world.rank)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Wrap a micro-batch that is not the last one of its step: copies are not reduced after it."""
        units = fsdp_modules(self.lightning_module) if self.lightning_module is not None else []
        for unit in units:
            unit.set_requires_gradient_sync(self.reduce_each, recurse=False)
            unit.set_requires_all_reduce(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)
                unit.set_requires_all_reduce(True, recurse=False)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the processes; those of a tensor group hold the same, and count once.

        Args:
            tensor: of this process; anything else is returned as it is.
            group: reduce over another group of processes, each counted.
            reduce_op: `mean`, `avg`, `sum`, `min`, `max`, or one of torch's.
        """
        if not isinstance(tensor, Tensor) or self.world.size == 1:
            return tensor
        name = str(getattr(reduce_op, "name", reduce_op) or "sum").lower().rpartition(".")[2]
        result = tensor.detach().clone().contiguous()
        mean = name in ("mean", "avg")
        if mean and not result.is_floating_point():
            result = result.float()
        if mean or name == "sum":
            result = result if group is not None else self._counted(result)
            dist.all_reduce(result, group=group)
            same = self.layout.tensor * self.layout.pipeline
            counted = dist.get_world_size(group) if group is not None else self.world.size // same
            return result / counted if mean else result
        dist.all_reduce(result, getattr(dist.ReduceOp, name.upper()), group=group)
        return result

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the tensors of all processes, of equal shape, along a new first dim."""
        if self.world.size == 1:
            return tensor
        if sync_grads:
            return torch.stack(differentiable_all_gather(tensor.contiguous(), group=group))
        parts = [torch.zeros_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    # --- the step -------------------------------------------------------------------------------

    def prepare_batch(self, batch: Mapping[str, Any]) -> Batch:
        """Copy this rank's part of every sequence to its device."""
        order, at = SequenceOrder.of(self.layout), self.layout.coordinates(self.world.rank)["context"]
        result = {}
        for name, value in batch.items():
            tensor = torch.as_tensor(value)
            if self.layout.context > 1:
                tensor = order.cut(tensor, at)
            if self.root_device.type != "cpu":
                tensor = tensor.contiguous()
                pinned = tensor.pin_memory() if self.target.pin_memory else tensor
                tensor = pinned.to(self.root_device, non_blocking=self.target.pin_memory)
            result[name] = tensor
        return result

    @contextmanager
    def backward_context(self, model: ShardableModel, last: bool) -> Iterator[None]:
        """Switch FSDP2's gradient reductions on or off for a micro-batch."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or self.reduce_each)
            model.set_requires_all_reduce(last)
        yield

    def _forward_backward(
        self, model: ShardableModel, parts: Sequence[Batch], divisor: Tensor, hooks: StepHooks
    ) -> Tensor:
        pipeline = pipeline_of(model)
        if pipeline is None:
            return super()._forward_backward(model, parts, divisor, hooks)
        return pipeline.forward_backward(parts, divisor, hooks)

    def _whole_rows(self, model: ShardableModel, part: Tensor | None) -> Tensor:
        """Gather over the context group, and give it to the ranks of a pipeline that have no head."""
        if part is not None and self._context_group is not None:
            part = SequenceOrder.of(self.layout).restore(gather(part, self._context_group, dim=1))
        pipeline = pipeline_of(model)
        return cast(Tensor, part) if pipeline is None else pipeline.tell(part)

    def once_per_row(self, values: Tensor) -> Tensor:
        """Return `values` on the first rank of each context group."""
        return self._counted(values, ("context",))

    def sum_over_data(self, values: Tensor) -> Tensor:
        """All-reduce `values`, with one rank counted of those that hold the same tokens."""
        return self._sum(values, once=("tensor", "pipeline"))

    def sum_of_parts(self, values: Tensor) -> Tensor:
        """All-reduce `values`, with one rank of each tensor group counted."""
        return self._sum(values, once=("tensor",))

    def _sum(self, values: Tensor, once: Sequence[str]) -> Tensor:
        if self.world.size > 1:
            values = self._counted(values, once)
            dist.all_reduce(values)
        return values

    def _counted(self, values: Tensor, once: Sequence[str] = ("tensor", "pipeline")) -> Tensor:
        """Return a copy of `values`, or zeros: along the axes `once`, whose ranks hold the same, the first counts."""
        at = self.layout.coordinates(self.world.rank)
        speaks = not any(at[axis] for axis in once)
        return values.clone() if speaks else torch.zeros_like(values)

    def reduce_and_clip(
        self, model: ShardableModel, loss_part: Tensor, max_norm: float | None
    ) -> tuple[Tensor, Tensor]:
        """All-reduce loss and squared norm together, and scale the gradients on the device."""
        names, grads, owned = [], [], []
        for name, parameter in local_parameters(model):
            if parameter.grad is not None:
                names.append(name)
                grads.append(local_part(parameter.grad))
                owned.append(self._owns(model, name))
        squares = torch.zeros((), device=self.root_device)
        norms = torch._foreach_norm(grads) if grads else []
        if counted := [norm for norm, mine in zip(norms, owned, strict=True) if mine]:
            squares = torch.stack(counted).square().sum()
        if copies := [norm for norm, mine in zip(norms, owned, strict=True) if not mine]:
            # They count for nothing, unless one is not finite: then it must not reach this rank's weights either.
            squares = squares + 0.0 * torch.stack(copies).sum()
        self.step_parts = StepParts(loss_part, tuple(names), lambda: self.fetch(norms))
        loss = loss_part
        if self.world.size > 1:
            sums = torch.stack((self._counted(loss_part, ("tensor",)), squares))
            dist.all_reduce(sums)
            loss, squares = sums.unbind()
        norm = squares.sqrt()
        if max_norm is not None:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return loss, norm

    @contextmanager
    def update_unless(self, model: ShardableModel, optimizer: torch.optim.Optimizer, bad: Tensor) -> Iterator[None]:
        """Set `found_inf` of the optimizer, whose fused kernel then writes nothing; else take its gradients away."""
        if heeds_flag(optimizer):
            # What torch's gradient scaler tells a fused optimizer.
            setattr(optimizer, "found_inf", bad.float())  # noqa: B010
            yield
            return
        with without_gradients(model) if bool(bad) else nullcontext():  # the host waits for the flag
            yield

    def fetch_later(self, value: Tensor) -> Callable[[], float]:
        """Copy the scalar to pinned memory, and wait for that copy when it is read."""
        if value.device.type == "cpu":
            return super().fetch_later(value)
        return read_later(value, self.target.pin_memory)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Run compiled blocks eagerly: for a second shape torch would compile them again, and run the step by those."""
        return torch.compiler.set_stance("force_eager") if self.compile else nullcontext()
