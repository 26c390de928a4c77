"""The tensors of any placed module and its optimizers, as parts of named global tensors.

Weights are named as the module's `state_dict` names them, behind `model.`; a module that keeps everything in one
attribute `model` has the names of that attribute's, which are those of the product's own checkpoints.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from orchestrator.checkpoint.format import StoredTensor
from orchestrator.checkpoint.plain_values import PlainEncoder, decode
from orchestrator.checkpoint.reader import DTYPES
from orchestrator.checkpoint.writer import DTYPE_NAMES
from orchestrator.errors import CheckpointError
from orchestrator.models.protocol import ShardableModel
from orchestrator.sharding.parts import blocks, reduced_dims
from orchestrator.sharding.shard import Shard

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # that torch puts into names
# Of a parameter group: what suits the devices of now.
_NOT_RESTORED = {"params", "fused", "foreach", "capturable", "differentiable"}


class OptimizerView:
    """The state of several optimizers as of one, tensors alone.

    Attributes:
        state: parameter -> tensors by key.
        reduced_dims: as an optimizer of the product's has them.
        blocks: the same.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.state: dict[Any, dict[str, Tensor]] = defaultdict(dict)
        self.reduced_dims: dict[str, tuple[int, ...]] = {}
        self.blocks: dict[str, int] = {}
        for optimizer in optimizers:
            self.reduced_dims.update(reduced_dims(optimizer))
            self.blocks.update(blocks(optimizer))
            for parameter, values in optimizer.state.items():
                tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
                if parameter in self.state:
                    raise CheckpointError("a parameter has two optimizers", fix="give each parameter to one of them")
                self.state[parameter] = tensors


class ModuleState:
    """What of a module is saved and restored.

    Args:
        module: placed.
        optimizers: over its parameters.
        rank: of this process.
        state_shards: the strategy's: the parts of a model that it has placed, and of its optimizer's state.
        adopt: the strategy's: takes over what was written into them.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        rank: int,
        state_shards: Callable[[ShardableModel, Any], list[Shard]],
        adopt: Callable[[ShardableModel, Any, Sequence[Shard]], None],
    ):
        self.module, self.optimizers, self.rank = module, list(optimizers), rank
        self._state_shards, self._adopt = state_shards, adopt
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # A forward pass without a backward one leaves some units gathered, with other parameters.
                part.reshard()
        self._models = dict(shardable_models(module))
        self._tensors = {clean(key): value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
        self._bare = all(name.startswith("model.") for name in self._tensors)

    def state_dict(self) -> dict[str, Any]:
        """Return the module's `state_dict`: this process's parts, none of them copied."""
        return self.module.state_dict()

    def buffer_names(self) -> set[str]:
        """Return the names in a checkpoint of what is no parameter."""
        parameters = {clean(name) for name, _ in self.module.named_parameters(remove_duplicate=False)}
        return {f"model.{self._stored(name)}" for name in self._tensors if name not in parameters}

    def _stored(self, name: str) -> str:
        """Return the name in a checkpoint, behind `model.` or `optimizer.<key>.`."""
        return name.removeprefix("model.") if self._bare else name

    def shards(self, saved: Mapping[str, Any] | None = None, optimizers: bool = True) -> list[Shard]:
        """Return the parts of this process.

        Args:
            saved: the `state_dict` to be saved, which callbacks may have changed; None: the module's own.
            optimizers: with their state.

        Raises:
            CheckpointError: something is kept that no checkpoint can hold.
        """
        given = None if saved is None else {clean(key): value for key, value in saved.items()}
        view = OptimizerView(self.optimizers) if optimizers else None
        shards: list[Shard] = []
        for path, model in self._models.items():
            for shard, name in self._of_model(path, model, view):
                weight = shard.name.startswith("model.")
                if not weight or given is None or (name in given and self._is_own(name, given[name])):
                    shards.append(shard)
        done = {shard.name for shard in shards}
        for name, tensor in (self._tensors if given is None else given).items():
            full = f"model.{self._stored(name)}"
            tied = any(name.startswith(f"{path}.") for path in self._models) and self._is_own(name, tensor)
            if isinstance(tensor, Tensor) and full not in done and not tied:
                shards.append(part_of(full, tensor, self.rank))
        if view is not None:
            shards += self._optimizer_shards(view)
        return shards

    def _is_own(self, name: str, tensor: Any) -> bool:
        own = self._tensors.get(name)
        if own is None or not isinstance(tensor, Tensor):
            return False
        return tensor is own or (tensor.device.type != "xla" and _address(tensor) == _address(own))

    def _of_model(self, path: str, model: ShardableModel, view: OptimizerView | None) -> Iterator[tuple[Shard, str]]:
        """Yield the parts of a model that a strategy has placed, renamed, and the name of the parameter."""
        names = {f"model.{name}": (name, "model.") for name, _ in model.named_parameters()}
        if view is not None:
            for name, parameter in model.named_parameters():
                names |= {f"optimizer.{key}.{name}": (name, f"optimizer.{key}.") for key in view.state[parameter]}
        for shard in self._state_shards(model, view):
            name, kind = names[shard.name]
            full = f"{path}.{name}" if path else name
            yield replace(shard, name=kind + self._stored(full)), full

    def _others(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that lie in no model that a strategy has placed."""
        placed = {parameter for model in self._models.values() for parameter in model.parameters()}
        for name, parameter in self.module.named_parameters():
            if parameter not in placed:
                yield clean(name), parameter

    def _optimizer_shards(self, view: OptimizerView) -> Iterator[Shard]:
        for name, parameter in self._others():
            for key, value in view.state[parameter].items():
                full = f"optimizer.{key}.{self._stored(name)}"
                if value.dim() and value.shape != parameter.shape:
                    raise CheckpointError(
                        "an optimizer keeps what no checkpoint can hold",
                        got=f"'{key}' of {list(value.shape)} for the parameter '{name}' of {list(parameter.shape)}",
                        allowed="tensors, each a scalar or shaped as its parameter, and plain values",
                        fix="take another optimizer",
                    )
                yield part_of(full, value, self.rank)

    # --- what of optimizers is no tensor, or has to be allocated --------------------------------------

    def describe_optimizers(self, encoder: PlainEncoder) -> list[dict[str, Any]]:
        """Return, for JSON, the groups of each optimizer, and the keys and plain values of its state.

        Args:
            encoder: of values that JSON has no words for.
        """
        names: dict[Tensor, str] = {
            parameter: self._stored(clean(name)) for name, parameter in self.module.named_parameters()
        }
        result = []
        for number, optimizer in enumerate(self.optimizers):
            groups = [
                {
                    "params": [names[parameter] for parameter in group["params"]],
                    "values": encoder.encode(_values(group), f"optimizers[{number}].param_groups"),
                }
                for group in optimizer.param_groups
            ]
            state = {
                names[parameter]: {
                    "tensors": [key for key, value in values.items() if isinstance(value, Tensor)],
                    "values": encoder.encode(
                        {key: value for key, value in values.items() if not isinstance(value, Tensor)},
                        f"optimizers[{number}].state",
                    ),
                }
                for parameter, values in optimizer.state.items()
                if parameter in names
            }
            result.append({"class": type(optimizer).__name__, "groups": groups, "state": state})
        return result

    def prepare_optimizers(self, described: Sequence[Any], stored: Mapping[str, StoredTensor]) -> None:
        """Restore groups and plain values, and allocate the state that a checkpoint has.

        Args:
            described: what `describe_optimizers` returned when it was saved.
            stored: its tensors.

        Raises:
            CheckpointError: it is of other optimizers.
        """
        names = {self._stored(clean(name)): parameter for name, parameter in self.module.named_parameters()}
        mine: dict[Tensor, str] = {parameter: name for name, parameter in names.items()}
        try:
            for optimizer, entry in zip(self.optimizers, described, strict=True):
                for group, saved in zip(optimizer.param_groups, entry["groups"], strict=True):
                    if [mine[parameter] for parameter in group["params"]] != saved["params"]:
                        raise ValueError("a parameter group has other parameters")
                    _restore_group(group, decode(saved["values"]))
                for name, saved in entry["state"].items():
                    parameter, state = names[name], optimizer.state[names[name]]
                    state.update(decode(saved["values"]))
                    for key in saved["tensors"]:
                        if key not in state:
                            state[key] = _allocate(parameter, stored[f"optimizer.{key}.{name}"], optimizer)
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                "the checkpoint is of another optimizer",
                got=f"{type(error).__name__}: {error}",
                fix="return from configure_optimizers what the saved training had, or load the weights alone",
            ) from error

    def adopt(self, shards: Sequence[Shard], optimizers: bool) -> None:
        """Take over what a restore has written into `shards`, where those are copies.

        Args:
            shards: of this process.
            optimizers: whether state of optimizers is among them.
        """
        view = OptimizerView(self.optimizers) if optimizers else None
        filled: dict[str, list[Shard]] = defaultdict(list)
        for shard in shards:
            filled[shard.name].append(shard)
        for path, model in self._models.items():
            parts = self._state_shards_as_stored(path, model, view, filled)
            self._adopt(model, view, parts)

    def _state_shards_as_stored(
        self, path: str, model: ShardableModel, view: OptimizerView | None, filled: Mapping[str, list[Shard]]
    ) -> list[Shard]:
        own: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            stored = self._stored(f"{path}.{name}" if path else name)
            own[f"model.{stored}"] = f"model.{name}"
            for key in view.state[parameter] if view is not None else ():
                own[f"optimizer.{key}.{stored}"] = f"optimizer.{key}.{name}"
        return [
            replace(shard, name=ours) for stored, ours in own.items() if stored in filled for shard in filled[stored]
        ]


def shardable_models(module: nn.Module) -> Iterator[tuple[str, ShardableModel]]:
    """Yield the outermost models in `module` that the sharding rules can place, with their paths."""
    found: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, ShardableModel) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            yield name, part


def clean(name: str) -> str:
    """Return `name` without what torch's wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def part_of(name: str, tensor: Tensor, rank: int) -> Shard:
    """Return this process's part of a tensor that torch has placed; a plain one is whole on every process.

    Args:
        name: in the checkpoint.
        tensor: a DTensor or a plain one.
        rank: of this process.

    Raises:
        CheckpointError: the format has no such dtype, or its parts are summands.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"tensor '{name}' has a dtype that checkpoints do not have",
            got=tensor.dtype,
            allowed=", ".join(DTYPE_NAMES.values()),
        )
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Shard(name, tuple(tensor.shape), tuple(slice(0, size) for size in tensor.shape), tensor, rank == 0)
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise CheckpointError(f"tensor '{name}' is a sum that was not added up", got=placements)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    slices = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    at: Sequence[int] = mesh.get_coordinate() or ()
    first = all(index == 0 for index, placement in zip(at, placements, strict=True) if isinstance(placement, Replicate))
    # A mesh of some of the ranks has copies beside it: the one with rank 0 writes.
    return Shard(name, tuple(tensor.shape), slices, tensor.to_local(), first and bool((mesh.mesh == 0).any()))


def _address(tensor: Tensor) -> tuple[int, int]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.data_ptr(), local.numel()


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _NOT_RESTORED}


def _restore_group(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)  # compiled and captured steps hold on to it
        else:
            group[key] = value


def _allocate(parameter: Tensor, stored: StoredTensor, optimizer: torch.optim.Optimizer) -> Tensor:
    dtype = DTYPES[stored.dtype]
    if stored.shape == ():
        group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
        # torch's rule: on the host, unless the kernel reads it.
        on_device = group.get("fused") or group.get("capturable")
        return torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")
    if stored.shape != tuple(parameter.shape):
        raise ValueError(f"state of shape {stored.shape} for a parameter of {tuple(parameter.shape)}")
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
