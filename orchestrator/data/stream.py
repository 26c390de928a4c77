"""The order of the training data: a pure function of the stores, the seed and the index of a sequence.

No process holds a position. Step `s` trains on the sequences number `s * global_batch` to `(s + 1) * global_batch - 1`
that are not left out, and whichever rank wants one computes it; so the order does not depend on how many ranks there
are, and resuming is starting at another step. `grain` supplies the shuffles, the epochs and the mixing, all by random
access.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from orchestrator.config.batch_sizes import BatchSizes
from orchestrator.config.schema import ChatConfig
from orchestrator.data.sequences import Batch, store_rows, too_short
from orchestrator.data.skipping import Ranges, behind, kept, merged
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError

__all__ = [
    "Batch",
    "Position",
    "StepLoader",
    "TokenStream",
    "mixture_shares",
]
STREAM_VERSION = 1  # of the order; a change makes old data positions meaningless


class TokenStream:
    """Training sequences by index.

    A store gives sequences as `store_rows` says: windows of its tokens, or whole conversations. Each epoch of each
    store has an order of its own; the mixture takes from the stores in a fixed interleaving in the proportion of the
    weights, whichever epoch each of them is in.

    Args:
        stores: with one tokenizer.
        weights: of the stores in the mixture, positive.
        split: `train` or `validation`.
        seq_len: tokens per sequence.
        seed: of the order.
        document_mask: number the documents of a sequence; otherwise it is one, and has no `documents`.
        repeat: start new epochs for ever; otherwise the stream has every sequence of every store once, in the
            proportion of the weights for as long as all have some left.
        chat: how conversations become sequences.

    Attributes:
        windows: how many sequences each store has.

    Raises:
        DataError: a store has less than one sequence in this split.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float],
        split: str,
        seq_len: int,
        seed: int,
        document_mask: bool = True,
        repeat: bool = True,
        chat: ChatConfig = ChatConfig(),
    ):
        self.seq_len, self.split, self.document_mask = seq_len, split, document_mask
        self._rows = [store_rows(store, split, seq_len, chat) for store in stores]
        self.windows = tuple(len(rows) for rows in self._rows)
        for store, windows in zip(stores, self.windows, strict=True):
            if not windows:
                raise too_short(store, split, seq_len)
        self._weights = tuple(float(weight) for weight in weights)
        self._order = _order(self.windows, weights, seed, repeat)
        self._length: int = len(self._order)
        self._facts = {
            "version": STREAM_VERSION,
            "stores": [store.fingerprint for store in stores],
            "weights": list(self._weights),
            "split": split,
            "seq_len": seq_len,
            "seed": seed,
            "document_mask": document_mask,
            "repeat": repeat,
        }
        if packed := [rows.facts for rows in self._rows if rows.facts]:
            self._facts["conversations"] = packed[0]

    def __len__(self) -> int:
        """Sequences before the end; practically endless with `repeat`."""
        return self._length

    @property
    def facts(self) -> dict[str, Any]:
        """JSON-able: everything that the order depends on."""
        return dict(self._facts)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that the order depends on: equal fingerprints mean equal sequences."""
        return hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()

    def counts(self, sequences: int) -> tuple[int, ...]:
        """Return how many of the first `sequences` sequences are from each store, in a stream that repeats.

        Args:
            sequences: a number of sequences.
        """
        # grain's rule (0.2, `_dataset_and_key_of_next_element`): of k elements a store leaves floor(k * others / all).
        whole = _proportions(self._weights)
        found, left, rest = [], sequences, sum(whole)
        for share in whole:
            others = left * (rest - share) // rest
            found.append(left - others)
            left, rest = others, rest - share
        return tuple(found)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the store, and of the window in its split, of the sequence `index`."""
        if not 0 <= index < self._length:
            raise IndexError(f"sequence {index} of a stream of {self._length}")
        store, window = self._order[index]
        return int(store), int(window)

    def sequence(self, index: int) -> Batch:
        """Return one sequence: int64 arrays of shape [seq_len].

        `tokens`; `targets`, the next token, or -100 where that belongs to another document; `positions` in the
        document, counted from where it starts in the sequence; with `document_mask`, `documents`, counted from 0 in
        the sequence.

        Args:
            index: number of the sequence.
        """
        return {name: array[0] for name, array in self.batch([index]).items()}

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return several sequences: the arrays of `sequence`, of shape [len(indices), seq_len].

        Args:
            indices: numbers of the sequences.
        """
        places = np.array([self.locate(index) for index in indices], dtype=np.int64).reshape(-1, 2)
        batch: Batch = {}
        for store in np.unique(places[:, 0]).tolist():
            ours = places[:, 0] == store
            part = self._rows[store].read(places[ours, 1].tolist(), self.document_mask)
            for name, array in part.items():
                batch.setdefault(name, np.empty((len(indices), self.seq_len), dtype=np.int64))[ours] = array
        return batch


@dataclass(frozen=True)
class Position:
    """The position of a run in its data.

    Attributes:
        step: completed optimizer steps.
        sequence: the first sequence of the stream that has not been trained on. `step` times the global batch, unless
            the batch or the data was changed on the way, or some of it was left out.
        tokens: that were trained on so far.
    """

    step: int = 0
    sequence: int = 0
    tokens: int = 0


class StepLoader:
    """The share of one data rank of every optimizer step, read ahead by a thread.

    Step `s` gives `[global_batch / data_world, seq_len]` arrays: of the sequences from `start.sequence` on that are not
    left out, those numbered `(s - start.step) * global_batch + data_rank + k * data_world`.
    While batches warm up (`sizes`) a step has fewer. Iterating again starts at `start` again.

    Args:
        stream: the training sequences.
        global_batch: sequences per step over all ranks.
        data_rank: number of this share.
        data_world: number of shares.
        start: where the first step begins.
        steps: how many it yields.
        prefetch: steps that are read ahead; 0 reads when asked.
        skipped: ranges of sequences that are left out: the first one, and the one behind the last.
        sizes: sequences of the step that follows so many completed ones; None: always `global_batch`, the largest.

    Raises:
        DataError: the ranks cannot share the batch equally.
    """

    def __init__(
        self,
        stream: TokenStream,
        global_batch: int,
        data_rank: int,
        data_world: int,
        start: Position,
        steps: int,
        prefetch: int = 2,
        skipped: Ranges = (),
        sizes: BatchSizes | None = None,
    ):
        self.sizes = sizes or BatchSizes((), global_batch)
        if odd := [size for size in self.sizes.all if size < 1 or size % data_world]:
            global_batch = odd[-1]
            raise DataError(
                "the global batch does not divide over the data ranks",
                got=f"{global_batch} sequences (train.global_batch_tokens / seq_len) over {data_world} data ranks",
                allowed=f"a multiple of {data_world} sequences, that is of {data_world * stream.seq_len} tokens",
                fix=f"set train.global_batch_tokens={_round_up(global_batch, data_world) * stream.seq_len}",
            )
        if not 0 <= data_rank < data_world:
            raise ValueError(f"data rank {data_rank} of {data_world}")
        self.stream, self.global_batch = stream, global_batch
        self.data_rank, self.data_world = data_rank, data_world
        self.start, self.steps, self.prefetch = start, max(0, steps), prefetch
        self.skipped = merged(skipped)

    def move(self, start: Position, skipped: Ranges) -> None:
        """Begin at another step, with other ranges left out; the last step stays the last one.

        Args:
            start: where the next iteration begins.
            skipped: what is left out.
        """
        self.steps += self.start.step - start.step
        self.start, self.skipped = start, merged(skipped)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        steps = range(self.start.step, self.start.step + self.steps)
        source = (self.step(step) for step in steps)
        return read_ahead(source, self.prefetch) if self.prefetch > 0 else source

    def step(self, step: int) -> Batch:
        """Return this rank's share of one step; with several sources `sources` [rows, seq_len] says which is whose.

        Args:
            step: number of the step, from 0.
        """
        sequences = kept(self.skipped, self.first(step), self.sizes.at(step))[self.data_rank :: self.data_world]
        batch = self.stream.batch(sequences)
        if len(self.stream.windows) > 1:
            sources = np.array([[self.stream.locate(index)[0]] for index in sequences], dtype=np.int32)
            batch["sources"] = np.repeat(sources, self.stream.seq_len, axis=1)
        return batch

    def go_on_at(self, step: int) -> None:
        """Begin with another step than was said when this loader was made.

        Args:
            step: number of the step, from 0, of the same leg of the run.
        """
        end = self.start.step + self.steps
        self.move(Position(step, self.first(step), self.tokens_after(step)), self.skipped)
        self.steps = max(0, end - step)

    def tokens_after(self, step: int) -> int:
        """Return the tokens that were trained on after `step` optimizer steps."""
        return self.start.tokens + self._between(step) * self.stream.seq_len

    def state(self, step: int) -> dict[str, Any]:
        """Return the position after `step` optimizer steps, for JSON: the next sequence, and what is left out."""
        return {
            "next_sequence": self.first(step),
            "tokens": self.tokens_after(step),
            "fingerprint": self.stream.fingerprint,
            "facts": self.stream.facts,
            **({"skipped": [list(pair) for pair in self.skipped]} if self.skipped else {}),
        }

    def taken(self, step: int) -> tuple[int, ...]:
        """Return how many sequences of each store were trained on after `step` optimizer steps, in all.

        Args:
            step: number of the step, from 0; not before that of `start`.
        """
        end = self.first(step)
        found = list(self.stream.counts(end))
        for first, stop in self.skipped:
            left_out = zip(self.stream.counts(min(stop, end)), self.stream.counts(min(first, end)), strict=True)
            found = [number - (high - low) for number, (high, low) in zip(found, left_out, strict=True)]
        return tuple(found)

    def first(self, step: int) -> int:
        """Return the first sequence of a step, in whose place none is left out.

        Args:
            step: number of the step, from 0; not before that of `start`.
        """
        return behind(self.skipped, self.start.sequence, self._between(step))

    def _between(self, step: int) -> int:
        """Return the sequences of the steps from `start` to `step`."""
        return self.sizes.upto(step) - self.sizes.upto(self.start.step)


def import_grain() -> Any:
    """Import grain, without its warning that JAX, which it does not need, is absent."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import grain
    finally:
        logger.setLevel(level)
    return grain


def _order(windows: Sequence[int], weights: Sequence[float], seed: int, repeat: bool) -> Any:
    """Return a grain dataset that maps the index of a sequence to (store, window)."""
    grain = import_grain()
    parts = []
    for number, count in enumerate(windows):
        part = grain.MapDataset.source(_Windows(number, count)).seed(_derive(seed, number)).shuffle()
        parts.append(part.repeat() if repeat else part)
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, list(weights)) if repeat else _EachOnce(parts, weights)


def mixture_shares(weights: Sequence[float]) -> list[float]:
    """Return the share of the sequences that each source really has: grain makes integers of the weights.

    Its rule (grain 0.2): the smallest weight becomes 100, the others are cut to whole numbers.

    Args:
        weights: of the sources.
    """
    whole = _proportions(weights)
    return [number / sum(whole) for number in whole]


def _proportions(weights: Sequence[float]) -> list[int]:
    scale = 100 / min(weights)
    return [int(weight * scale) for weight in weights]


class _EachOnce:
    """Every element of several datasets once: the one that is furthest behind its weight gives the next.

    A dataset that has no more is passed over; grain's own mixture ends with the first one that does.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float]):
        self._parts, self._weights = parts, weights
        self._taken = [0] * len(parts)
        self._plan: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: int) -> Any:
        while len(self._plan) <= index:
            left = [number for number, part in enumerate(self._parts) if self._taken[number] < len(part)]
            part = min(left, key=lambda number: (self._taken[number] + 1) / self._weights[number])
            self._plan.append((part, self._taken[part]))
            self._taken[part] += 1
        part, position = self._plan[index]
        return self._parts[part][position]


class _Windows:
    """The windows of one store as a grain source; the data is read where it is used, many windows at a time."""

    def __init__(self, store: int, count: int):
        self._store, self._count = store, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._store, index


def _derive(seed: int, store: int) -> int:
    """Derive a seed per store: two copies of one store in a mixture do not march in step."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{store}".encode()).digest()[:4], "little")


def read_ahead(source: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Run an iterator in a thread, at most `depth` items ahead; its error is raised here.

    Args:
        source: what is read.
        depth: items ahead.
    """
    items: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in source:
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    # An iterator that is never finished must not keep the interpreter from exiting, hence a daemon; and a daemon that
    # is killed inside of compiled code may take the process down, hence the end at exit.
    thread = threading.Thread(target=work, name="read-ahead", daemon=True)

    def end() -> None:
        stop.set()
        if threading.current_thread() is not thread:  # garbage may be collected in any thread
            thread.join(timeout=10)

    atexit.register(end)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        end()
        atexit.unregister(end)


def _round_up(value: int, multiple: int) -> int:
    return max(1, -(-value // multiple)) * multiple
