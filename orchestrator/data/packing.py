"""Sequences of whole conversations: several in one, by best fit, none divided.

Which conversations share a sequence depends on their lengths alone, so it is the same for every seed, rank and number
of ranks; the order of the sequences is the stream's.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError

PACKING_VERSION = 1  # of what shares a sequence; a change makes old data positions meaningless
TooLong = Literal["truncate", "drop", "error"]


class ConversationRows:
    """The conversations of a split as sequences of `seq_len`.

    A conversation of n tokens takes n - 1 places, each with the next token as its target, or -100 where that does not
    count. Places that are left over at the end are a document of their own, without targets.

    Args:
        store: of conversations.
        split: of the store.
        seq_len: tokens of a sequence.
        packing: several in one; else one in each.
        too_long: what becomes of those that take more than `seq_len` places.

    Raises:
        DataError: one is too long, and none may be.
    """

    def __init__(self, store: TokenStore, split: str, seq_len: int, packing: bool, too_long: TooLong):
        self._split, self._seq_len, self._filler = store.split(split), seq_len, store.eos_id
        self._too_long, self._packing = too_long, packing
        self._starts = self._split.document_starts
        self._places = np.minimum(np.diff(self._starts) - 1, seq_len)
        longer = np.flatnonzero(np.diff(self._starts) - 1 > seq_len)
        if longer.size and too_long == "error":
            raise _longer(store, split, seq_len, int(longer.size), int(np.diff(self._starts).max()))
        kept = np.ones(self._places.size, dtype=bool)
        # Those that fit count somewhere, or would not be in the store.
        kept[longer] = too_long == "truncate"
        self.cut, self.left_out = 0, 0
        for number in longer[kept[longer]].tolist():
            kept[number] = bool(self._counts(number).any())
        self.cut, self.left_out = int(kept[longer].sum()), int(longer.size - kept[longer].sum())
        self._members = best_fit(self._places, np.flatnonzero(kept), seq_len, packing)

    @property
    def facts(self) -> dict[str, Any]:
        """What the sequences depend on beside the store and `seq_len`."""
        return {"version": PACKING_VERSION, "packing": self._packing, "too_long": self._too_long}

    def __len__(self) -> int:
        return len(self._members)

    def read(self, numbers: Sequence[int], document_mask: bool) -> dict[str, np.ndarray]:
        """Return the arrays of `TokenStream.sequence`, of shape [len(numbers), seq_len].

        Args:
            numbers: of the sequences.
            document_mask: number the conversations of a sequence.
        """
        shape = (len(numbers), self._seq_len)
        tokens, targets = np.full(shape, self._filler, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        positions = np.broadcast_to(np.arange(self._seq_len, dtype=np.int64), shape).copy()
        documents = np.zeros(shape, dtype=np.int64)
        for row, number in enumerate(numbers):
            at = 0
            for place, member in enumerate([*self._members[number].tolist(), None]):
                stop = self._seq_len if member is None else at + int(self._places[member])
                if member is not None:
                    start = int(self._starts[member])
                    ids = self._split.read(start, start + stop - at + 1)
                    tokens[row, at:stop] = ids[:-1]
                    targets[row, at:stop] = np.where(self._counts(member), ids[1:], IGNORE_INDEX)
                positions[row, at:stop] = np.arange(stop - at)
                documents[row, at:stop] = place
                at = stop
        batch = {"tokens": tokens, "targets": targets, "positions": positions}
        if document_mask:
            return {**batch, "documents": documents}
        batch["positions"] = np.broadcast_to(np.arange(self._seq_len, dtype=np.int64), shape).copy()
        return batch

    def lines(self) -> list[str]:
        """Describe what became sequences, for the user."""
        count, sequences = sum(map(len, self._members)), max(1, len(self._members))
        filled = sum(int(self._places[members].sum()) for members in self._members) / (sequences * self._seq_len)
        lines = [
            f"{count:,} conversations in {len(self):,} sequences of {self._seq_len:,} tokens, filled to {filled:.1%}"
        ]
        if self.cut:
            be, what = _counted(self.cut)
            lines.append(f"{what} {be} longer than train.seq_len={self._seq_len}, and {be} cut there")
        if self.left_out:
            be, what = _counted(self.left_out)
            why = "longer than" if self._too_long == "drop" else "without an answer within"
            lines.append(f"{what} {be} left out: {why} train.seq_len={self._seq_len}")
        return lines

    def _counts(self, member: int) -> np.ndarray:
        """Which targets of a conversation count, bool of shape [places]."""
        start = int(self._starts[member]) + 1
        return self._split.read_mask(start, start + int(self._places[member]))


def best_fit(places: np.ndarray, which: np.ndarray, seq_len: int, packing: bool = True) -> list[np.ndarray]:
    """Divide documents over sequences: the longest first, each into the fullest sequence that has room for it.

    Args:
        places: how many each document takes, [documents].
        which: numbers of those to divide.
        seq_len: places of a sequence.
        packing: put several into one; else each has its own.

    Returns:
        For each sequence the numbers of its documents, rising.
    """
    if not packing:
        return [np.array([number], dtype=np.int64) for number in which.tolist()]
    order = which[np.argsort(-places[which], kind="stable")]
    members: list[list[int]] = []
    room: list[int] = []  # what sequences have left, each once, rising
    open_ones: dict[int, list[int]] = {}  # of that room: the sequences, the oldest last
    for number, size in zip(order.tolist(), places[order].tolist(), strict=True):
        at = bisect_left(room, size)
        if at == len(room):
            members.append([number])
            row, left = len(members) - 1, seq_len - size
        else:
            left = room[at]
            row = open_ones[left].pop()
            if not open_ones[left]:
                del room[at], open_ones[left]
            members[row].append(number)
            left -= size
        if left:
            if left not in open_ones:
                insort(room, left)
                open_ones[left] = []
            open_ones[left].append(row)
    return [np.array(sorted(row), dtype=np.int64) for row in members]


def _counted(count: int) -> tuple[str, str]:
    return ("is", "1 conversation") if count == 1 else ("are", f"{count:,} conversations")


def _longer(store: TokenStore, split: str, seq_len: int, count: int, longest: int) -> DataError:
    return DataError(
        f"conversations are longer than a sequence: {store.path}",
        got=f"{count:,} of the {split} split, the longest of {longest:,} tokens",
        allowed=f"at most {seq_len + 1:,} (train.seq_len={seq_len} and the target of the last position)",
        fix="raise train.seq_len, or let them be cut or left out: data.chat.too_long=truncate or drop",
    )
