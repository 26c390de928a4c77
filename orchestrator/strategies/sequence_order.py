"""The order in which the ranks of a context group hold a sequence, and sums over its parts in that order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from orchestrator.sharding.layout import Layout

Range = tuple[int, int]  # first position and the one behind the last


@dataclass(frozen=True)
class SequenceOrder:
    """Which chunks of a sequence each rank of a context group holds.

    Attributes:
        ranks: c, of the group.
        chunks: of a rank. 1: rank i has the i-th of c chunks. 2: it has the i-th and the (2c - 1 - i)-th of 2c, so that
            every rank has as many keys before its queries, and causal attention the same work on each (Brandon et al.
            2023, "Striped Attention", and Llama 3's head-tail variant of it).
    """

    ranks: int
    chunks: int = 1

    @classmethod
    def of(cls, layout: Layout) -> SequenceOrder:
        """Return the order of a layout's context groups.

        Args:
            layout: degrees of the mesh axes.
        """
        return cls(layout.context, layout.sequence_chunks)

    def numbers(self, rank: int) -> list[int]:
        """List the chunks of `rank`, by their place in the sequence, in the order in which it holds them.

        Args:
            rank: in the group.
        """
        return [rank] if self.chunks == 1 else [rank, 2 * self.ranks - 1 - rank]

    def ranges(self, rank: int, length: int) -> list[Range]:
        """List the positions in the sequence that `rank` holds, chunk by chunk.

        Args:
            rank: in the group.
            length: positions that a rank holds.
        """
        size = length // self.chunks
        return [(number * size, (number + 1) * size) for number in self.numbers(rank)]

    def cut(self, whole: Tensor, rank: int, dim: int = 1) -> Tensor:
        """Return the part of `rank`.

        Args:
            whole: with the whole sequence along `dim`; `ranks` x `chunks` divides its length.
            rank: in the group.
            dim: of the sequence.
        """
        parts = whole.chunk(self.ranks * self.chunks, dim)
        return parts[rank] if self.chunks == 1 else torch.cat([parts[number] for number in self.numbers(rank)], dim)

    def restore(self, gathered: Tensor, dim: int = 1) -> Tensor:
        """Put the ranks' parts into the order of the sequence.

        Args:
            gathered: the parts of all ranks, the first rank's first, along `dim`.
            dim: of the sequence.
        """
        if self.chunks == 1:
            return gathered
        held = [number for rank in range(self.ranks) for number in self.numbers(rank)]
        parts = gathered.chunk(len(held), dim)
        return torch.cat([parts[held.index(number)] for number in range(len(held))], dim)


class SequenceParts:
    """Sums over the parts of the sequences that this rank shares with others, by position.

    With the chunks of a ring "before" is not the order of the ranks: what a rank has is told chunk by chunk. All ranks
    of the group call a method together, and gradients pass through it.

    Args:
        order: of the chunks.
        group: the ranks of the same sequences; None: this rank has them whole.
    """

    def __init__(self, order: SequenceOrder, group: dist.ProcessGroup | None):
        self.order, self._group = order, group
        self._rank = dist.get_rank(group) if group is not None else 0

    @property
    def chunks(self) -> int:
        """Chunks of consecutive positions that this rank has of each sequence."""
        return self.order.chunks

    def split(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's chunks of `tensor` along a new first dim, [chunks, ...].

        Args:
            tensor: with this rank's positions along `dim`, as `prepare_batch` cuts them.
            dim: of the sequence.
        """
        return torch.stack(tensor.chunk(self.chunks, dim))

    def join(self, parts: Tensor, dim: int = 1) -> Tensor:
        """Undo `split`.

        Args:
            parts: [chunks, ...].
            dim: of the sequence in the result.
        """
        return torch.cat(parts.unbind(), dim)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks that share the sequences; each of them gets it.

        Args:
            tensor: what this rank's positions give, such as tokens for each expert [B, experts].
        """
        return tensor if self._group is None else gather(tensor[None], self._group, 0).sum(0)

    def before(self, parts: Tensor) -> Tensor:
        """Return for each of this rank's chunks the sum over all chunks before it in the sequence, on any rank.

        Args:
            parts: [chunks, ...], what each of this rank's chunks gives: for example the sums of `split(x)` over its
                positions.

        Returns:
            as `parts`; zeros for the sequence's first chunk.
        """
        whole = parts if self._group is None else self.order.restore(gather(parts, self._group, 0), 0)
        earlier = whole.cumsum(0) - whole
        return earlier[self.order.numbers(self._rank)]


def gather(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Concatenate over the group along `dim`; backward sums the gradients over the group and keeps the rank's part.

    Args:
        tensor: of this rank.
        group: the ranks.
        dim: along which the ranks' tensors come, the first rank's first.
    """
    return funcol.wait_tensor(funcol.all_gather_single_autograd(tensor.contiguous(), dim, group))
