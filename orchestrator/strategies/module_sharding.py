"""Sharding of modules that say nothing of themselves: any `torch.nn.Module` in a user's LightningModule.

Where the user has sharded it in `configure_model`, it is held to one thing: that the gradient of every parameter is
reduced over the processes that read other samples. Where nothing was done, each direct child of the LightningModule is
sharded by `fully_shard`, and within it each entry of a list of layers as a unit of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from orchestrator.errors import LayoutError
from orchestrator.models.protocol import ShardableModel

_NAMED = 4  # parameters that an error lists


def is_sharded(module: nn.Module) -> bool:
    """Whether the user has sharded something of `module`, outside of models that the rules place."""
    return any(isinstance(part, FSDPModule) for part in own_modules(module)) or any(
        isinstance(parameter, DTensor) for _, parameter in own_parameters(module)
    )


def shard_children(module: nn.Module, mesh: DeviceMesh | None, policy: MixedPrecisionPolicy) -> None:
    """Shard what `module` holds, by its children.

    Args:
        module: whose children are called through their `forward`.
        mesh: to shard over, and to replicate over where it has two dims; None: nothing is split, tensors are allocated.
        policy: of the precision.

    Raises:
        LayoutError: a parameter lies in no child, so that no `forward` could gather it.
    """
    if mesh is not None and (loose := [name for name, _ in _loose_parameters(module)]):
        raise LayoutError(
            "a parameter lies directly in the LightningModule, where nothing gathers it before it is used",
            got=", ".join(loose[:_NAMED]),
            fix="put it into a module of its own, or shard in configure_model: docs/lightning.md",
        )
    materialize(own_modules(module), torch.device("cpu"))
    if mesh is None:
        return
    for child in _units(module):
        _equalize(child)
        for unit in [*_layers(child), child]:
            fully_shard(unit, mesh=mesh, mp_policy=policy)


def check_reduced(module: nn.Module, groups: int, ranks_per_group: int, rank: int) -> None:
    """See that the gradient of each parameter of `module` is a sum over all processes that read other samples.

    Args:
        module: with what the user has sharded.
        groups: of processes that read other samples.
        ranks_per_group: processes that read the same ones, neighbours.
        rank: of this process.

    Raises:
        LayoutError: one is not; the copies would drift apart.
    """
    if groups == 1:
        return
    others = lambda mesh: bool((mesh.mesh // ranks_per_group != rank // ranks_per_group).any())  # noqa: E731
    missing = [
        name
        for name, parameter in own_parameters(module)
        if parameter.requires_grad and not (isinstance(parameter, DTensor) and others(parameter.device_mesh))
    ]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise LayoutError(
            "parameters are not sharded over the data-parallel processes, so nothing would reduce their gradients",
            got=", ".join(missing[:_NAMED]) + more,
            fix='fully_shard(module, mesh=self.device_mesh["data_parallel"]) in configure_model, of a module that has '
            "them, or shard nothing there",
        )


def materialize(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Allocate what is on the meta device, and let each module fill it by `reset_parameters`.

    Args:
        modules: each by itself, without its children.
        device: where.

    Raises:
        LayoutError: a module has no such method.
    """
    for part in modules:
        tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if not any(tensor.is_meta for tensor in tensors):
            continue
        reset = getattr(part, "reset_parameters", None)
        if not callable(reset):
            raise LayoutError(
                "a module is on the meta device and does not know its first weights",
                got=type(part).__name__,
                fix="give it a method reset_parameters, or create it outside of torch.device('meta')",
            )
        part.to_empty(device=device, recurse=False)
        with torch.no_grad():
            reset()


def move_others(module: nn.Module, device: torch.device) -> None:
    """Bring what is in no model that the rules place to the device, where it is on another one.

    Args:
        module: whose parameters are sharded.
        device: of this process.
    """
    for part in own_modules(module):
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.device != device:
                setattr(part, name, buffer.to(device))
        for parameter in part.parameters(recurse=False):
            if parameter.device != device:
                parameter.data = parameter.data.to(device)


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of what is in `module`, outside of the models that the rules place."""
    placed = {
        parameter for part in module.modules() if isinstance(part, ShardableModel) for parameter in part.parameters()
    }
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter not in placed)


def fsdp_modules(module: nn.Module) -> Iterable[Any]:
    """Yield the parts of `module` that `fully_shard` was called on."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield `module` and what is in it, without the models that the rules place."""
    if isinstance(module, ShardableModel):
        return
    yield module
    for child in module.children():
        yield from own_modules(child)


def _holds_model(module: nn.Module) -> bool:
    return any(isinstance(part, ShardableModel) for part in module.modules())


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the children that are sharded as wholes; around a model that the rules place, theirs."""
    for child in module.children():
        if isinstance(child, ShardableModel):
            continue
        if _holds_model(child) or isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # these have no forward
            yield from _units(child)
        elif any(True for _ in child.parameters()):
            yield child


def _loose_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    inside = {parameter for unit in _units(module) for parameter in unit.parameters()}
    return ((name, parameter) for name, parameter in own_parameters(module) if parameter not in inside)


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the entries of the lists of layers in `module`, but for lists within them."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            found += [layer for layer in child if any(True for _ in layer.parameters())]
        else:
            found += _layers(child)
    return found


def _equalize(module: nn.Module) -> None:
    """Give all processes rank 0's weights: each has drawn its own, unless all were given one seed."""
    for tensor in [*module.parameters(), *module.buffers()]:
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, 0)
        tensor.detach().copy_(whole)


@contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Take the gradients of `module` away for a while: what has none, an optimizer leaves alone to the bit.

    Args:
        module: whose parameters they are of.
    """
    kept = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in kept:
            parameter.grad = grad
