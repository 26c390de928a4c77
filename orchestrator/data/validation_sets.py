"""The batches of an evaluation, each of one set alone, so that every set has a loss of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.stream import Batch, TokenStream


@dataclass(frozen=True)
class ValidationSet:
    """Sequences that have a loss of their own.

    Attributes:
        label: in metrics.
        stream: made with `repeat=False`.
        indices: of the sequences, one or more.
    """

    label: str
    stream: TokenStream
    indices: Sequence[int]


class ValidationBatches:
    """Fixed sets of sequences, the same number of batches on every rank. Sized and iterable; see the function.

    Args:
        sets: in the order in which they are gone through.
        batch: sequences per batch.
        rank: number of this share.
        world: number of shares.
    """

    def __init__(self, sets: Sequence[ValidationSet], batch: int, rank: int = 0, world: int = 1):
        self.sets, self.batch, self.rank, self.world = tuple(sets), batch, rank, world

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the sets."""
        return tuple(one.label for one in self.sets)

    @property
    def sequences(self) -> int:
        """Of all sets, over all ranks."""
        return sum(len(one.indices) for one in self.sets)

    @property
    def numbers(self) -> list[int]:
        """The number of the set of each batch."""
        step = self.batch * self.world
        return [number for number, one in enumerate(self.sets) for _ in range(0, len(one.indices), step)]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Batch]:
        step = self.batch * self.world
        for one in self.sets:
            for first in range(0, len(one.indices), step):
                real = list(one.indices[first + self.rank : first + step : self.world])
                # The first sequence stands in for those that are missing; its targets do not count.
                batch = one.stream.batch(real + [one.indices[0]] * (self.batch - len(real)))
                batch["targets"][len(real) :] = IGNORE_INDEX
                yield batch


def validation_batches(
    stream_val: TokenStream, sequences: int, batch: int, rank: int = 0, world: int = 1
) -> ValidationBatches:
    """Divide the first `sequences` of a validation stream into batches; fewer if it is shorter.

    Every rank gets the same number of batches of shape [batch, seq_len], so that all of them call the collectives
    together; where the set does not divide, rows without targets fill up. The set does not depend on `world`.

    Args:
        stream_val: made with `repeat=False`.
        sequences: number of sequences.
        batch: sequences per batch.
        rank: number of this share.
        world: number of shares.
    """
    indices = range(min(sequences, len(stream_val)))
    return ValidationBatches([ValidationSet("", stream_val, indices)] if indices else [], batch, rank, world)
