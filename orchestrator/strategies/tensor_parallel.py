"""Tensor parallelism with sequence parallelism, by DTensor.

Between the matrices of a block the residual stream is cut along the sequence over the tensor group; where
a block's attention or feed-forward begins it is gathered, and where it ends the partial sums are
reduce-scattered. Which matrix is cut which way follows from the placements that the rules gave it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement as TensorPlacement

from orchestrator.constants import LORA_A, LORA_B
from orchestrator.errors import LayoutError
from orchestrator.models.head import LMHead
from orchestrator.models.layers import Attention
from orchestrator.models.lora import LoraLinear
from orchestrator.models.loss import VocabShard, default_head_ops, positions_of
from orchestrator.models.mla import SharedKey
from orchestrator.models.norms import WidthRMSNorm
from orchestrator.models.protocol import ShardableModel, attention_cores, gathering_modules, mixtures
from orchestrator.sharding.axes import ParameterAxes
from orchestrator.sharding.rules import RULES, Placement

_SEQUENCE_DIM = 1  # of the residual stream [B, T, D]
_HEAD_DIM = 2  # of queries and keys [B, T, H, head_dim] where QK-norm sees them


def parallelize_tensor(model: ShardableModel, placements: Mapping[str, Placement], mesh: DeviceMesh) -> None:
    """Cut the parameters of `model` over `mesh` (one axis) and hook the collectives in.

    Args:
        model: on the meta device.
        placements: of the parameters.
        mesh: of the tensor axis.

    Raises:
        LayoutError: a module of the model cannot be cut as its axes say.
    """
    axes = model.logical_axes()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    gathering = gathering_modules(model, axes, lambda axis: RULES[axis] == "tensor")
    plan: dict[str, ParallelStyle] = {}
    in_mixtures = {id(module) for _, mixture in mixtures(model) for module in mixture.modules()}
    for name, module in model.named_modules():
        if id(module) in in_mixtures:
            continue  # see `expert_parallel`
        own = [f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
        if name != "head" and (known := [one for one in own if one in placements]):
            plan[name] = _style(module, {one: placements[one] for one in known}, axes)
    parallelize_module(model, mesh, plan)
    for module in gathering:
        module.register_forward_pre_hook(_gather_sequence(mesh))
    for module in model.modules():
        if isinstance(module, SharedKey):
            module.register_forward_hook(_local_key)
    for _, _, core in attention_cores(model):
        if core.sinks:
            core.register_forward_pre_hook(_local_sinks)
    _parallelize_head(model, mesh)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)  # those that were replaced were made anew


def _style(module: nn.Module, placements: Mapping[str, Placement], axes: ParameterAxes) -> ParallelStyle:
    cut = {name.rpartition(".")[2]: placement.tensor_dim for name, placement in placements.items()}
    if isinstance(module, nn.Embedding):
        # Each rank looks up the rows that it has; the sum comes back cut along the sequence.
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(_SEQUENCE_DIM))
    if isinstance(module, LoraLinear):
        layer = {name: one for name, one in placements.items() if name.rpartition(".")[2] not in (LORA_A, LORA_B)}
        return _Adapted(_style(nn.Linear(1, 1, device="meta"), layer, axes), cut[LORA_A], cut[LORA_B])
    if isinstance(module, nn.Linear) and cut["weight"] is not None:
        if cut["weight"] == 0:
            return ColwiseParallel()
        return RowwiseParallel(output_layouts=Shard(_SEQUENCE_DIM))
    if isinstance(module, WidthRMSNorm):
        return _CutNorm()
    if all(axes[name][0] == "latent" for name in placements):
        return _Whole()
    if isinstance(module, Attention) and set(cut) == {"sinks"}:
        return _CutSinks()
    if any(dim is not None for dim in cut.values()):
        name = next(name for name, placement in placements.items() if placement.tensor_dim is not None)
        raise LayoutError(
            "the tensor axis cuts matrices and embeddings alone",
            got=f"{name} {axes[name]} of a {type(module).__name__}",
            allowed="nn.Linear, nn.Embedding; parameters of other modules have the axes norm, head_dim or embed",
            fix="change the model, or set layout.tensor=1",
        )
    per_head = any(axes[name] == ("head_dim",) for name in placements)
    return SequenceParallel(sequence_dim=_HEAD_DIM if per_head else _SEQUENCE_DIM, use_local_output=True)


class _CutNorm(ParallelStyle):
    """A norm over all heads: each rank has the weights of its own, and DTensor sums the squares over the group."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, WidthRMSNorm)
        module.weight = nn.Parameter(distribute_tensor(module.weight, device_mesh, [Shard(0)]))

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (DTensor.from_local(args[0], device_mesh, [Shard(-1)], run_check=False),)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(lambda module, args, result: _to_local(result))
        return module


class _Whole(ParallelStyle):
    """A module that makes or normalises a latent of the whole sequence: every rank has all of it, and does the same.

    Its input and its result stay DTensors: gradients come back from the matrices of a rank's heads as summands.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(parameter, device_mesh, [Replicate()])))
        return module


class _CutSinks(ParallelStyle):
    """Attention's own parameters, the sinks: each rank has those of its heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Attention)
        assert module.sinks is not None
        module.sinks = nn.Parameter(distribute_tensor(module.sinks, device_mesh, [Shard(0)]))
        return module


# Whether A and whether B is cut -> whether this rank's gradients of x, A and B are summands; how the result lies.
_LIES: dict[tuple[bool, bool], tuple[tuple[bool, bool, bool], TensorPlacement]] = {
    (False, True): ((True, True, False), Shard(-1)),
    (True, False): ((False, False, True), Partial()),
    (False, False): ((False, False, False), Replicate()),
}


class _Adapted(ParallelStyle):
    """A linear layer with an adapter: of one of the adapter's matrices each rank has a part, as of the layer's.

    What the adapter adds is computed on local tensors, and lies as the layer's own result: a rank's columns, or its
    summand of all of them.

    Args:
        layer: the style of the layer without its adapter.
        a: the dim of A that is cut, where the layer's input is.
        b: the dim of B that is cut, where the layer's output is.
    """

    def __init__(self, layer: ParallelStyle, a: int | None, b: int | None):
        super().__init__()
        self._layer, self._cut = layer, {LORA_A: a, LORA_B: b}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, LoraLinear)
        taken = {leaf: module._parameters.pop(leaf) for leaf in self._cut}
        self._layer._apply(module, device_mesh)
        for leaf, parameter in taken.items():
            assert parameter is not None
            dim = self._cut[leaf]
            whole = distribute_tensor(parameter, device_mesh, [Replicate() if dim is None else Shard(dim)])
            module.register_parameter(leaf, nn.Parameter(whole))
        layer, partial, out = module, *_LIES[self._cut[LORA_A] is not None, self._cut[LORA_B] is not None]

        def delta(x: Tensor) -> Tensor:
            tensors = zip((x, layer.lora_a, layer.lora_b), partial, strict=True)
            part = layer.adapt(*(_local_of(tensor, summand) for tensor, summand in tensors))
            return DTensor.from_local(part, device_mesh, [out], run_check=False)

        module.delta = delta
        return module


def _local_of(tensor: Tensor, summand: bool) -> Tensor:
    """Return this rank's part of a DTensor; its gradient here is a summand, or lies as the tensor does."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local(grad_placements=[Partial()] if summand else tensor.placements)


def _local_key(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
    # Each rank's heads give a summand of the gradient of the key that they share.
    return result.to_local(grad_placements=[Partial()]) if isinstance(result, DTensor) else result


def _local_sinks(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*args[:4], *map(_to_local, args[4:]))


def _gather_sequence(mesh: DeviceMesh) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Stays a DTensor: the gradients that come back from several matrices are partial sums, and it knows.
        whole = DTensor.from_local(args[0], mesh, [Shard(_SEQUENCE_DIM)], run_check=False).redistribute(
            mesh, [Replicate()]
        )
        return (whole, *args[1:])

    return hook


def _parallelize_head(model: ShardableModel, mesh: DeviceMesh) -> None:
    head = model.head
    if model.config.tied_embeddings:
        model.tie_weights()
    else:
        distribute_module(head, mesh, _shard_vocabulary)
    group = mesh.get_group()
    ops = head.ops
    rows = head.weight.shape[0] // mesh.size()
    vocab = VocabShard(
        rows * mesh.get_local_rank(), _all_reduce(group, dist.ReduceOp.MAX), _all_reduce(group, dist.ReduceOp.SUM)
    )

    def gather(hidden: Tensor) -> Tensor:
        whole = DTensor.from_local(hidden, mesh, [Shard(_SEQUENCE_DIM)], run_check=False).redistribute(
            mesh, [Replicate()]
        )
        # Every rank's gradient is that of its part of the vocabulary.
        return whole.to_local(grad_placements=[Partial()])

    ours = default_head_ops(ops.chunk_tokens, ops.softcap, vocab)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, *more: Any) -> Tensor:
        return ours.loss(gather(hidden), _to_local(weight), targets, *more)

    def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return ours.token_losses(gather(hidden), _to_local(weight), targets)

    def logits(hidden: Tensor, weight: Tensor, at: Tensor | None) -> Tensor:
        wanted = positions_of(gather(hidden), at)
        part = DTensor.from_local(wanted @ _to_local(weight).T, mesh, [Shard(-1)], run_check=False)
        return part.full_tensor()

    head.ops = replace(ours, loss=loss, token_losses=token_losses, logits=logits)


def _shard_vocabulary(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    assert isinstance(module, LMHead)
    module.register_parameter("weight", nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)])))


def _all_reduce(group: dist.ProcessGroup, op: Any) -> Callable[[Tensor], Tensor]:
    def reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, op, group=group)
        return tensor

    return reduce


def _to_local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
