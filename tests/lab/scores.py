"""Token scores and weighted losses of a small model, on any strategy and by plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orchestrator.config.schema import RunConfig
from orchestrator.distributed.world import World

DIVISOR = 7.0
ROWS, LENGTH, VOCABULARY = 4, 32, 96

Gradient = tuple[str, tuple[slice, ...], np.ndarray]  # name, which part of it, and its elements


@dataclass
class Scored:
    """What a rank found.

    Attributes:
        rows: which rows of `batch()` are its own.
        losses: [rows, T], of its rows.
        greedy: [rows, T].
        loss: of all rows, weighted, divided by `DIVISOR`.
        z_loss: the part of the head's penalty in it; 0 where there is none.
        gradients: its parts of the gradients: name, slices, elements.
    """

    rows: slice
    losses: np.ndarray
    greedy: np.ndarray
    loss: float
    z_loss: float
    gradients: list[Gradient]


def batch() -> dict[str, np.ndarray]:
    """Return rows of documents; some positions have no target, and weights of both signs, 0 too."""
    draw = np.random.default_rng(0)
    documents = (draw.random((ROWS, LENGTH)) < 0.1).cumsum(1)
    at = np.arange(LENGTH)
    positions = np.stack([at - np.array([at[row == number].min() for number in row]) for row in documents])
    targets = draw.integers(0, VOCABULARY, (ROWS, LENGTH))
    targets[draw.random((ROWS, LENGTH)) < 0.2] = -100
    weights = draw.normal(size=(ROWS, LENGTH)).astype(np.float32)
    weights[:, 5] = 0.0
    return {
        "tokens": draw.integers(0, VOCABULARY, (ROWS, LENGTH)),
        "positions": positions,
        "documents": documents,
        "targets": targets,
        "weights": weights,
    }


def score(world: World, data: dict[str, Any]) -> Scored:
    """Score `batch()` and take the gradients of its weighted loss on this rank of a run of the configuration `data`."""
    from orchestrator.config.convert import from_dict
    from orchestrator.strategies.parallel_strategy import local_parameters
    from orchestrator.strategies.sharded_parts import local_part
    from orchestrator.training.job import make_strategy
    from orchestrator.training.placed_model import build_placed
    from tests.lab.runs import resolved_run

    resolved = resolved_run(from_dict(RunConfig, data), world, vocab_size=VOCABULARY)
    parallel = make_strategy(resolved, resolved.target(), world)
    parallel.join()
    model = build_placed(resolved.config, parallel)
    parallel.initialize(model, 3)
    rank, shares = parallel.data_share
    rows = slice(rank * ROWS // shares, (rank + 1) * ROWS // shares)
    mine = {name: value[rows] for name, value in batch().items()}
    scores = parallel.token_scores(model, mine)
    before = parallel.compilations()
    again = parallel.token_scores(model, mine)
    assert parallel.compilations() == before, "a second batch of this shape is compiled again"
    assert torch.equal(scores.losses, again.losses)
    placed = parallel.prepare_batch(mine)
    divisor = torch.tensor(DIVISOR, device=parallel.root_device)
    part = parallel.forward_backward(model, placed, 1, divisor)
    loss, _ = parallel.reduce_and_clip(model, part, None)
    z_loss = torch.zeros((), device=parallel.root_device)
    if model.head.z_loss is not None and (taken := model.head.z_loss.take()) is not None:
        z_loss = taken
    z_loss = parallel.sum_of_parts(z_loss) / divisor
    parallel.finish_step()
    gradients = []
    for name, parameter in local_parameters(model):
        grad = local_part(parameter.grad).cpu()
        whole = tuple(slice(0, size) for size in grad.shape)
        cut = model_slices(parallel, model, name) if parallel.size > 1 else whole
        gradients.append((name, cut, grad.numpy()))
    found = Scored(rows, scores.losses.numpy(), scores.greedy.numpy(), *parallel.fetch([loss, z_loss]), gradients)
    parallel.leave()
    return found


def model_slices(parallel: Any, model: Any, name: str) -> tuple[slice, ...]:
    """Return the part of a parameter that this rank has."""
    slices: tuple[slice, ...] = parallel.placements[model][name].slices(parallel.layout, parallel.rank)
    return slices


def plain_model(config: RunConfig, seed: int = 3) -> Any:
    """Return the model of `config` with the weights that `score` has, or those of another seed, in one process."""
    from orchestrator.models.decoder import Decoder
    from orchestrator.models.init import draw_slice
    from orchestrator.training.check import resolve_model

    model = Decoder(resolve_model(config.model, VOCABULARY))
    for name, init in model.initializers().items():
        parameter = model.get_parameter(name)
        whole = tuple(slice(0, size) for size in parameter.shape)
        parameter.data.copy_(draw_slice(init, name, seed, tuple(parameter.shape), whole))
    return model


def expected(config: RunConfig) -> Scored:
    """Return the same by full logits and torch's own cross-entropy, in one process."""
    model = plain_model(config)
    arrays = {name: torch.from_numpy(value) for name, value in batch().items()}
    targets, weights = arrays.pop("targets"), arrays.pop("weights")
    logits = model(**arrays)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    penalties = config.train.z_loss * logits.logsumexp(-1).square() * (targets != -100)
    z_loss = (penalties * weights).sum() / DIVISOR
    loss = (losses * weights).sum() / DIVISOR + z_loss
    loss.backward()
    greedy = logits.argmax(-1) == targets
    gradients = [
        (name, tuple(slice(0, size) for size in parameter.shape), parameter.grad.numpy())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    ]
    return Scored(slice(0, ROWS), losses.detach().numpy(), greedy.numpy(), loss.item(), z_loss.item(), gradients)


def assert_agrees(parts: list[Scored], wanted: Scored, relative: float) -> None:
    """See that the ranks have found what is `wanted`: scores, loss, and every part of every gradient.

    Args:
        parts: of all ranks.
        wanted: of one process.
        relative: tolerance, of an array relative to its largest element.
    """
    for part in parts:
        close(part.losses, wanted.losses[part.rows], relative, "losses")
        np.testing.assert_array_equal(part.greedy, wanted.greedy[part.rows])
        np.testing.assert_allclose([part.loss, part.z_loss], [wanted.loss, wanted.z_loss], rtol=relative)
    assert_gradients([part.gradients for part in parts], wanted.gradients, relative)


def assert_gradients(parts: list[list[Gradient]], wanted: list[Gradient], relative: float) -> None:
    """See that every part of every gradient is somewhere, and everywhere as it is `wanted`.

    Args:
        parts: of all ranks.
        wanted: of one process.
        relative: tolerance of a gradient as a whole, by the L2 norm; single elements may be off by three times as much
            of its largest one, as sums of fp32 are.
    """
    gradients = {name: array for name, _, array in wanted}
    covered = dict.fromkeys(gradients, 0)
    for name, slices, array in (gradient for part in parts for gradient in part):
        whole, theirs = gradients[name], gradients[name][slices]
        np.testing.assert_allclose(array, theirs, rtol=0, atol=3 * relative * np.abs(whole).max(), err_msg=name)
        assert np.linalg.norm(array - theirs) <= relative * np.linalg.norm(whole), name
        covered[name] += array.size
    assert all(covered[name] >= gradients[name].size for name in gradients), "a part of a gradient is nowhere"


def close(ours: np.ndarray, theirs: np.ndarray, relative: float, what: str) -> None:
    """See that two arrays agree, relative to the largest element."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * np.abs(theirs).max(), err_msg=what)
