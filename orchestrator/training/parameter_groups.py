"""Parameter groups: what shares a learning rate, a weight decay and a device mesh.

Where a parameter is a vector (norms, biases) weight decay is left out unless it is asked for. What it is, its axes say,
and not its number of dims: the biases of experts are [E, F]. A kernel over many tensors at once takes those of one mesh
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import nn

from orchestrator.config.schema import AdafactorConfig, AdamWConfig, MuonRestConfig, OptimGroupConfig, SGDConfig
from orchestrator.errors import ConfigError
from orchestrator.models.protocol import ShardableModel
from orchestrator.optim.transfer_rules import Factors

_STACKED = "experts"  # the logical axis of tensors that hold one matrix or vector for each expert
_CHOOSES = "choices"  # that of a router's rows
_EMBEDDINGS = ("embed.", "positions.")
_SHOWN = 12  # names that an error lists
Decayed: TypeAlias = AdamWConfig | MuonRestConfig | AdafactorConfig | SGDConfig  # what says which it decays


@dataclass(frozen=True)
class Member:
    """A parameter that is trained.

    Attributes:
        name: in the model.
        parameter: placed.
        dims: of one expert's part; of the whole where it is no expert's.
        group: the entry of `optim.groups` that is its; None: it has the optimizer's own rate and decay.
        chooses: it is a router's, whose rows are experts.
        factors: of `optim.transfer`.
    """

    name: str
    parameter: nn.Parameter
    dims: int
    group: OptimGroupConfig | None = None
    chooses: bool = False
    factors: Factors = Factors()

    @property
    def is_vector(self) -> bool:
        """Whether it is a norm's scale, a bias, or another vector."""
        return self.dims < 2

    @property
    def embeds(self) -> bool:
        """Whether it is a table of embeddings, of tokens or positions; the head's, too, where it is the same tensor."""
        return self.name.startswith(_EMBEDDINGS)


def trained(
    model: nn.Module,
    groups: Sequence[OptimGroupConfig] = (),
    everything: bool = True,
    factors: Mapping[str, Factors] = MappingProxyType({}),
) -> list[Member]:
    """List the parameters of `model` that are trained, each with its entry of `groups`: the first that matches.

    Args:
        model: placed.
        groups: as `optim.groups` has them.
        everything: the model is whole, and not a stage of a pipeline; then each entry has to match.
        factors: of `optim.transfer`, by name.

    Raises:
        ConfigError: an entry matches no parameter, or none that an earlier one has not.
    """
    axes = model.logical_axes() if isinstance(model, ShardableModel) else {}
    members, used = [], set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        number = next((index for index, one in enumerate(groups) if fnmatchcase(name, one.match)), None)
        used.add(number)
        dims = parameter.dim() - (_STACKED in axes.get(name, ()))
        group = None if number is None else groups[number]
        chooses = _CHOOSES in axes.get(name, ())
        members.append(Member(name, parameter, dims, group, chooses, factors.get(name, Factors())))
    if everything and (lost := [group.match for number, group in enumerate(groups) if number not in used]):
        names = [member.name for member in members]
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise ConfigError(
            "an entry of optim.groups matches no parameter, or none that an earlier entry has left",
            got=", ".join(lost),
            allowed=f"a pattern of names such as {shown}",
            fix="correct it, move it up, or leave it out",
        )
    return members


def undecayed(config: Decayed) -> Callable[[Member], bool]:
    """Return which parameters an optimizer's weight decay leaves out.

    Args:
        config: of the optimizer.
    """
    return lambda member: (
        (member.is_vector and not config.decay_norm_and_bias) or (member.embeds and not config.decay_embeddings)
    )


def grouped(
    members: Sequence[Member],
    lr: float,
    weight_decay: float | None,
    eps: float | None = None,
    exempt: Callable[[Member], bool] = lambda member: member.is_vector,
) -> list[dict[str, Any]]:
    """Make parameter groups as `torch.optim` takes them: `params`, `lr`, `weight_decay` and `eps`.

    Args:
        members: of one optimizer.
        lr: the optimizer's rate.
        weight_decay: the optimizer's; None: it has its own, which a group has unless an entry says otherwise.
        eps: the optimizer's; None: it has none that is scaled.
        exempt: which of them are not decayed, unless their entry says otherwise.
    """
    found: dict[Any, dict[str, Any]] = {}
    for member in members:
        factor, decay = 1.0, None if weight_decay is None else 0.0 if exempt(member) else weight_decay
        if member.group is not None:
            factor = member.group.lr_factor
            decay = decay if member.group.weight_decay is None else member.group.weight_decay
        scaled = member.factors
        factor, decay = factor * scaled.lr, None if decay is None else decay * scaled.decay
        mesh = getattr(member.parameter, "device_mesh", None)  # of a DTensor
        group = found.setdefault((decay, factor, scaled.eps, mesh), {"params": [], "lr": lr * factor})
        if decay is not None:
            group["weight_decay"] = decay
        if eps is not None:
            group["eps"] = eps * scaled.eps
        group["params"].append(member.parameter)
    # Decayed ones first.
    return sorted(found.values(), key=lambda group: not group.get("weight_decay", 0.0))


def describe_groups(members: Sequence[Member]) -> list[str]:
    """Say in lines what each entry of `optim.groups` is for; nothing where there are none.

    Args:
        members: all that are trained.
    """
    counts: dict[OptimGroupConfig, list[int]] = {}
    for member in members:
        if member.group is not None:
            count = counts.setdefault(member.group, [0, 0])
            count[0] += 1
            count[1] += member.parameter.numel()
    lines = []
    for group, (tensors, elements) in counts.items():
        decay = "" if group.weight_decay is None else f", weight decay {group.weight_decay:g}"
        lines.append(f"{group.match}: {tensors} tensors, {elements:,} parameters, lr x {group.lr_factor:g}{decay}")
    return lines
