"""Compute the loss of a checkpoint's model on data, on one device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from orchestrator.constants import IGNORE_INDEX
from orchestrator.models.decoder import Decoder


@torch.no_grad()
def mean_loss(model: Decoder, batches: Iterable[Mapping[str, Any]], device: torch.device) -> tuple[float, int]:
    """Return the mean loss over the target tokens of `batches`, in nats, and how many of them there are.

    Args:
        model: in fp32, on `device`; it is set to inference.
        batches: of arrays [B, T], as a `TokenStream` gives them.
        device: where to compute.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    for batch in batches:
        placed = {name: torch.as_tensor(value).to(device) for name, value in batch.items()}
        total += model(**placed).double()
        count += int((placed["targets"] != IGNORE_INDEX).sum())
    return float(total) / max(1, count), count
