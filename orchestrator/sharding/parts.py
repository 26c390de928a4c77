"""The interface by which an optimizer sees split tensors: local parts, sums over them, and whole matrices.

An element-wise optimizer (AdamW, SGD) needs nothing of this: it works on local parts alone. Adafactor needs sums over
rows, columns and whole tensors; Muon needs whole matrices. Strategies implement `Parts`; optimizers call it and never
ask which strategy runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Reduced = tuple[int, ...]
"""Dims over which a state tensor holds one number instead of one per element: its global size there is 1."""


class Parts(Protocol):
    """The parts of the parameters that this process holds, and the computations over all parts."""

    def local(self, tensor: Tensor) -> Tensor:
        """Return this process's part of a parameter, gradient or state tensor, sharing its memory.

        Args:
            tensor: shaped as a parameter.
        """

    def zeros(self, parameter: Tensor, reduced: Reduced = ()) -> Tensor:
        """Allocate this process's part of a state tensor of the parameter's shape, with size 1 in `reduced` dims.

        Args:
            parameter: of the model.
            reduced: dims in which the tensor has size 1.
        """

    def numel(self, parameter: Tensor) -> int:
        """Return the number of elements of the whole parameter.

        Args:
            parameter: of the model.
        """

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Return the shape of the whole parameter.

        Args:
            parameter: of the model.
        """

    def start(self, parameter: Tensor) -> tuple[int, ...]:
        """Return where this process's part begins in the whole parameter, in each dim.

        Args:
            parameter: of the model.
        """

    def sum(self, values: Sequence[Tensor], parameters: Sequence[Tensor], dims: Reduced) -> list[Tensor]:
        """Add up sums that each process has taken over `dims` of its part.

        Args:
            values: a partial sum for each parameter.
            parameters: whose sums they are.
            dims: of the parameters, that were summed over.

        Returns:
            The sums over the whole parameters; the same bits on all processes that hold the same part.
        """

    def on_wholes(
        self, part_of: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], function: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Apply `function` to whole tensors of which each process has its part, a few at a time.

        Args:
            part_of: gives this process's part of a tensor that is split as the parameter; called when it is needed.
            parameters: one for each tensor, all with parts of one dtype.
            function: of a whole tensor; keeps shape and dtype. A process may be asked for some of them only. Of
                experts [E, ...] it is given one's, or several's, and takes each by itself.

        Yields:
            Each parameter and this process's part of its result, in any order.
        """


class WholeParts:
    """`Parts` where every tensor is global: of a single device, and of XLA's SPMD, whose compiler splits them."""

    def local(self, tensor: Tensor) -> Tensor:
        """Return the `tensor` itself, detached."""
        return tensor.detach()

    def zeros(self, parameter: Tensor, reduced: Reduced = ()) -> Tensor:
        """Return zeros of the shape of `parameter`, with size 1 in the `reduced` dims."""
        return parameter.detach().new_zeros([1 if dim in reduced else size for dim, size in enumerate(parameter.shape)])

    def numel(self, parameter: Tensor) -> int:
        """Return the number of elements of `parameter`."""
        return parameter.numel()

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Return the shape of `parameter`."""
        return tuple(parameter.shape)

    def start(self, parameter: Tensor) -> tuple[int, ...]:
        """Return zeros: the part is the whole `parameter`."""
        return (0,) * parameter.dim()

    def sum(self, values: Sequence[Tensor], parameters: Sequence[Tensor], dims: Reduced) -> list[Tensor]:
        """Return `values`: each is of the whole already, whatever the `parameters` and `dims`."""
        return list(values)

    def on_wholes(
        self, part_of: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], function: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each of the `parameters` with `function` of what `part_of` gives for it."""
        for parameter in parameters:
            yield parameter, function(part_of(parameter))


def heeds_flag(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's step leaves weights and state as they are where `found_inf`, its attribute, is 1.

    Args:
        optimizer: any; torch marks its fused ones.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def reduced_dims(optimizer: torch.optim.Optimizer) -> Mapping[str, Reduced]:
    """Return, for each key of an optimizer's state that is not shaped as its parameter, the dims of size 1.

    Args:
        optimizer: of the run.
    """
    found: Mapping[str, Reduced] = getattr(optimizer, "reduced_dims", {})
    return found


def blocks(optimizer: torch.optim.Optimizer) -> Mapping[str, int]:
    """Return, for each key of an optimizer's state that has a number per block, the elements of a block.

    Blocks lie along the last dim of a parameter, whose size they divide.

    Args:
        optimizer: of the run.
    """
    found: Mapping[str, int] = getattr(optimizer, "blocks", {})
    return found


def in_blocks(
    shape: tuple[int, ...], slices: tuple[slice, ...], block: int
) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """Return the shape of a tensor with a number per block, and the part of it that belongs to a part of the parameter.

    Args:
        shape: of the whole parameter.
        slices: the part of it, in whole blocks.
        block: elements of the last dim.
    """
    last = slices[-1]
    assert shape[-1] % block == last.start % block == last.stop % block == 0, f"{last} of {shape} in blocks of {block}"
    return (*shape[:-1], shape[-1] // block), (*slices[:-1], slice(last.start // block, last.stop // block))
