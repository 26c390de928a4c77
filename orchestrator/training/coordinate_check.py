"""The coordinate check: how large activations are in models of several widths, or depths, as they train.

Under a rule that transfers hyper-parameters they do not depend on the size; under the standard parametrisation they
grow. Source: Yang et al. 2022, arXiv 2203.03466, appendix D.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from orchestrator.config.schema import AdamWConfig, ModelConfig, MuonConfig, RunConfig, ScheduleConfig
from orchestrator.config.transfer import check_transfer, settle_transfer
from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.prepare import prepare
from orchestrator.data.stream import TokenStream
from orchestrator.errors import ConfigError, ConfigErrors
from orchestrator.models.init import draw_slice
from orchestrator.models.layers import Block
from orchestrator.models.protocol import ShardableModel
from orchestrator.runs.own_parts import build_model
from orchestrator.training.optimizer_setup import build_optimizer
from orchestrator.training.parameter_groups import trained
from orchestrator.training.placed_model import factors_of
from orchestrator.training.resolved import settle_optimizer, settle_vocabulary

KINDS = ("embedding", "attention", "feed-forward", "stream", "logits")
"""Activations that are looked at: of attention and feed-forward what they add to the stream, the sum over the
layers; the stream behind the last of them."""
FLAT = 2.0
"""Largest ratio of the scales over all sizes that counts as flat."""


@dataclass(frozen=True)
class Scales:
    """Activations of one model before one step of its training.

    Attributes:
        rule: of `optim.transfer`.
        size: width, or number of layers.
        seed: of its initial weights.
        step: completed steps.
        loss: nats per token.
        scales: kind -> mean of the absolute values.
    """

    rule: str
    size: int
    seed: int
    step: int
    loss: float
    scales: Mapping[str, float]


def at_width(model: ModelConfig, width: int) -> ModelConfig:
    """Return a model of the same proportions and heads as wide, of another width.

    Args:
        model: that is made wider or narrower.
        width: of the residual stream.

    Raises:
        ConfigError: heads or inner widths would be no whole numbers.
    """

    def scaled(key: str, value: int) -> int:
        if value * width % model.dim:
            raise ConfigError(
                f"a model of this width has no whole number of model.{key}",
                got=f"width {width}; model.{key}={value} at model.dim={model.dim}",
                fix="give other widths: multiples of model.dim over the greatest common divisor of its sizes",
            )
        return value * width // model.dim

    heads = {key: scaled(key, getattr(model, key)) for key in ("heads", "kv_heads", "mlp_dim")}
    lists = {key: tuple(scaled(key, one) for one in getattr(model, key)) for key in ("layer_heads", "layer_kv_heads")}
    moe = model.moe
    if moe.experts:
        inner = scaled("moe.mlp_dim", moe.mlp_dim) if isinstance(moe.mlp_dim, int) else moe.mlp_dim
        moe = replace(moe, mlp_dim=inner, shared_mlp_dim=scaled("moe.shared_mlp_dim", moe.shared_mlp_dim))
    return replace(model, dim=width, head_dim=model.head_width, moe=moe, **heads, **lists)  # type: ignore[arg-type]


def sized(config: RunConfig, rule: str, width: int | None = None, layers: int | None = None) -> RunConfig:
    """Return the configuration of one model of the check: the configured one is the base of the others.

    Args:
        config: of the base, with its hyper-parameters.
        rule: of `optim.transfer`.
        width: of the model; None: as configured.
        layers: of the model; None: as configured.

    Raises:
        ConfigErrors: there is no such model, or no rule for it.
    """
    optim, model = config.optim, config.model
    if not isinstance(optim, (AdamWConfig, MuonConfig)):
        raise ConfigError("there are rules for AdamW and Muon alone", got=f"optim={optim.name}", allowed="adamw, muon")
    base = replace(
        optim.base, dim=model.dim, layers=model.layers if rule == "completep" else None, expert_dim=None, heads=None
    )
    larger = model if width is None else at_width(model, width)
    larger = larger if layers is None else replace(larger, layers=layers)
    optim = replace(optim, schedule=ScheduleConfig(kind="constant", warmup_steps=0))
    optim = replace(optim, transfer=rule, **({} if rule == "none" else {"base": base}))  # type: ignore[arg-type]
    made = replace(config, model=larger, optim=optim)
    if problems := check_transfer(made):
        raise ConfigErrors(problems)
    return settle_transfer(made)


def run_check(
    config: RunConfig,
    rules: Sequence[str],
    axis: str,
    sizes: Sequence[int],
    steps: int,
    seeds: int,
    device: torch.device,
    tell: Callable[[Scales], object],
) -> list[Scales]:
    """Train a model of each size by each rule.

    Args:
        config: of the base, with its hyper-parameters and the data.
        rules: of `optim.transfer`.
        axis: what differs: `width` or `layers`.
        sizes: of the models.
        steps: of each training.
        seeds: trainings of each model, which differ in their initial weights.
        device: to train on.
        tell: told of what each training ended with.

    Raises:
        UserError: there is no such model, no rule for it, or no data.
    """
    configs = [(size, sized(config, rule, **{axis: size})) for rule in rules for size in sizes]
    data = prepare(config.data, progress=False)
    stream = TokenStream(
        data.stores, data.weights, "train", config.train.seq_len, config.seed, config.data.document_mask
    )
    measured: list[Scales] = []
    for size, one in configs:
        for seed in range(config.seed, config.seed + seeds):
            measured += measure(replace(one, seed=seed), size, stream, data.vocab_size, steps, device)
            tell(measured[-1])
    return measured


def measure(
    config: RunConfig, size: int, stream: TokenStream, vocab_size: int, steps: int, device: torch.device
) -> Iterator[Scales]:
    """Train one model for a few steps, and yield its activations before each and after the last.

    Args:
        config: as `sized` makes it.
        size: said in the result.
        stream: of training sequences; every model sees the same.
        vocab_size: of its tokenizer.
        steps: of training.
        device: to train on.
    """
    config = settle_vocabulary(config, vocab_size)
    model, optimizer = _build(config, device)
    sequences = config.train.global_batch_tokens // config.train.seq_len
    for step in range(steps + 1):
        arrays = stream.batch(range(step * sequences, (step + 1) * sequences))
        batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        targets = batch.pop("targets")
        scales = _scales(model, batch)
        loss = model(**batch, targets=targets) / (targets != IGNORE_INDEX).sum()
        yield Scales(_rule(config), size, config.seed, step, float(loss.detach()), scales)
        loss.backward()
        if config.optim.grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()


def _rule(config: RunConfig) -> str:
    assert isinstance(config.optim, (AdamWConfig, MuonConfig))
    return config.optim.transfer


def _build(config: RunConfig, device: torch.device) -> tuple[ShardableModel, torch.optim.Optimizer]:
    """Build the whole model on one device, with the run's initial weights and its optimizer."""
    with torch.device(device):
        model = build_model(config.model, config.train.loss_chunk_tokens)
    factors = factors_of(config, model)
    model.init_factors = {name: one.init for name, one in factors.items()}
    starts = model.starts()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(draw_slice(starts[name], name, config.seed, shape, tuple(map(slice, shape))))
    members = trained(model, config.optim.groups, factors=factors)
    optim = settle_optimizer(config.optim, on_cpu=device.type == "cpu")
    return model, build_optimizer(model, optim, device, members=members, seed=config.seed)


@torch.no_grad()
def _scales(model: ShardableModel, batch: Mapping[str, Tensor]) -> dict[str, float]:
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    with _listening(model, lambda kind, out: found[kind].append(out.float().abs().mean())):
        found["logits"].append(model(**batch).float().abs().mean())
    return {kind: float(torch.stack(values).sum()) for kind, values in found.items()}


@contextmanager
def _listening(model: ShardableModel, hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within it `hear` is told what comes out of the parts of the model, by their kind."""

    def hook(kind: str, factor: float) -> Callable[..., None]:
        return lambda module, args, out: hear(kind, (out[0] if isinstance(out, tuple) else out) * factor)

    config = model.config
    parts: list[tuple[nn.Module, str, float]] = [(model.embed, "embedding", config.embedding_scale)]
    for block in cast(list[Block], model.blocks):
        parts.append((block.attn_post_norm or block.attn, "attention", config.residual_scale))
        parts.append((block.mlp_post_norm or block.mlp, "feed-forward", config.residual_scale))
    handles = [module.register_forward_hook(hook(kind, factor)) for module, kind, factor in parts]
    handles.append(model.norm.register_forward_pre_hook(lambda module, args: hear("stream", args[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def spreads(measured: Sequence[Scales], step: int) -> dict[str, dict[str, float]]:
    """Return the largest over the smallest scale of all sizes, by rule and kind, each the mean over the seeds.

    Args:
        measured: of all models.
        step: completed steps.
    """
    result: dict[str, dict[str, float]] = {}
    for rule in dict.fromkeys(one.rule for one in measured):
        result[rule] = {}
        for kind in KINDS:
            means = list(curve(measured, rule, kind, step).values())
            result[rule][kind] = max(means) / min(means) if min(means) > 0 else float("inf")
    return result


def curve(measured: Sequence[Scales], rule: str, kind: str, step: int) -> dict[int, float]:
    """Return the scale by size, the mean over the seeds.

    Args:
        measured: of all models.
        rule: of `optim.transfer`.
        kind: of activations.
        step: completed steps.
    """
    found: dict[int, list[float]] = {}
    for one in measured:
        if (one.rule, one.step) == (rule, step):
            found.setdefault(one.size, []).append(one.scales[kind])
    return {size: sum(values) / len(values) for size, values in sorted(found.items())}


def as_data(measured: Sequence[Scales], axis: str, steps: int) -> dict[str, Any]:
    """Return a check as JSON has it.

    Args:
        measured: of all models.
        axis: what the size is: `width` or `layers`.
        steps: after which the spread is told.
    """
    found = spreads(measured, steps)
    flat = {rule: max(of_rule.values()) <= FLAT for rule, of_rule in found.items()}
    return {"axis": axis, "steps": steps, "spread": found, "flat": flat, "measured": [asdict(one) for one in measured]}
