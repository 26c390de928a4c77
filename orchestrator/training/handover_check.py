"""The handover check of a model on its devices: measure it on the reference batch, and compare."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.atomic_files import write_atomically
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reference import (
    DIGEST,
    MEASURED,
    PROJECTIONS,
    Handover,
    Measurement,
    Reference,
    check,
    read_reference,
    read_sums,
    reference_batch,
    share,
    signs,
    to_files,
)
from orchestrator.checkpoint.writer import SUM_RANGE, sum_bits
from orchestrator.config.schema import RunConfig
from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.pairs import RESPONSES
from orchestrator.data.stream import TokenStream
from orchestrator.distributed.exchange import exchange, new_topic
from orchestrator.errors import NonFiniteError
from orchestrator.models.protocol import ShardableModel
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.parallel_strategy import ParallelStrategy, local_parameters

HANDOVERS = MEASURED  # of a run directory: a list, one entry per start from a checkpoint


def make_batch(config: RunConfig, stream: TokenStream) -> dict[str, np.ndarray]:
    """Return the reference batch of a run: the first sequences of the held-out data (else of the training data), cut.

    Args:
        config: of the run.
        stream: where the sequences are from.
    """
    settings = config.checkpoint.handover
    assert isinstance(settings.seq_len, int), "training.resolved has filled it in"
    rows = stream.batch(range(min(settings.sequences, len(stream))))
    rows.pop(RESPONSES, None)  # the check is of the model, whatever it learns from
    if "conversations" in stream.facts:
        rows["targets"] = _next_tokens(rows)
    return reference_batch(rows, min(settings.seq_len, config.train.seq_len))


def _next_tokens(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return targets that count everywhere in a document: answers, which alone are learnt, begin behind the cut.

    Args:
        rows: of a stream of conversations.
    """
    targets, tokens = rows["targets"].copy(), rows["tokens"]
    missing = targets[:, :-1] == IGNORE_INDEX
    if "documents" in rows:
        missing &= rows["documents"][:, 1:] == rows["documents"][:, :-1]
    targets[:, :-1] = np.where(missing, tokens[:, 1:], targets[:, :-1])
    return targets


def reference_files(
    model: ShardableModel, parallel: ParallelStrategy, batch: Mapping[str, np.ndarray]
) -> dict[str, bytes]:
    """Return what a checkpoint carries for the check: `batch`, and the model's results. All ranks call it together.

    Args:
        model: the model of the run.
        parallel: the strategy.
        batch: int64 arrays [rows, length], the same on all ranks.

    Raises:
        NonFiniteError: its loss or the norm of its gradients is not finite, on all ranks.
    """
    measured = measure(model, parallel, batch)
    if measured.loss is None or measured.grad_norm is None:
        given = {"loss": measured.loss, "gradient norm": measured.grad_norm}
        raise NonFiniteError(
            "the model to be saved gives numbers that are not finite for its reference batch",
            got=", ".join(f"{name} {value or 'not finite'}" for name, value in given.items()),
        )
    first = {name: array[: len(batch["tokens"])] for name, array in measured.digest.items()}
    return to_files(Reference(batch, replace(measured, digest=first)))


def check_handover(
    checkpoint: Checkpoint,
    model: ShardableModel,
    optimizer: torch.optim.Optimizer | None,
    parallel: ParallelStrategy,
    here: Mapping[str, Any],
) -> Handover:
    """Measure the restored `model` and compare it with `checkpoint`. All ranks call it together.

    Args:
        checkpoint: the checkpoint that was restored.
        model: the restored model.
        optimizer: restored too, or None.
        parallel: the strategy.
        here: provenance of this side.

    Raises:
        CheckpointError: the reference of the checkpoint is damaged, or of a precision without a tolerance.
    """
    reference = read_reference(checkpoint)
    if reference is None and not checkpoint.partial:
        return check(checkpoint, None, None, None, here)
    # A snapshot in memory carries no reference batch: that the bits are the saved ones is what can be said of it.
    measured = measure(model, parallel, reference.batch) if reference else None
    found = sum_tensors(parallel.state_shards(model, optimizer), parallel)
    saved = read_sums(checkpoint)
    other = sorted(name for name, total in found.items() if name in saved and saved[name] != total)
    return check(checkpoint, reference, measured, other, here)


def sum_tensors(shards: Sequence[Shard], parallel: ParallelStrategy) -> dict[str, int]:
    """Sum the bits of each tensor over all ranks, on all of them. All ranks call it together.

    Args:
        shards: this rank's parts.
        parallel: the strategy.
    """
    mine: dict[str, int] = {}
    for shard in shards:
        if shard.owned:
            mine[shard.name] = mine.get(shard.name, 0) + sum_bits(shard.data)

    def add(told: list[str]) -> str:
        totals: dict[str, int] = {}
        for text in told:
            for name, part in json.loads(text).items():
                totals[name] = (totals.get(name, 0) + part) % SUM_RANGE
        return json.dumps(totals)

    # As text: whole numbers that no reduction rounds.
    topic = parallel.broadcast(new_topic())
    result: dict[str, int] = json.loads(exchange(parallel, topic, json.dumps(mine), add))
    return result


def note(run_dir: Path, entry: Mapping[str, Any]) -> None:
    """Add a check to the run's list.

    Args:
        run_dir: the run's directory.
        entry: the result of the check.
    """
    path = run_dir / HANDOVERS
    try:
        entries = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        entries = []
    write_atomically(path, json.dumps([*entries, {**entry, "time": time.time()}], indent=1))


def measure(model: ShardableModel, parallel: ParallelStrategy, batch: Mapping[str, np.ndarray]) -> Measurement:
    """Compute loss, gradient norm and digest of the logits for `batch`. All ranks call it together.

    Weights, optimizer and random state stay as they are; gradients must not be waiting, and none are left.

    Args:
        model: the model of the run.
        parallel: the strategy.
        batch: int64 arrays [rows, length], the same on all ranks.
    """
    layout, (rank, shares) = parallel.layout, parallel.data_share
    length = batch["tokens"].shape[1]
    mine = share(batch, layout.data_parallel, layout.sequence_split, rank, shares)
    digests: list[Tensor] = []
    training = model.training
    model.eval()
    placed = parallel.prepare_batch(mine)
    targets = parallel.sum_over_data((placed["targets"] != IGNORE_INDEX).sum()).clamp(min=1)
    whole = torch.as_tensor(mine["targets"]).to(parallel.root_device)
    with parallel.uncompiled(), _digesting(model, whole, digests):
        part = parallel.forward_backward(model, placed, len(whole), targets)
    total, norm = parallel.reduce_and_clip(model, part, None)
    for _, parameter in local_parameters(model):
        parameter.grad = None
    # Of a pipeline's ranks one has the head.
    digest = digests[0] if digests else torch.zeros(*whole.shape, len(DIGEST) + 1, device=whole.device)
    gathered = _gather(digest, parallel, rank, shares)
    parallel.finish_step()
    model.train(training)
    values = gathered.cpu().numpy()[:, :length]
    parts = {name: np.ascontiguousarray(values[..., at] / values[..., -1]) for at, name in enumerate(DIGEST)}
    loss_value, norm_value = (_finite(value) for value in parallel.fetch([total, norm]))
    return Measurement(loss_value, norm_value, parts)


@contextmanager
def _digesting(model: ShardableModel, targets: Tensor, into: list[Tensor]) -> Iterator[None]:
    """Within it the head, asked for the loss, digests its logits too: the forward pass is made once."""
    ops = model.head.ops

    def loss(hidden: Tensor, weight: Tensor, wanted: Tensor, *more: Any) -> Tensor:
        value = ops.loss(hidden, weight, wanted, *more)
        with torch.no_grad():
            into.append(_digest(ops.logits(hidden.detach(), weight.detach(), None).float(), targets))
        return value

    model.head.ops = replace(ops, loss=loss)
    try:
        yield
    finally:
        model.head.ops = ops


def _digest(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, T, V] and [B, T] to the parts of `DIGEST`, and a one: [B, T, parts + 1]."""
    size = logits.shape[-1]
    has = targets != IGNORE_INDEX
    at = torch.where(has, targets, 0).unsqueeze(-1)
    target = torch.where(has, logits.gather(-1, at).squeeze(-1), 0.0)
    # Products one by one: as a matrix product they would be rounded to bf16 on some hardware.
    projections = [
        (logits * torch.from_numpy(signs(number, size)).to(logits.device)).sum(-1) / math.sqrt(size)
        for number in range(PROJECTIONS)
    ]
    return torch.stack((logits.logsumexp(-1), target, *projections, torch.ones_like(target)), -1)


def _gather(part: Tensor, parallel: ParallelStrategy, rank: int, shares: int) -> Tensor:
    """Return the digests of all shares on all ranks; the ones tell how often each was counted."""
    rows = part.shape[0]
    zeros = [torch.zeros_like(part)] * shares
    zeros[rank] = part
    assert rows * shares % parallel.layout.data_parallel == 0
    return parallel.sum_of_parts(torch.cat(zeros))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
