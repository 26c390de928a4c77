"""Products in 8-bit floats: the linear layers of a model, and the products of its experts, on scaled fp8 operands.

Everything else is as in bf16: parameters keep their names, dtype and placement, since a layer rounds what it is given
when it is called, after FSDP2 has gathered it. So a checkpoint holds nothing of fp8.

Scales are computed from what a product is given, at every call, and nothing is kept from one step to the next. With the
axis `tensor` the recipes that scale by the largest of a row or a tensor do so over the whole of it (torchao computes
them on DTensors), mxfp8 in blocks of 32 that lie within a part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard

from orchestrator.config.schema import Fp8Config
from orchestrator.errors import ConfigError
from orchestrator.models.protocol import ShardableModel, mixtures
from orchestrator.sharding.axes import ParameterAxes
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.rules import Placement
from orchestrator.strategies.fp8_experts import emulated_product, native_product

_RECIPES = {"tensorwise": "tensorwise", "rowwise": "rowwise", "rowwise_gw_hp": "rowwise_with_gw_hp"}
_MULTIPLE = {"mxfp8": 32}
_LEAST_MULTIPLE = 16  # of each dim, for the kernels of all other recipes
# Axes of weights that decide more than they cost: logits, the choice of experts, positions.
_KEPT_AXES = {"vocab": "the head", "choices": "a router", "positions": "positions"}
_KEPT_NAMES = {"head": "the head", "router": "a router", "embed": "the embedding"}
_MATRICES = ("gate", "up", "down")  # of experts
_NAMED = 6  # modules that an error lists


@dataclass(frozen=True)
class Fp8Layers:
    """What of a model is computed in fp8.

    Attributes:
        recipe: of the scales.
        emulated: operands are rounded, products are fp32's.
        converted: names of the linear layers.
        kept: linear layers, and experts, that stay in bf16 -> why.
        experts: names of the modules that hold all experts of a layer.
    """

    recipe: str
    emulated: bool
    converted: tuple[str, ...]
    kept: Mapping[str, str] = field(default_factory=dict)
    experts: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in a line's part: `tensorwise, emulated, 14 linear layers, 1 kept`."""
        emulated = ", emulated" if self.emulated else ""
        experts = f" and the experts of {len(self.experts)} layers" if self.experts else ""
        return f"{self.recipe}{emulated}, {len(self.converted)} linear layers{experts}, {len(self.kept)} kept"


def choose_layers(
    model: ShardableModel, config: Fp8Config, placements: Mapping[str, Placement], layout: Layout, emulated: bool
) -> Fp8Layers:
    """Choose the linear layers that fp8 computes.

    Args:
        model: on any device, before it is sharded.
        config: the recipe, and what it leaves out.
        placements: of the parameters.
        layout: degrees of the mesh axes: dims count as one device has them.
        emulated: whether the device has no fp8 products.

    Raises:
        ConfigError: a pattern matches no module, or nothing remains.
    """
    axes = model.logical_axes()
    names = [name for name, _ in model.named_modules() if name]
    if lost := [pattern for pattern in config.skip if not any(fnmatchcase(name, pattern) for name in names)]:
        raise ConfigError(
            "a pattern of hardware.fp8.skip matches no module of the model",
            got=", ".join(lost),
            allowed=f"names such as {', '.join(name for name, part in model.named_modules() if _is_linear(part))}"[
                :300
            ],
            fix="correct it, or leave it out",
        )
    converted, kept = [], {}
    for name, module in model.named_modules():
        if not _is_linear(module):
            continue
        if why := _reason(name, config, axes, [f"{name}.weight"], placements, layout):
            kept[name] = why
        else:
            converted.append(name)
    experts = []
    for path, _ in mixtures(model):
        name = f"{path}.experts"
        if config.recipe == "rowwise_gw_hp":
            kept[name] = "there are no grouped products by this recipe"
        elif why := _reason(name, config, axes, [f"{name}.{leaf}" for leaf in _MATRICES], placements, layout):
            kept[name] = why
        else:
            experts.append(name)
    if not converted and not experts:
        raise ConfigError(
            "with hardware.precision=fp8 no layer of the model would be computed in fp8",
            got="; ".join(f"{name}: {why}" for name, why in list(kept.items())[:_NAMED]) or "no linear layers",
            fix="set hardware.precision=bf16, or let more layers in by hardware.fp8.skip and hardware.fp8.min_dim",
        )
    return Fp8Layers(config.recipe, emulated, tuple(converted), kept, tuple(experts))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _reason(
    name: str,
    config: Fp8Config,
    axes: ParameterAxes,
    weights: Sequence[str],
    placements: Mapping[str, Placement],
    layout: Layout,
) -> str:
    """Return why a module stays in bf16; empty where it does not."""
    for axis in (axis for weight in weights for axis in axes.get(weight, ())):
        if axis in _KEPT_AXES:
            return _KEPT_AXES[axis]
    if (last := name.rpartition(".")[2]) in _KEPT_NAMES:
        return _KEPT_NAMES[last]
    for pattern in config.skip:
        if fnmatchcase(name, pattern):
            return f"hardware.fp8.skip: {pattern}"
    multiple = _MULTIPLE.get(config.recipe, _LEAST_MULTIPLE)
    for weight in weights:
        if (placement := placements.get(weight)) is None:
            return "its weight is placed by no rule"
        for dim, size in enumerate(placement.shape):
            if dim == placement.expert_dim:
                continue
            part = size // layout.tensor if dim == placement.tensor_dim else size
            if part % multiple:
                return f"a dim of {part} is no multiple of {multiple}"
            if part < config.min_dim:
                return f"a dim of {part} is below hardware.fp8.min_dim={config.min_dim}"
    return ""


def convert_layers(model: ShardableModel, layers: Fp8Layers) -> None:
    """Replace the chosen linear layers by such that compute in fp8, with the same parameters, and experts' products.

    Args:
        model: on the meta device, before it is sharded.
        layers: that are chosen.
    """
    for name in layers.experts:
        make = emulated_product if layers.emulated else native_product
        setattr(model.get_submodule(name), "product", make(layers.recipe))  # noqa: B010
    chosen = set(layers.converted)
    if layers.recipe == "mxfp8":
        for name in layers.converted:
            parent, _, leaf = name.rpartition(".")
            old = model.get_submodule(name)
            setattr(model.get_submodule(parent), leaf, MXFP8Linear.of(old, mx_product(layers.emulated)))  # type: ignore[arg-type]
        return
    with _quiet(layers.emulated):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    config = Float8LinearConfig.from_recipe_name(_RECIPES[layers.recipe])
    # A sequence may have any length, and the gradient of a weight is a sum over tokens: padded where it must be.
    config = replace(config, emulate=layers.emulated, pad_inner_dim=not layers.emulated)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in chosen, config=config)


class MXFP8Linear(nn.Linear):
    """A linear layer whose three products are of MXFP8 operands: e4m3, one power of two for each 32 along the sum.

    Attributes:
        product: of activations [M, K] and a weight [N, K], where M, N and K are multiples of 32.
    """

    product: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, linear: nn.Linear, product: Callable[[Tensor, Tensor], Tensor]) -> MXFP8Linear:
        """Take over the parameters of a linear layer.

        Args:
            linear: a plain one.
            product: that computes.
        """
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=False)
        new.weight, new.bias, new.product = linear.weight, linear.bias, product
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., K] to [..., N]."""
        weight = self.weight
        if isinstance(weight, DTensor) and isinstance(x, DTensor):
            y = self._in_parts(x, weight)
        else:
            y = self._compute(x, weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _in_parts(self, x: DTensor, weight: DTensor) -> Tensor:
        """Compute on this rank's part of a weight that the tensor axis cuts: in rows, or along the sum."""
        along_sum = weight.placements[0].is_shard(1)
        # What a rank hands back to `x` is a summand where all of them read the same x, and a part where each has one.
        local = x.to_local(grad_placements=x.placements if along_sum else [Partial()])
        y = self._compute(local, weight.to_local())
        return DTensor.from_local(y, weight.device_mesh, [Partial() if along_sum else Shard(-1)], run_check=False)

    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        missing = -rows.shape[0] % 32  # the gradient of the weight sums over them, in blocks
        padded = F.pad(rows, (0, 0, 0, missing)) if missing else rows
        return self.product(padded, weight)[: rows.shape[0]].reshape(*x.shape[:-1], -1)


@contextmanager
def _quiet(emulated: bool) -> Iterator[None]:
    """Import torchao without its warnings of kernels that are not there, where none is called."""
    before = logging.root.manager.disable
    if emulated:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def mx_product(emulated: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return torchao's differentiable product of MXFP8 operands.

    Args:
        emulated: operands are rounded, and multiplied in bf16.
    """
    with _quiet(emulated):
        from torchao.prototype.moe_training.mxfp8_linear import mx_mm
        from torchao.prototype.mx_formats.config import (
            MXFP8Dim0CastKernelChoice,
            MXFP8Dim1CastKernelChoice,
            ScaleCalculationMode,
        )
        from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    e4m3 = torch.float8_e4m3fn
    kernels: tuple[Any, ...] = (
        KernelPreference.AUTO,
        MXFP8Dim0CastKernelChoice.TRITON,
        MXFP8Dim1CastKernelChoice.CUDA,
    )
    if emulated:
        kernels = (KernelPreference.EMULATED, MXFP8Dim0CastKernelChoice.TORCH, MXFP8Dim1CastKernelChoice.TORCH)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = mx_mm.apply(x, weight, e4m3, e4m3, e4m3, 32, *kernels, ScaleCalculationMode.RCEIL, False)
        return result

    return product
