"""Pairs of responses, and DPO's loss and gradients of them: by a strategy, and written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from orchestrator.config.schema import RunConfig
from orchestrator.distributed.world import World
from tests.lab import scores

ROWS, LENGTH = 4, 48
REFERENCE_SEED = 5  # of the weights of a second model


@dataclass
class Learnt:
    """What a rank found.

    Attributes:
        figures: the loss and what else `Preferences.sum` gives.
        weighted: the weighted cross-entropies whose gradients were taken, in the first pass and in the second.
        gradients: its parts: name, slices, elements.
    """

    figures: dict[str, float]
    weighted: tuple[float, float]
    gradients: list[scores.Gradient]


def batch() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return rows of one or two pairs and a rest, and the reference's log-probabilities of these pairs."""
    draw = np.random.default_rng(1)
    shape = (ROWS, LENGTH)
    found = {
        "tokens": draw.integers(0, scores.VOCABULARY, shape),
        "targets": np.full(shape, -100),
        "positions": np.zeros(shape, dtype=np.int64),
        "documents": np.zeros(shape, dtype=np.int64),
        "responses": np.full(shape, -1),
    }
    pairs = 0
    for row in range(ROWS):
        at, document = 0, 0
        for _ in range(1 + row % 2):
            prompt = int(draw.integers(1, 4))
            for side in range(2):
                stop = at + prompt + int(draw.integers(3, 9))
                found["targets"][row, at + prompt - 1 : stop] = draw.integers(
                    0, scores.VOCABULARY, stop - at - prompt + 1
                )
                found["positions"][row, at:stop] = np.arange(stop - at)
                found["documents"][row, at:stop] = document
                found["responses"][row, at:stop] = 2 * pairs + side
                at, document = stop, document + 1
            pairs += 1
        found["positions"][row, at:], found["documents"][row, at:] = np.arange(LENGTH - at), document
    return found, draw.normal(-30.0, 5.0, (pairs, 2))


def learn(world: World, data: dict[str, Any]) -> Learnt:
    """Compute a step of `batch()` on this rank of a run of the configuration `data`."""
    from orchestrator.config.convert import from_dict
    from orchestrator.strategies.parallel_strategy import StepHooks, local_parameters
    from orchestrator.strategies.sharded_parts import local_part
    from orchestrator.training.job import make_strategy
    from orchestrator.training.module import LanguageModule
    from orchestrator.training.preference import Pairs
    from tests.lab.runs import resolved_run

    resolved = resolved_run(from_dict(RunConfig, data), world, vocab_size=scores.VOCABULARY)
    parallel = make_strategy(resolved, resolved.target(), world)
    parallel.join()
    module = LanguageModule(resolved.config, parallel=parallel)
    module.configure_model()
    _move_adapters(module.model)
    parallel.initialize(module.model, 3)
    rank, shares = parallel.data_share
    rows = slice(rank * ROWS // shares, (rank + 1) * ROWS // shares)
    arrays, reference = batch()
    mine = {name: value[rows] for name, value in arrays.items()}
    preferences = module.preferences
    assert preferences is not None
    if preferences.live is None:
        keys = Pairs.of(arrays, np.zeros(arrays["tokens"].shape)).keys
        preferences.reference.add(keys, reference)
    elif preferences.live.model is not None:
        parallel.initialize(preferences.live.model, REFERENCE_SEED)
    pairs = preferences.score(module.model, mine, 1, module.seed_dropout)
    _, slopes = preferences.judge(pairs, preferences.refer(module.model, mine, 1, pairs))
    first = parallel.once_per_row(torch.tensor((slopes * pairs.logps).sum(), dtype=torch.float32))
    hooks = StepHooks(module.seed_dropout)
    part, _, found = preferences.forward_backward(module.model, mine, 1, hooks)
    second, _ = parallel.reduce_and_clip(module.model, part, None)
    first = parallel.sum_over_data(first.to(parallel.root_device)) / found["pairs"]
    parallel.finish_step()
    figures = dict(zip(found, parallel.fetch(list(found.values())), strict=True))
    gradients = []
    for name, parameter in local_parameters(module.model):
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        grad = local_part(parameter.grad).cpu()
        whole = tuple(slice(0, size) for size in grad.shape)
        cut = scores.model_slices(parallel, module.model, name) if parallel.size > 1 else whole
        gradients.append((name, cut, grad.numpy()))
    weighted = tuple(parallel.fetch([first, second]))
    parallel.leave()
    return Learnt(figures, weighted, gradients)


def by_hand(config: RunConfig) -> Learnt:
    """Return the same by full logits, each response in a sequence of its own, in one process."""
    settings = config.train.preference
    model = scores.plain_model(config)
    arrays, reference = batch()
    if settings.reference == "live":
        beneath = model if config.train.lora.rank is not None else scores.plain_model(config, REFERENCE_SEED)
        with torch.no_grad():
            found = [[_logp(beneath, arrays, 2 * number + side)[0].item() for side in range(2)]
                     for number in range(len(reference))]  # fmt: skip
        reference = np.array(found)
    if config.train.lora.rank is not None:
        _put_adapters(model, config)
    losses, rewards = [], []
    for number in range(len(reference)):
        ratios = []
        for side in range(2):
            logp, count = _logp(model, arrays, 2 * number + side)
            ratio = logp - reference[number, side]
            rewards.append(settings.beta * ratio.item())
            ratios.append(ratio / count if settings.loss == "ipo" else ratio)
        delta = ratios[0] - ratios[1]
        if settings.loss == "ipo":
            losses.append((delta - 1 / (2 * settings.beta)) ** 2)
        elif settings.loss == "hinge":
            losses.append(torch.relu(1 - settings.beta * delta))
        else:
            smooth, h = settings.label_smoothing, settings.beta * delta
            losses.append(-(1 - smooth) * F.logsigmoid(h) - smooth * F.logsigmoid(-h))
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = [
        (name, tuple(slice(0, size) for size in parameter.shape), parameter.grad.numpy())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    ]
    pairs = np.array(rewards).reshape(-1, 2)
    margins = pairs[:, 0] - pairs[:, 1]
    figures = {
        "loss": loss.item(),
        "reward_chosen": pairs[:, 0].mean(),
        "reward_rejected": pairs[:, 1].mean(),
        "reward_margin": margins.mean(),
        "reward_accuracy": (margins > 0).mean(),
        "pairs": float(len(pairs)),
    }
    return Learnt(figures, (0.0, 0.0), gradients)


def _logp(model: Any, arrays: dict[str, np.ndarray], response: int) -> tuple[torch.Tensor, int]:
    """Return the log-probability of a response in a sequence of its own, and its number of targets."""
    row = int(np.flatnonzero((arrays["responses"] == response).any(1))[0])
    where = arrays["responses"][row] == response
    tokens, targets = (torch.from_numpy(arrays[name][row][where])[None] for name in ("tokens", "targets"))
    counts = targets != -100
    logps = model(tokens).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (logps * counts).sum(), int(counts.sum())


def _move_adapters(model: Any) -> None:
    """Let the second matrices of adapters begin elsewhere than at zero, where the first ones have no gradient."""
    from orchestrator.models.init import Init

    initializers = model.initializers()
    for name in initializers:
        if name.endswith("lora_b"):
            initializers[name] = Init("normal", 0.1)


def _put_adapters(model: Any, config: RunConfig) -> None:
    """Put beside the weights of a plain model the adapters that `learn` has."""
    from orchestrator.models.init import draw_slice
    from orchestrator.models.lora import apply_lora

    apply_lora(model, config.train.lora)
    _move_adapters(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = tuple(parameter.shape)
            whole = tuple(slice(0, size) for size in shape)
            parameter.data.copy_(draw_slice(model.initializers()[name], name, 3, shape, whole))


def assert_agrees(parts: list[Learnt], wanted: Learnt, relative: float) -> None:
    """See that the ranks have found what is `wanted`.

    Args:
        parts: of all ranks.
        wanted: of one process.
        relative: tolerance; of gradients as in `scores.assert_gradients`.
    """
    for part in parts:
        assert part.figures.keys() == wanted.figures.keys()
        for name, value in wanted.figures.items():
            # A reward is a small difference of log-probabilities of some tens of nats.
            least = 0.0 if name == "loss" else 3 * relative
            np.testing.assert_allclose(part.figures[name], value, rtol=relative, atol=least, err_msg=name)
        np.testing.assert_allclose(*part.weighted, rtol=1e-5, err_msg="the passes differ")
    scores.assert_gradients([part.gradients for part in parts], wanted.gradients, relative)
