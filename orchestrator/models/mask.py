"""Which positions attend to which."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(
    *,
    queries: int,
    past: int,
    documents: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """The mask of one forward pass, shared by all layers.

    Args:
        queries: T, the number of new positions.
        past: number of positions before them that are in a cache.
        documents: [B, T] document of each token, or None; attention stays within one. Not with `past`.
        window: positions that a position sees, itself included, or None.

    Returns:
        bool [B or 1, 1, T, past + T], True where attention may look; None where plain causal attention
        (or, for one new position, attention to everything) says the same.
    """
    if documents is None and (past == 0 or queries == 1) and (window is None or past + queries <= window):
        return None
    keys_at = torch.arange(past + queries, device=device)
    queries_at = keys_at[past:].unsqueeze(-1)
    mask = keys_at <= queries_at
    if window is not None:
        mask = mask & (keys_at > queries_at - window)
    mask = mask[None, None]
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return mask
