"""Low-rank adapters (LoRA): beside frozen matrices of a model, products of two narrow ones that are trained.

The model keeps the names of its parameters; those of an adapter are `NAME.lora_a` and `NAME.lora_b` beside
`NAME.weight`, with logical axes, so that strategies cut them as they cut the matrix.

Source: Hu et al. 2021, arXiv 2106.09685; `rslora` Kalajdzievski 2023, arXiv 2312.03732. Names and initial values of the
settings are those of PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.config.schema import LoraConfig
from orchestrator.constants import ALL_LINEAR, LORA_A, LORA_B
from orchestrator.errors import ConfigError
from orchestrator.models.init import Init
from orchestrator.models.protocol import ShardableModel, mixtures


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: `x @ W.T + bias + scale * dropout(x) @ A.T @ B.T`.

    Args:
        linear: whose parameters it takes over.
        config: of the adapter.

    Attributes:
        lora_a: A, [rank, in].
        lora_b: B, [out, rank].
        delta: computes what the adapter adds; a strategy that cuts the layer replaces it.
        adapted: whether the adapter counts.
    """

    delta: Callable[[Tensor], Tensor]

    def __init__(self, linear: nn.Linear, config: LoraConfig):
        nn.Module.__init__(self)
        assert config.rank is not None
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Parameter(linear.weight.new_empty(config.rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_empty(linear.out_features, config.rank))
        self.dropout, self.scale = config.dropout, lora_scale(config)
        self.delta, self.adapted = self._delta, True

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in] to [..., out]."""
        beneath = F.linear(x, self.weight, self.bias)
        return beneath + self.delta(x) if self.adapted else beneath

    def adapt(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return what an adapter of these matrices adds.

        Args:
            x: [..., in], or a rank's part of it.
            a: A, or the part of it for that.
            b: B, or a rank's rows of it.
        """
        if self.dropout > 0.0:
            x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, a), b) * self.scale

    def _delta(self, x: Tensor) -> Tensor:
        return self.adapt(x, self.lora_a, self.lora_b)


def lora_scale(config: LoraConfig) -> float:
    """Return the factor on what adapters add: alpha / rank, or alpha / sqrt(rank).

    Args:
        config: of the adapters.
    """
    assert config.rank is not None
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Each layer of `model` that has an adapter, with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let `model` be what lies beneath its adapters."""
    layers = [layer for _, layer in adapted_modules(model)]
    for layer in layers:
        layer.adapted = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapted = True


def apply_lora(model: ShardableModel, config: LoraConfig) -> None:
    """Put adapters beside the matrices that `config` names, in place, and freeze everything else.

    Args:
        model: before it is sharded.
        config: of the adapters, with a rank.

    Raises:
        ConfigError: a name fits no matrix that can be adapted.
    """
    axes, initializers = dict(model.logical_axes()), dict(model.initializers())
    targets = target_names(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in targets:
        path, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(path), leaf, LoraLinear(linear, config))
        rows, columns = axes[f"{name}.weight"]
        axes |= {f"{name}.{LORA_A}": ("rank", columns), f"{name}.{LORA_B}": (rows, "rank")}
        # PEFT's: kaiming_uniform(a=sqrt(5)), which is within 1 / sqrt(in), and zeros.
        std = 1.0 / math.sqrt(3 * linear.in_features)
        initializers |= {f"{name}.{LORA_A}": Init("uniform", std), f"{name}.{LORA_B}": Init("zeros")}
    model.logical_axes = lambda: axes  # type: ignore[method-assign]
    model.initializers = lambda: initializers  # type: ignore[method-assign]


def target_names(model: ShardableModel, config: LoraConfig) -> list[str]:
    """List the names of the linear layers of `model` that get adapters.

    Args:
        model: without adapters yet.
        config: of the adapters.

    Raises:
        ConfigError: a name fits none that can be adapted.
    """
    inside = {id(module) for block in model.blocks for module in block.modules()}
    mixed = {id(module) for _, mixture in mixtures(model) for module in mixture.modules()}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside and id(module) not in mixed
    ]
    kinds = sorted({_leaf(name) for name in linear})
    wanted = kinds if config.target_modules == (ALL_LINEAR,) else config.target_modules
    if lost := [kind for kind in wanted if kind not in kinds]:
        raise ConfigError(
            "train.lora.target_modules names what no adapter can lie beside",
            got=", ".join(lost),
            allowed=f"{ALL_LINEAR}, or some of {', '.join(kinds) or 'none: the model has no such layers'}",
            fix="the embedding, the head, routers and the experts of a mixture have no adapters: leave them out",
        )
    return [name for name in linear if _leaf(name) in wanted]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def differentiate_stream(model: ShardableModel) -> None:
    """Let gradients reach the first block's input, although nothing before it is trained.

    A reentrant checkpoint gives its parameters gradients only where its input has one, and a pipeline's stage sends
    one back.

    Args:
        model: sharded or not; one whose embedding is trained is left as it is.
    """
    embedding = getattr(model, "embed", None)
    if not isinstance(embedding, nn.Embedding) or embedding.weight.requires_grad:
        return

    def hook(module: nn.Module, args: object, stream: Tensor) -> Tensor:
        return stream.requires_grad_() if torch.is_grad_enabled() and not stream.requires_grad else stream

    embedding.register_forward_hook(hook)
