"""Compare two checkpoints tensor by tensor, with a bounded part of either in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.finite import finite_flags
from orchestrator.checkpoint.format import StoredTensor
from orchestrator.checkpoint.reader import Reader

CHUNK_ELEMENTS = 1 << 22
"""Elements of a tensor that are compared at a time: 32 MiB each in fp64."""
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Changed:
    """A tensor whose elements differ.

    Attributes:
        name: of the tensor.
        elements: of the whole tensor.
        differing: elements with other bits; where the dtypes differ, with other values.
        max_abs: largest absolute difference; NaN where only one of the two is a number.
        relative_l2: L2 norm of the difference over that of the first; None where that is 0.
    """

    name: str
    elements: int
    differing: int
    max_abs: float
    relative_l2: float | None


@dataclass(frozen=True)
class Mismatched:
    """A tensor of another shape or dtype, given as `F32 (4, 5)`.

    Attributes:
        name: of the tensor.
        first: dtype and shape in the first checkpoint.
        second: dtype and shape in the second.
    """

    name: str
    first: str
    second: str


@dataclass(frozen=True)
class TensorDifferences:
    """The differences of two checkpoints.

    Attributes:
        only_first: tensors that the second does not have.
        only_second: tensors that the first does not have.
        mismatched: tensors of another shape or dtype.
        changed: tensors of the same shape whose elements differ.
        compared: tensors that both have in the same shape.
        same: those of them that are bitwise equal.
        nonfinite_first: those of them that hold NaN or infinity in the first checkpoint.
        nonfinite_second: those that do in the second.
    """

    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    mismatched: tuple[Mismatched, ...]
    changed: tuple[Changed, ...]
    compared: int
    same: int
    nonfinite_first: tuple[str, ...] = ()
    nonfinite_second: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors, bit for bit."""
        return not (self.only_first or self.only_second or self.mismatched or self.changed)


def common_elements(first: Checkpoint, second: Checkpoint, prefix: str = "") -> int:
    """Return the number of elements that `compare` has to look at.

    Args:
        first: one checkpoint.
        second: the other one.
        prefix: of the tensors that are looked at.
    """
    return sum(math.prod(first.manifest.tensors[name].shape) for name in _comparable(first, second, prefix))


def compare(
    first: Checkpoint, second: Checkpoint, prefix: str = "", progress: Callable[[int], object] = lambda done: None
) -> TensorDifferences:
    """Compare two checkpoints, whatever layouts wrote them.

    Args:
        first: one checkpoint.
        second: the other one.
        prefix: of the tensors that are looked at, such as `model.`.
        progress: told the number of elements that were compared.

    Raises:
        CheckpointError: a file of one of them is damaged.
    """
    names = [{name for name in one.manifest.tensors if name.startswith(prefix)} for one in (first, second)]
    ours, theirs = first.manifest.tensors, second.manifest.tensors
    mismatched = [
        Mismatched(name, _describe(ours[name]), _describe(theirs[name]))
        for name in sorted(names[0] & names[1])
        if (ours[name].shape, ours[name].dtype) != (theirs[name].shape, theirs[name].dtype)
    ]
    comparable = _comparable(first, second, prefix)
    readers = Reader(first), Reader(second)
    bad: tuple[list[str], list[str]] = ([], [])
    found = [_compare_tensor(readers, name, ours[name].shape, progress, bad) for name in comparable]
    return TensorDifferences(
        tuple(sorted(names[0] - names[1])),
        tuple(sorted(names[1] - names[0])),
        tuple(mismatched),
        tuple(one for one in found if one is not None),
        len(comparable),
        sum(
            one is None and ours[name].dtype == theirs[name].dtype for name, one in zip(comparable, found, strict=True)
        ),
        tuple(dict.fromkeys(bad[0])),
        tuple(dict.fromkeys(bad[1])),
    )


def _comparable(first: Checkpoint, second: Checkpoint, prefix: str) -> list[str]:
    ours, theirs = first.manifest.tensors, second.manifest.tensors
    return [
        name for name in ours if name.startswith(prefix) and name in theirs and ours[name].shape == theirs[name].shape
    ]


def _compare_tensor(
    readers: tuple[Reader, Reader],
    name: str,
    shape: tuple[int, ...],
    progress: Callable[[int], object],
    bad: tuple[list[str], list[str]],
) -> Changed | None:
    differing, max_abs, difference_squares, squares = 0, 0.0, 0.0, 0.0
    equal: list[Box] = []
    for box in boxes(shape, CHUNK_ELEMENTS):
        a, b = (reader.tensor(name, box) for reader in readers)
        for names, good in zip(bad, finite_flags([a, b]), strict=True):
            if not good:
                names.append(name)
        other = _other(a, b)
        if count := int(other.sum()):
            values = a.double()
            # Equal bits are no difference, those of infinities and NaNs included.
            distance = torch.where(other, (values - b.double()).abs(), 0.0)
            differing += count
            max_abs = _larger(max_abs, float(distance.max()))
            difference_squares += float(distance.square().sum())
            squares += float(values.square().sum())
        else:
            equal.append(box)
        progress(a.numel())
    if not differing:
        return None
    squares += sum(float(readers[0].tensor(name, box).double().square().sum()) for box in equal)
    relative = math.sqrt(difference_squares) / math.sqrt(squares) if squares else None
    return Changed(name, math.prod(shape), differing, max_abs, relative)


def _other(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where the elements differ."""
    if a.dtype != b.dtype:
        return a.double() != b.double()
    bits = (one.reshape(*one.shape, 1).view(torch.uint8) for one in (a, b))
    return torch.ne(*bits).any(-1)


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def boxes(shape: Sequence[int], limit: int) -> Iterator[Box]:
    """Yield boxes of at most `limit` elements that cover a tensor, each a stretch of its rows.

    Args:
        shape: of the tensor.
        limit: largest size in bytes, or elements of a box.
    """
    if math.prod(shape) <= limit:
        yield tuple(slice(0, size) for size in shape)
        return
    # The first dim whose rows are small enough is cut; those before it are taken one by one.
    cut = next(dim for dim in range(len(shape)) if math.prod(shape[dim + 1 :]) <= limit)
    rows = max(1, limit // math.prod(shape[cut + 1 :]))
    rest = tuple(slice(0, size) for size in shape[cut + 1 :])
    for index in itertools.product(*(range(size) for size in shape[:cut])):
        for start in range(0, shape[cut], rows):
            one = tuple(slice(at, at + 1) for at in index)
            yield (*one, slice(start, min(start + rows, shape[cut])), *rest)


def _describe(tensor: StoredTensor) -> str:
    return f"{tensor.dtype} {tensor.shape}"
