"""Build the optimizer over the parameters of a placed model, and allocate its state.

A restore fills that state, and no step is the first one. What an optimizer computes stands in `orchestrator.optim`;
AdamW is torch's own.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orchestrator.config.schema import (
    AdafactorConfig,
    AdamWConfig,
    MuonConfig,
    MuonRestConfig,
    OptimConfig,
    OwnOptimConfig,
    SGDConfig,
)
from orchestrator.errors import ConfigError
from orchestrator.optim.adafactor import Adafactor
from orchestrator.optim.combined import CombinedOptimizer
from orchestrator.optim.compact_adamw import CompactAdamW
from orchestrator.optim.muon import Muon
from orchestrator.optim.own import build_own
from orchestrator.optim.sgd import SGD
from orchestrator.sharding.parts import Parts, WholeParts
from orchestrator.training.parameter_groups import Member, grouped, trained, undecayed

# Their fused kernel leaves weights and state alone where `found_inf` says so. That of `neuron` refuses `found_inf`
# (torch-neuronx, python_ops/xla_ops/fused_adamw): there the host decides.
_FUSED = ("cpu", "cuda", "tpu")
_NS_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

PEAK = "peak_lr"
"""Key of a parameter group: the rate that the schedule scales."""


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    device: torch.device,
    parts: Parts | None = None,
    restoring: bool = False,
    members: Sequence[Member] | None = None,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Build the optimizer that `config` asks for.

    Args:
        model: placed.
        config: of the optimizer.
        device: of the parameters.
        parts: how the parameters are split; None: they are whole.
        restoring: the state is to be filled from a checkpoint. An optimizer of the user's has none before its first
            step otherwise.
        members: the parameters that are trained; None: all of the model that need gradients.
        seed: of what is drawn, where states are rounded by chance.

    Returns:
        The optimizer; each group has its peak learning rate under `PEAK`.

    Raises:
        ConfigError: an optimizer of the user's cannot be made, or keeps what cannot be saved; or `ns_dtype` is open.
    """
    parts = parts or WholeParts()
    members = members if members is not None else trained(model, config.groups)
    optimizer = _build(model, members, config, device, parts, restoring, seed)
    for group in optimizer.param_groups:
        group[PEAK] = group["lr"]
    return optimizer


def _build(
    model: nn.Module,
    members: Sequence[Member],
    config: OptimConfig,
    device: torch.device,
    parts: Parts,
    restoring: bool,
    seed: int,
) -> torch.optim.Optimizer:
    match config:
        case AdamWConfig():
            return _adamw(members, config, device, parts, seed)
        case MuonConfig():
            return _muon(model, members, config, device, parts, seed)
        case AdafactorConfig():
            eps = (config.eps_update, config.eps_parameter)
            groups = grouped(members, config.lr, config.weight_decay, exempt=undecayed(config))
            factored = [one.parameter for one in members if one.parameter.dim() == one.dims == 2]
            return Adafactor(
                groups, parts, config.lr, config.beta2_decay, eps, config.clip_threshold, factored=factored
            )
        case SGDConfig():
            fused = device.type in ("cpu", "cuda")
            groups = grouped(members, config.lr, config.weight_decay, exempt=undecayed(config))
            return SGD(groups, parts, config.lr, config.momentum, config.nesterov, fused=fused)
        case OwnOptimConfig():
            return build_own(grouped(members, config.lr, None), config, device, restoring)


def _adamw(
    members: Sequence[Member], config: AdamWConfig | MuonRestConfig, device: torch.device, parts: Parts, seed: int
) -> torch.optim.Optimizer:
    if config.state_dtype != "fp32":
        keys: dict[Tensor, int] = {
            m.parameter: zlib.crc32(f"{seed} {m.name}".encode()) for m in members if not m.is_vector
        }
        groups = grouped(members, config.lr, config.weight_decay, config.eps, undecayed(config))
        return CompactAdamW(groups, parts, config.state_dtype, keys, config.lr, config.betas, config.eps)
    fused, traced = device.type in _FUSED, device.type == "xla"
    optimizer = torch.optim.AdamW(
        grouped(members, config.lr, config.weight_decay, config.eps, undecayed(config)),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
        capturable=traced,
    )
    for parameter in (member.parameter for member in members):
        optimizer.state[parameter] = {
            # As torch.optim.AdamW would: beside the parameter for the fused kernel, on the host otherwise.
            "step": torch.zeros((), dtype=torch.float32, device=device if fused or traced else "cpu"),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def _muon(
    model: nn.Module, members: Sequence[Member], config: MuonConfig, device: torch.device, parts: Parts, seed: int
) -> CombinedOptimizer:
    """Muon over the matrices of the blocks, each expert's by itself; AdamW over everything else, routers too."""
    inside = {id(parameter) for block in model.blocks for parameter in block.parameters()}  # type: ignore[union-attr]
    matrices = [one for one in members if id(one.parameter) in inside and one.dims == 2 and not one.chooses]
    if config.ns_dtype not in _NS_DTYPES:
        raise ConfigError("optim.ns_dtype is not known", got=config.ns_dtype, allowed=", ".join(_NS_DTYPES))
    chosen = {member.name for member in matrices}
    rest = [member for member in members if member.name not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        muon = Muon(
            grouped(matrices, config.lr, config.weight_decay),
            parts,
            config.lr,
            config.weight_decay,
            config.momentum,
            config.nesterov,
            config.ns_coefficients,
            config.ns_steps,
            config.eps,
            config.adjust_lr,
            _NS_DTYPES[config.ns_dtype],
        )
        optimizers.append(muon)
    if rest:  # adapters are matrices, all of them
        optimizers.append(_adamw(rest, config.adamw, device, parts, seed))
    return CombinedOptimizer(optimizers)
