"""Find NaN and infinity in the tensors of a checkpoint, which hashes do not reveal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.diff import CHUNK_ELEMENTS, boxes
from orchestrator.checkpoint.finite import count_nonfinite, finite_flags
from orchestrator.checkpoint.reader import Reader


@dataclass(frozen=True)
class NonFinite:
    """A tensor with elements that are not finite, and their number.

    Attributes:
        name: of the tensor.
        elements: of the whole tensor.
        nan: elements that are NaN.
        infinite: elements that are infinite.
    """

    name: str
    elements: int
    nan: int
    infinite: int

    def __str__(self) -> str:
        counts = ((self.nan, "NaN"), (self.infinite, "infinite"))
        return f"{self.name}: {', '.join(f'{n:,} {kind}' for n, kind in counts if n)} of {self.elements:,} elements"


def element_count(checkpoint: Checkpoint) -> int:
    """Return the number of elements that `nonfinite_tensors` has to look at.

    Args:
        checkpoint: the checkpoint to read.
    """
    return sum(math.prod(tensor.shape) for tensor in checkpoint.manifest.tensors.values())


def nonfinite_tensors(checkpoint: Checkpoint, progress: Callable[[int], object] = lambda done: None) -> list[NonFinite]:
    """List the tensors that hold NaN or infinity, reading a piece at a time.

    Args:
        checkpoint: the checkpoint to read.
        progress: told the number of elements that were looked at.

    Raises:
        CheckpointError: a file is damaged.
    """
    reader, found = Reader(checkpoint), []
    for name, tensor in checkpoint.manifest.tensors.items():
        nan = infinite = 0
        for box in boxes(tensor.shape, CHUNK_ELEMENTS):
            part = reader.tensor(name, box)
            if not finite_flags([part])[0]:
                counts = count_nonfinite(part)
                nan, infinite = nan + counts[0], infinite + counts[1]
            progress(part.numel())
        if nan or infinite:
            found.append(NonFinite(name, math.prod(tensor.shape), nan, infinite))
    return found
