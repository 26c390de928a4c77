"""The training sequences of one store, by number: windows of its documents, or whole conversations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from orchestrator.config.schema import ChatConfig
from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.packing import ConversationRows, TooLong
from orchestrator.data.pairs import PairRows
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError

Batch = dict[str, np.ndarray]


class StoreRows(Protocol):
    """The sequences of a split of a store."""

    @property
    def facts(self) -> dict[str, Any]:
        """JSON-able: what they depend on beside the store and their length."""
        ...

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int], document_mask: bool) -> Batch:
        """Return the arrays of `TokenStream.sequence`, of shape [len(numbers), seq_len].

        Args:
            numbers: of the sequences.
            document_mask: number the documents of a sequence.
        """
        ...

    def lines(self) -> list[str]:
        """Describe how they were made, for the user."""
        ...


class WindowRows:
    """Windows of `seq_len + 1` tokens, one shared between neighbours: every token is a target once per epoch.

    Args:
        store: of documents.
        split: of the store.
        seq_len: tokens of a sequence.
    """

    def __init__(self, store: TokenStore, split: str, seq_len: int):
        self._split, self._seq_len = store.split(split), seq_len
        self._boundary = np.array([_boundary(store)], dtype=np.int64)
        self._count = windows_of(self._split.tokens, seq_len)

    @property
    def facts(self) -> dict[str, Any]:
        """They depend on nothing else."""
        return {}

    def __len__(self) -> int:
        return self._count

    def read(self, numbers: Sequence[int], document_mask: bool) -> Batch:
        """Return several windows; see `StoreRows`.

        Args:
            numbers: of the windows.
            document_mask: number the documents of a sequence.
        """
        windows = np.empty((len(numbers), self._seq_len + 1), dtype=np.int64)
        for row, number in enumerate(numbers):
            start = number * self._seq_len
            windows[row] = self._split.read(start, start + self._seq_len + 1)
        return _fields(windows, self._boundary, document_mask)

    def lines(self) -> list[str]:
        """Return nothing: nothing is left out, but for less than a window at the end."""
        return []


def store_rows(store: TokenStore, split: str, seq_len: int, chat: ChatConfig) -> StoreRows:
    """Return the sequences of a split of a store.

    Args:
        store: of documents or conversations.
        split: of the store.
        seq_len: tokens of a sequence.
        chat: how conversations become sequences.

    Raises:
        DataError: a conversation is too long, and none may be.
    """
    return _store_rows(store, split, seq_len, chat.packing, chat.too_long)


@functools.lru_cache(maxsize=32)  # what is checked before the start is what is trained on
def _store_rows(store: TokenStore, split: str, seq_len: int, packing: bool, too_long: TooLong) -> StoreRows:
    if store.holds_pairs:
        return PairRows(store, split, seq_len, packing, too_long)
    if store.holds_conversations:
        return ConversationRows(store, split, seq_len, packing, too_long)
    return WindowRows(store, split, seq_len)


def blank_batch(sequences: int, seq_len: int, document_mask: bool) -> Batch:
    """Make a batch of zeros, of the names, shapes and types that a stream of these settings gives.

    Args:
        sequences: number of sequences.
        seq_len: tokens of a sequence.
        document_mask: whether attention stays within a document.
    """
    windows = np.zeros((sequences, seq_len + 1), dtype=np.int64)
    fields = _fields(windows, np.ones((1, 2), dtype=np.int64), document_mask)
    return {name: np.zeros_like(array) for name, array in fields.items()}


def windows_of(tokens: int, seq_len: int) -> int:
    """Return the number of windows of `seq_len` tokens and one target that a split of so many tokens has.

    Args:
        tokens: of the split.
        seq_len: tokens of a sequence.
    """
    return max(0, (tokens - 1) // seq_len)


def too_short(store: TokenStore, split: str, seq_len: int) -> DataError:
    """Make the error for a split that has not one sequence.

    Args:
        store: a token store.
        split: `train` or `validation`.
        seq_len: tokens of a sequence.
    """
    info = store.index.splits[split]
    if store.holds_conversations:
        return DataError(
            f"the {split} split has no conversation to train on: {store.path}",
            got=f"{info.documents} conversations, none with an answer within train.seq_len={seq_len}",
            allowed="one conversation or more",
            fix="raise train.seq_len, or bring more data",
        )
    return DataError(
        f"the {split} split is shorter than one sequence: {store.path}",
        got=f"{info.tokens} tokens",
        allowed=f"at least {seq_len + 1} (train.seq_len={seq_len} and the target of the last position)",
        fix="lower train.seq_len, or bring more data",
    )


def _boundary(store: TokenStore) -> tuple[int, int]:
    """Which tokens are the last and the first one of a document where two meet; -1: whichever."""
    documents = store.documents
    if not documents.eos:
        return -1, documents.bos_ids[0]
    # One token for both stands within the pair as well as around it: only the pair is an end.
    return store.eos_id, store.eos_id if documents.bos_ids[:1] == (store.eos_id,) else -1


def _fields(windows: np.ndarray, boundary: np.ndarray, document_mask: bool) -> Batch:
    """Windows [rows, seq_len + 1], with the boundary [1, 2] of documents, to the arrays of a batch [rows, seq_len].

    Where documents have no token at their end, the BOS of the next one is the target of the last, and ends it.
    Without `document_mask` there are no `documents`: plain causal attention needs no mask, and has faster kernels.
    """
    tokens, targets = windows[:, :-1], windows[:, 1:].copy()
    last, first = boundary[:, :1], boundary[:, 1:]
    ends = ((tokens == last) | (last < 0)) & ((targets == first) | (first < 0))
    targets[ends & (last >= 0)] = IGNORE_INDEX
    index = np.arange(tokens.shape[1], dtype=np.int64)
    if not document_mask:
        positions = np.broadcast_to(index, tokens.shape).copy()
        return {"tokens": tokens.copy(), "targets": targets, "positions": positions}
    starts = np.zeros_like(tokens)
    starts[:, 1:] = np.where(ends[:, :-1], index[1:], 0)
    documents = np.zeros_like(tokens)
    np.cumsum(ends[:, :-1], axis=1, out=documents[:, 1:])
    positions = index - np.maximum.accumulate(starts, axis=1)
    return {"tokens": tokens.copy(), "targets": targets, "positions": positions, "documents": documents}
