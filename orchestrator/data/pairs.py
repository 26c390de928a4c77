"""Pairs of responses to one prompt, of which one was preferred: from rows of data to sequences.

In a store a pair is one document: the conversation with the chosen response, then that with the rejected one, so that
the two are never apart. In a sequence they are two documents, and several pairs may share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.conversation import CHOSEN, PROMPT, REJECTED, Conversation, messages_of, system_of, tools_of
from orchestrator.data.packing import TooLong, best_fit
from orchestrator.data.store import TokenStore
from orchestrator.data.store_index import SECOND, damaged
from orchestrator.errors import DataError

PAIRS_VERSION = 1  # of what shares a sequence; a change makes old data positions meaningless
RESPONSES = "responses"  # of a batch, [B, T] int64: twice the pair's number in its sequence; 1 more: the rejected one
NO_RESPONSE = -1
_READ_TOKENS = 1 << 22
_ALLOWED = (
    "chosen and rejected: texts, or lists of messages; and prompt, a text or a list of messages, unless both lists"
    " begin with it"
)


def pair_of(row: Mapping[str, Any], place: object, consumed: int = 0) -> Conversation | None:
    """Return the pair of a row, as a conversation that has two ends; None where a column that it needs is null.

    Args:
        row: its columns: `chosen`, `rejected`, and `prompt` where they do not begin with it.
        place: of the row, for messages.
        consumed: bytes that reading it took.

    Raises:
        DataError: it is none.
    """
    if CHOSEN not in row or REJECTED not in row:
        raise _no_pair(place, f"columns {', '.join(map(str, row)) or 'none'}")
    prompt = row.get(PROMPT)
    if row[CHOSEN] is None or row[REJECTED] is None:
        return None
    before = [] if prompt is None else messages_of(prompt, "user", PROMPT, place)
    ends = [messages_of(row[name], "assistant", name, place) for name in (CHOSEN, REJECTED)]
    # Lists of messages often have the whole conversation, whatever the prompt is beside them.
    whole = [end if end and end[0]["role"] != "assistant" else [*before, *end] for end in ends]
    system = system_of(row)
    if system is not None and not (whole[0] and whole[0][0]["role"] == "system"):
        whole = [[system, *messages] for messages in whole]
    first = _shared(*whole)
    if not first or any(len(messages) == first for messages in whole):
        raise _no_pair(place, "no prompt" if not first else "responses that do not differ")
    if any(messages[first]["role"] != "assistant" for messages in whole):
        raise _no_pair(place, f"conversations that part at a message of the {whole[0][first]['role']}")
    chosen, rejected = map(tuple, whole)
    return Conversation(chosen, tools_of(row, place), first, consumed, str(place), rejected)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many messages two conversations begin with alike."""
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def _no_pair(place: object, got: str) -> DataError:
    return DataError(f"the row has no pair of responses to one prompt: {place}", got=got, allowed=_ALLOWED)


class PairRows:
    """The pairs of a split as sequences of `seq_len`.

    Args:
        store: of pairs.
        split: of the store.
        seq_len: tokens of a sequence.
        packing: several in one; else one in each.
        too_long: what becomes of pairs that take more than `seq_len` places; cut, each response keeps half of them, or
            what the other leaves.

    Raises:
        DataError: one is too long, and none may be; or the store is damaged.
    """

    def __init__(self, store: TokenStore, split: str, seq_len: int, packing: bool, too_long: TooLong):
        self._split, self._seq_len, self._filler = store.split(split), seq_len, store.eos_id
        self._packing, self._too_long = packing, too_long
        starts = self._split.document_starts
        second = self._seconds(store, starts)
        self._starts = np.stack((starts[:-1], second), -1)
        places = np.stack((second - starts[:-1], starts[1:] - second), -1) - 1
        longer = np.flatnonzero(places.sum(-1) > seq_len)
        if longer.size and too_long == "error":
            raise _longer(store, split, seq_len, int(longer.size), int(places.sum(-1).max()))
        first = np.minimum(places[:, 0], np.maximum(seq_len // 2, seq_len - places[:, 1]))
        self._places = np.stack((first, np.minimum(places[:, 1], seq_len - first)), -1)
        kept = np.ones(len(places), dtype=bool)
        for number in longer.tolist():
            kept[number] = too_long == "truncate" and all(self._counts(number, side).any() for side in range(2))
        self.cut, self.left_out = int(kept[longer].sum()), int((~kept).sum())
        self._members = best_fit(self._places.sum(-1), np.flatnonzero(kept), seq_len, packing)

    def _seconds(self, store: TokenStore, starts: np.ndarray) -> np.ndarray:
        """Where the second conversation of each pair begins."""
        found = []
        for low in range(0, self._split.tokens, _READ_TOKENS):
            marks = self._split.read_marks(low, min(low + _READ_TOKENS, self._split.tokens))
            found.append(np.flatnonzero(marks & SECOND) + low)
        second = np.concatenate([np.zeros(0, dtype=np.int64), *found])
        if second.size != starts.size - 1 or ((second <= starts[:-1]) | (second >= starts[1:] - 1)).any():
            raise damaged(store.path, f"{second.size} second responses of {starts.size - 1} pairs", "one of each pair")
        return second

    @property
    def facts(self) -> dict[str, Any]:
        """What the sequences depend on beside the store and `seq_len`."""
        return {"version": PAIRS_VERSION, "pairs": True, "packing": self._packing, "too_long": self._too_long}

    def __len__(self) -> int:
        return len(self._members)

    def read(self, numbers: Sequence[int], document_mask: bool) -> dict[str, np.ndarray]:
        """Return the arrays of `TokenStream.sequence` and `RESPONSES`, of shape [len(numbers), seq_len].

        Args:
            numbers: of the sequences.
            document_mask: not asked: without it the responses of a pair would see each other.
        """
        shape = (len(numbers), self._seq_len)
        batch = {
            "tokens": np.full(shape, self._filler, dtype=np.int64),
            "targets": np.full(shape, IGNORE_INDEX, dtype=np.int64),
            "positions": np.zeros(shape, dtype=np.int64),
            "documents": np.zeros(shape, dtype=np.int64),
            RESPONSES: np.full(shape, NO_RESPONSE, dtype=np.int64),
        }
        for row, number in enumerate(numbers):
            at, response = 0, 0
            for member in self._members[number].tolist():
                for side in range(2):
                    size, start = int(self._places[member, side]), int(self._starts[member, side])
                    ids, here = self._split.read(start, start + size + 1), slice(at, at + size)
                    batch["tokens"][row, here] = ids[:-1]
                    batch["targets"][row, here] = np.where(self._counts(member, side), ids[1:], IGNORE_INDEX)
                    batch["positions"][row, here] = np.arange(size)
                    batch["documents"][row, here] = batch[RESPONSES][row, here] = response
                    at, response = at + size, response + 1
            batch["positions"][row, at:] = np.arange(self._seq_len - at)
            batch["documents"][row, at:] = response
        return batch

    def lines(self) -> list[str]:
        """Describe what became sequences, for the user."""
        count, sequences = sum(map(len, self._members)), max(1, len(self._members))
        filled = sum(int(self._places[members].sum()) for members in self._members) / (sequences * self._seq_len)
        lines = [f"{count:,} pairs in {len(self):,} sequences of {self._seq_len:,} tokens, {filled:.1%} of them filled"]
        if self.cut:
            lines.append(f"{self.cut:,} pairs are longer than train.seq_len={self._seq_len}, and are cut")
        if self.left_out:
            lines.append(f"{self.left_out:,} pairs are left out: they are longer than train.seq_len={self._seq_len}")
        return lines

    def _counts(self, member: int, side: int) -> np.ndarray:
        """Which targets of a response count, bool of shape [places]."""
        start = int(self._starts[member, side]) + 1
        return self._split.read_mask(start, start + int(self._places[member, side]))


def _longer(store: TokenStore, split: str, seq_len: int, count: int, longest: int) -> DataError:
    return DataError(
        f"pairs of responses are longer than a sequence: {store.path}",
        got=f"{count:,} of the {split} split, the longest of {longest:,} places",
        allowed=f"at most {seq_len:,} (train.seq_len), for both responses with their prompts",
        fix="raise train.seq_len, or let them be cut or left out: data.chat.too_long=truncate or drop",
    )
