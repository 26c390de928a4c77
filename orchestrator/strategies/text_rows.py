"""What writing text needs of a strategy: passes over rows, each a text of its own length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from orchestrator.distributed.world import World
from orchestrator.sharding.layout import Layout


class TextRows:
    """Of a strategy whose processes each have some of the rows, whole or with others of their group.

    Attributes:
        static_shapes: each shape is a program of its own that is compiled first.
    """

    static_shapes = False
    layout: Layout
    world: World

    @property
    @abstractmethod
    def root_device(self) -> torch.device:
        """The device of this process."""

    @abstractmethod
    def forward_context(self) -> AbstractContextManager[Any]:
        """Wrap every forward pass."""

    @abstractmethod
    def uncompiled(self) -> AbstractContextManager[Any]:
        """Wrap a forward pass of another shape than the step's."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the tensors of all processes along a new first dim.

        Args:
            tensor: of this process, of one shape everywhere.
            group: of processes; None: all.
            sync_grads: differentiate through it.
        """

    def prepare_rows(self, array: Tensor) -> Tensor:
        """Bring an array [B, ...] that has no positions to the device; its rows may be divided, and nothing else.

        Args:
            array: of this process's rows.
        """
        return array.to(self.root_device)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Wrap a forward pass that writes text."""
        with torch.no_grad(), self.uncompiled(), self.forward_context():
            yield

    def read_rows(self, logits: Tensor) -> Tensor:
        """Return this process's logits [B, 1, V] on the host, in fp32.

        Args:
            logits: of a pass.
        """
        return logits.detach().float().cpu()

    def share_rows(self, tokens: Tensor) -> Tensor:
        """Return what each data-parallel group has, [groups, B]; all processes call it together.

        Args:
            tokens: [B] on the host, of this process's rows; equally many everywhere.
        """
        if self.world.size == 1:
            return tokens.unsqueeze(0)
        found = self.all_gather(tokens.to(self.root_device)).cpu()  # NCCL and its like gather on devices alone
        speakers = [0] * self.layout.data_parallel
        for rank in reversed(range(self.world.size)):
            speakers[self.layout.data_rank(rank)] = rank  # the first of those that have the same rows
        return found[speakers]

    def make_rows_cache(self, shape: Sequence[int]) -> Tensor:
        """Allocate zeros for keys or values of a layer, where shapes are static.

        Args:
            shape: rows, heads, positions, width.
        """
        return torch.zeros(tuple(shape), device=self.root_device)

    def keep_rows_cache(self, buffer: Tensor) -> Tensor:
        """Return a new buffer of keys or values, divided as `make_rows_cache` does it.

        Args:
            buffer: rows, heads, positions, width.
        """
        return buffer
