"""The log-likelihood of texts under a model that is placed on the devices of a layout."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.constants import IGNORE_INDEX
from orchestrator.distributed import standing
from orchestrator.distributed.exchange import exchange, new_topic
from orchestrator.evaluation.batching import Shapes, TextBatch
from orchestrator.models.protocol import ShardableModel
from orchestrator.strategies.parallel_strategy import ParallelStrategy


@dataclass(frozen=True)
class ScoredText:
    """Tokens whose log-likelihood is asked for.

    Attributes:
        tokens: of the text, with what stands before it; at least 2.
        first: the first one that is scored, from 1 on: each is given all that are before it.
    """

    tokens: Sequence[int] | np.ndarray
    first: int


@dataclass(frozen=True)
class TextScore:
    """What a model makes of a text.

    Attributes:
        log_likelihood: of the tokens that were scored, in nats.
        greedy: whether each of them is the likeliest one.
    """

    log_likelihood: float
    greedy: bool


class Scorer:
    """Scores texts. All processes of a job make one, and call it together with the same texts.

    Args:
        model: placed.
        parallel: the strategy that has placed it.
        longest: tokens that the model takes at most; of a longer text the beginning is not seen.
        batch_tokens: of a batch of each data-parallel group, about.
        heard: called with the number of texts that a batch had.
    """

    def __init__(
        self,
        model: ShardableModel,
        parallel: ParallelStrategy,
        longest: int,
        batch_tokens: int = 8192,
        heard: Callable[[int], object] = lambda count: None,
    ):
        self._model, self._parallel, self._longest, self._heard = model, parallel, longest, heard
        layout, static = parallel.layout, parallel.compilations() is not None
        self.shapes = Shapes(longest, layout.sequence_split, layout.data_parallel, batch_tokens, static)

    def __call__(self, texts: Sequence[ScoredText]) -> list[TextScore]:
        """Score texts, on every process alike.

        Args:
            texts: the same on all of them.
        """
        if not texts:
            return []
        share, shares = self._parallel.data_share
        found: dict[int, tuple[float, bool]] = {}
        training = self._model.training
        self._model.eval()
        try:
            for batch in self.shapes.batches([min(len(text.tokens) - 1, self._longest) for text in texts]):
                standing.mark()
                size = batch.rows // shares
                mine = batch.members[share * size : (share + 1) * size]
                found |= self._run(batch, [texts[number] for number in mine], mine, size)
                self._heard(len(batch.members))
        finally:
            self._model.train(training)
        if shares > 1:
            found = self._gather(found, share)
        return [TextScore(*found[number]) for number in range(len(texts))]

    def _run(
        self, batch: TextBatch, texts: Sequence[ScoredText], numbers: Sequence[int], rows: int
    ) -> dict[int, tuple[float, bool]]:
        arrays = arrange(texts, rows, batch.length, self._longest)
        scores = self._parallel.token_scores(self._model, arrays)
        targets = arrays["targets"]
        losses, greedy = scores.losses.numpy().astype(np.float64), scores.greedy.numpy()
        totals, right = -losses.sum(1), (greedy | (targets == IGNORE_INDEX)).all(1)
        return {number: (float(totals[row]), bool(right[row])) for row, number in enumerate(numbers)}

    def _gather(self, found: Mapping[int, tuple[float, bool]], share: int) -> dict[int, tuple[float, bool]]:
        """Bring the results of all groups together; of the processes that have the same one tells."""
        parallel = self._parallel
        layout, rank = parallel.layout, parallel.rank
        speaks = not any(layout.data_rank(other) == share for other in range(rank))

        def merge(told: list[str]) -> str:
            return json.dumps([pair for text in told if text for pair in json.loads(text)])

        mine = json.dumps(list(found.items())) if speaks else ""
        merged = exchange(parallel, parallel.broadcast(new_topic()), mine, merge)
        return {number: (total, right) for number, (total, right) in json.loads(merged)}


def arrange(texts: Sequence[ScoredText], rows: int, length: int, longest: int) -> dict[str, np.ndarray]:
    """Return the arrays [rows, length] of a batch, as `token_scores` takes them.

    Padding is behind the tokens, where no position before it sees it, and its targets do not count.

    Args:
        texts: at most `rows`.
        rows: of the arrays.
        length: of the arrays.
        longest: tokens that the model takes at most; of a longer text the beginning is left out.
    """
    tokens = np.zeros((rows, length), dtype=np.int64)
    targets = np.full((rows, length), IGNORE_INDEX, dtype=np.int64)
    for row, text in enumerate(texts):
        whole = np.asarray(text.tokens, dtype=np.int64)
        cut = max(0, len(whole) - 1 - longest)
        kept, first = whole[cut:], max(1, text.first - cut)
        tokens[row, : len(kept) - 1] = kept[:-1]
        targets[row, first - 1 : len(kept) - 1] = kept[first:]
    # Of padding they may be beyond what a model has learned.
    positions = np.broadcast_to(np.minimum(np.arange(length), longest - 1), (rows, length))
    return {"tokens": tokens, "targets": targets, "positions": positions.copy()}


def pack_texts(texts: Sequence[ScoredText]) -> dict[str, Any]:
    """Return texts as JSON carries them, in a tenth of the characters that lists of numbers take.

    Args:
        texts: what another process is to score.
    """
    flat = np.concatenate([np.asarray(text.tokens, dtype=np.int32) for text in texts] or [np.zeros(0, np.int32)])
    return {
        "tokens": base64.b64encode(zlib.compress(flat.tobytes(), 1)).decode(),
        "lengths": [len(text.tokens) for text in texts],
        "first": [text.first for text in texts],
    }


def unpack_texts(packed: Mapping[str, Any]) -> list[ScoredText]:
    """Return the texts of `pack_texts`.

    Args:
        packed: what it returned.
    """
    flat = np.frombuffer(zlib.decompress(base64.b64decode(packed["tokens"])), dtype=np.int32)
    ends = np.cumsum(packed["lengths"])
    parts = [flat[end - size : end] for end, size in zip(ends, packed["lengths"], strict=True)]
    return [ScoredText(part, first) for part, first in zip(parts, packed["first"], strict=True)]
