"""Attention masks: causal, within documents, and windowed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CausalMask:
    """The mask of one forward pass as a rule, from which any part of it is made on demand.

    Attributes:
        queries: T, the number of new positions.
        past: number of positions before them that are in a cache.
        documents: [B, T] document of each token, or None; attention stays within one. Not with `past`.
        window: positions that a position sees, itself included, or None.
        device: of the masks that are made.
    """

    queries: int
    past: int
    documents: Tensor | None
    window: int | None
    device: torch.device

    def visible_keys(self, start: int, stop: int) -> tuple[int, int]:
        """Return the first and the end of the keys outside of which the queries [start, stop) see nothing.

        Args:
            start: first query.
            stop: the query behind the last one.
        """
        first = 0 if self.window is None else max(0, self.past + start - self.window + 1)
        return first, self.past + stop

    def part(self, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor | None:
        """Make the mask of the queries [start, stop) over the keys [first, end).

        Args:
            queries: `(start, stop)` of the queries.
            keys: `(first, end)` of the keys.

        Returns:
            bool [B or 1, 1, stop - start, end - first], True where attention may look; None where plain causal
            attention (or, for one query, attention to everything) says the same.
        """
        (start, stop), (first, end) = queries, keys
        plain = end == self.past + stop and stop - start in (1, end - first)
        if self.documents is None and plain and (self.window is None or end - first <= self.window):
            return None
        keys_at = torch.arange(first, end, device=self.device)
        queries_at = torch.arange(self.past + start, self.past + stop, device=self.device).unsqueeze(-1)
        mask = keys_at <= queries_at
        if self.window is not None:
            mask = mask & (keys_at > queries_at - self.window)
        mask = mask[None, None]
        if self.documents is not None:
            mask = mask & (self.documents[:, None, start:stop, None] == self.documents[:, None, None, first:end])
        return mask

    def of_rows(self, at: Tensor, keys: int) -> Tensor:
        """Make the mask of queries whose positions differ from row to row; keys are at theirs, from 0 on.

        Args:
            at: [B, T], positions of the queries.
            keys: S.

        Returns:
            bool [B, 1, T, S].
        """
        keys_at, queries_at = torch.arange(keys, device=at.device), at[:, None, :, None]
        mask = keys_at <= queries_at
        return mask if self.window is None else mask & (keys_at > queries_at - self.window)

    def whole(self) -> Tensor | None:
        """Make the mask of all queries over all keys, as `part`."""
        return self.part((0, self.queries), (0, self.past + self.queries))


def attention_mask(
    *,
    queries: int,
    past: int,
    documents: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Make the whole mask of one forward pass, shared by all layers; see `CausalMask`.

    Args:
        queries: T, number of new positions.
        past: number of cached positions.
        documents: [B, T], number of the document of each position; None: one document.
        window: positions that a query sees at most; None: all.
        device: of the mask.

    Returns:
        bool [B or 1, 1, T, past + T], True where attention may look; None where plain causal attention
        (or, for one new position, attention to everything) says the same.
    """
    return CausalMask(queries=queries, past=past, documents=documents, window=window, device=device).whole()


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask of bools to what is added to the scores: 0 where attention may look, minus infinity elsewhere.

    Attention kernels want it so, and torch would make and keep one for every layer.

    Args:
        mask: bool.
        dtype: of the scores.
    """
    look, away = (torch.full((), value, dtype=dtype, device=mask.device) for value in (0.0, float("-inf")))
    return torch.where(mask, look, away)
