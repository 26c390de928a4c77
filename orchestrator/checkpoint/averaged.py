"""A checkpoint read with the average of its weights in place of them. No torch."""

from __future__ import annotations

import copy
from dataclasses import replace

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.errors import CheckpointError

AVERAGE = "ema"
"""Key of the optimizer's state that holds it."""
_PREFIX = f"optimizer.{AVERAGE}."


def has_average(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint keeps an average of its weights.

    Args:
        checkpoint: opened.
    """
    return any(name.startswith(_PREFIX) for name in checkpoint.manifest.tensors)


def averaged(checkpoint: Checkpoint) -> Checkpoint:
    """Return a view of a checkpoint whose weights are the averages, and whose averages the weights.

    Nothing is copied; files and hashes are those of the checkpoint. Weights that were not trained stay.

    Args:
        checkpoint: opened.

    Raises:
        CheckpointError: it keeps no average.
    """
    if not has_average(checkpoint):
        raise CheckpointError(
            "the checkpoint keeps no average of its weights",
            got=checkpoint.directory,
            allowed="one of a run with train.ema.decay",
            fix="leave out weights=ema",
        )
    tensors = dict(checkpoint.manifest.tensors)
    for name, tensor in checkpoint.manifest.tensors.items():
        if name.startswith(_PREFIX):
            weight = f"model.{name.removeprefix(_PREFIX)}"
            tensors[weight], tensors[name] = tensor, tensors[weight]
    view = copy.copy(checkpoint)
    view.manifest = replace(checkpoint.manifest, tensors=tensors)
    return view
