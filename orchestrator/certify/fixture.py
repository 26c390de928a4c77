"""The one small training that every certificate is of: its configuration, its batches, and the layouts it is tried on.

All of it is arithmetic on whole numbers, the same everywhere; `recorded.json` holds its result on a CPU. No torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from orchestrator.config.schema import RunConfig
from orchestrator.constants import IGNORE_INDEX
from orchestrator.sharding.layout import Layout, check_layout

STEPS, SAVED_STEP = 20, 10
"""Of a training; and after how many of them it is saved and resumed."""
ROWS, SEQ_LEN, VOCABULARY = 48, 48, 256
SEED, OTHER_SEED = 12, 13
WORDS = (
    "model=tiny",
    *("model.dim=64", "model.layers=2", "model.heads=8", "model.kv_heads=4", "model.mlp_dim=128"),
    *(f"model.vocab_size={VOCABULARY}", f"model.max_seq_len={SEQ_LEN}", "model.tied_embeddings=false"),
    *("optim=adamw", "optim.lr=0.003", "optim.schedule.warmup_steps=5", "data.tokenizer.kind=bytes"),
    *(f"train.max_steps={STEPS}", f"train.seq_len={SEQ_LEN}", f"train.global_batch_tokens={ROWS * SEQ_LEN}"),
    *("train.eval_every=null", "logger.tensorboard=false", f"seed={SEED}", "name=certificate"),
)
"""The configuration, as words of a command line; hardware and layout are the user's."""

# Axes that a layout splits, in the order in which they are tried.
_SPLITS = (
    *((axis,) for axis in ("fsdp", "replicate", "tensor", "context")),
    *(("fsdp", "tensor"), ("replicate", "fsdp"), ("fsdp", "context"), ("context", "tensor")),
    ("replicate", "fsdp", "tensor"),
)
Rows = dict[str, np.ndarray]


def batch(step: int) -> Rows:
    """Return the global batch of a step: int64 arrays [ROWS, SEQ_LEN].

    A token is followed by 5 x token + 17 (mod 251) three times of four, else by any: a model can learn that. What
    is left to chance are the bytes of SHAKE-256 of `orchestrator/certificate/<step>`.

    Args:
        step: its number, from 0.
    """
    size = ROWS * (SEQ_LEN + 1)
    stream = hashlib.shake_256(f"orchestrator/certificate/{step}".encode()).digest(2 * size)
    chances, others = np.frombuffer(stream, np.uint8).astype(np.int64).reshape(2, ROWS, SEQ_LEN + 1)
    windows = others % 251
    for at in range(1, SEQ_LEN + 1):
        follows = chances[:, at] % 4 > 0
        windows[:, at] = np.where(follows, (5 * windows[:, at - 1] + 17) % 251, windows[:, at])
    positions = np.broadcast_to(np.arange(SEQ_LEN, dtype=np.int64), (ROWS, SEQ_LEN)).copy()
    return {"tokens": windows[:, :-1].copy(), "targets": windows[:, 1:].copy(), "positions": positions}


def part_of(rows: Mapping[str, np.ndarray], rank: int, shares: int) -> Rows:
    """Return the rows of a global batch that one process reads.

    Args:
        rows: of the global batch.
        rank: which share.
        shares: of how many.
    """
    size = ROWS // shares
    return {name: array[rank * size : (rank + 1) * size] for name, array in rows.items()}


def only(rows: Mapping[str, np.ndarray], part: int, parts: int) -> Rows:
    """Return a batch in which the tokens of one part alone are targets: the loss and its gradients are that part's.

    Args:
        rows: of the global batch.
        part: which rows have targets.
        parts: into which the batch is cut.
    """
    size = ROWS // parts
    inside = np.zeros((ROWS, 1), dtype=bool)
    inside[part * size : (part + 1) * size] = True
    return {**rows, "targets": np.where(inside, rows["targets"], IGNORE_INDEX)}


class Batches:
    """This process's shares of the batches of some steps, as a loader.

    Args:
        steps: their numbers.
        rank: which share.
        shares: of how many.
    """

    def __init__(self, steps: range, rank: int, shares: int):
        self._steps, self._rank, self._shares = steps, rank, shares

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Rows]:
        for step in self._steps:
            yield part_of(batch(step), self._rank, self._shares)


@dataclass(frozen=True)
class Choice:
    """The layouts that a certificate tries.

    Attributes:
        layouts: in order.
        left_out: a line for each kind that the devices or the model do not allow.
    """

    layouts: tuple[Layout, ...]
    left_out: tuple[str, ...] = ()


def choose_layouts(config: RunConfig, devices: int, slices: int = 1) -> Choice:
    """Choose a layout for every kind that so many devices allow: each axis alone, and the usual pairs and triples.

    Args:
        config: of the training.
        devices: of the job; every layout takes all of them.
        slices: groups of devices between which the network is slow; replicate is a multiple of their number.
    """
    if devices == 1:
        return Choice((Layout(),))
    found, left_out = list[Layout](), list[str]()
    for axes in _SPLITS:
        layouts = [layout for layout in _splits(axes, devices) if layout.replicate % slices == 0]
        allowed = [layout for layout in layouts if not _problems(layout, config)]
        if allowed:
            found.append(min(allowed, key=lambda layout: max(layout.as_dict().values())))
        else:
            why = _problems(layouts[0], config)[0] if layouts else f"{devices} devices cannot be split so"
            left_out.append(f"{' x '.join(axes)}: {why}")
    return Choice(tuple(found), tuple(left_out))


def _problems(layout: Layout, config: RunConfig) -> list[str]:
    problems = check_layout(layout, config.model, config.train.seq_len, config.train.global_batch_tokens)
    return [f"{problem.what} ({problem.got})" for problem in problems]


def _splits(axes: tuple[str, ...], devices: int) -> Iterator[Layout]:
    """Layouts that split each of `axes`, and no other one."""

    def degrees(left: int, count: int) -> Iterator[tuple[int, ...]]:
        if count == 1:
            if left > 1:
                yield (left,)
            return
        for first in range(left, 1, -1):
            if left % first == 0:
                yield from ((first, *rest) for rest in degrees(left // first, count - 1))

    for found in degrees(devices, len(axes)):
        yield replace(Layout(), **cast(Any, dict(zip(axes, found, strict=True))))


def with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    """Return the configuration on another layout.

    Args:
        config: of the training.
        layout: its degrees.
    """
    micro_batch = max(1, math.ceil(ROWS / layout.data_parallel))
    degrees: dict[str, Any] = layout.as_dict()
    return replace(
        config,
        layout=replace(config.layout, **degrees),
        train=replace(config.train, micro_batch_size=micro_batch),
    )
