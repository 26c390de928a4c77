"""How sequences of different lengths become batches: like lengths together, and few shapes where each is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SHORTEST = 64  # of the lengths that are compiled


@dataclass(frozen=True)
class TextBatch:
    """Some sequences and the shape of their batch, of all processes together.

    Attributes:
        members: numbers of the sequences, at most `rows`; the other rows are empty.
        rows: a multiple of what the layout divides them by.
        length: that all are padded to, a multiple of what the layout divides sequences by.
    """

    members: tuple[int, ...]
    rows: int
    length: int


@dataclass(frozen=True)
class Shapes:
    """What shapes batches may have.

    Attributes:
        longest: tokens of a sequence at most.
        split: what divides a length.
        multiple: what divides the number of rows.
        tokens: of a batch of each group of processes, about.
        static: each shape is compiled first, so there are few: a length doubles from one to the next, and has one
            number of rows.
    """

    longest: int
    split: int = 1
    multiple: int = 1
    tokens: int = 8192
    static: bool = False

    def length_of(self, length: int) -> int:
        """Return the length that a sequence is padded to, if it is the longest of its batch.

        Args:
            length: of the sequence.
        """
        if self.static:
            length = min(max(_SHORTEST, 1 << (length - 1).bit_length()), self.longest)
        return -(-length // self.split) * self.split

    def rows_of(self, length: int) -> int:
        """Return how many sequences of a padded length a batch holds.

        Args:
            length: of the batch.
        """
        return max(1, self.tokens // length) * self.multiple

    def batches(self, lengths: Sequence[int]) -> list[TextBatch]:
        """Divide sequences into batches, the longest first: what does not fit into memory shows at once.

        Args:
            lengths: of the sequences, each at least 1 and at most `longest`.
        """
        waiting = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
        result = []
        while waiting:
            length = self.length_of(lengths[waiting[0]])
            most = self.rows_of(length)
            # Shorter ones do not fill a shape that has one of its own.
            fits = [n for n in waiting[:most] if not self.static or self.length_of(lengths[n]) == length]
            rows = most if self.static else -(-len(fits) // self.multiple) * self.multiple
            result.append(TextBatch(tuple(fits), rows, length))
            waiting = waiting[len(fits) :]
        return result
