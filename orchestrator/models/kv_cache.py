"""The cache of keys and values of earlier positions for text generation.

Each row of a batch is a text of its own length. A position of a row lies in the slot of its number, so that a mask
follows from positions alone, and padding behind a row's end is overwritten by what comes there later and seen by
nobody. `KVCache` grows by pages with the longest of its rows; `StaticKVCache` has one shape for a compiler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.models.expert_dispatch import unchanged
from orchestrator.models.mask import CausalMask, additive

PAGE = 128
"""Positions by which a growing cache grows."""


class Pass(ABC):
    """Where the positions of one forward pass go, and what they see.

    Attributes:
        past: positions before those of the pass, the same for all rows; of rows that differ 0.
        slots: [B, T], the slot of each position, where rows differ; None: plain causality behind `past`.
    """

    past: int = 0
    slots: Tensor | None = None

    @abstractmethod
    def store(self, buffer: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys or values into a layer's buffer.

        Args:
            buffer: [rows, heads, capacity, width].
            new: [B, heads, T, width].

        Returns:
            The buffer, and what the positions of this pass may see of it, [B, heads, S, width].
        """

    def mask(self, seen: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Make the mask of rows that differ, [B, 1, T, S], to be added to the scores; None where they do not.

        Args:
            seen: S.
            window: positions that a position sees, itself included, or None.
            dtype: of the scores.
        """
        if self.slots is None:
            return None
        rule = CausalMask(queries=self.slots.shape[1], past=0, documents=None, window=window, device=self.slots.device)
        return additive(rule.of_rows(self.slots, seen), dtype)


@dataclass
class Fill(Pass):
    """Texts that begin: some rows from their first slot on.

    Attributes:
        rows: their numbers; None: all.
    """

    rows: Tensor | None

    def store(self, buffer: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write the first slots; they see each other alone."""
        if self.rows is None:
            buffer[:, :, : new.shape[2]] = new
        else:
            buffer[self.rows, :, : new.shape[2]] = new
        return buffer, new


@dataclass
class Append(Pass):
    """All rows go on behind equally many positions."""

    past: int

    def store(self, buffer: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write behind them, and see all."""
        stop = self.past + new.shape[2]
        buffer[:, :, self.past : stop] = new
        return buffer, buffer[:, :, :stop]


@dataclass(kw_only=True)
class Scatter(Pass):
    """All rows go on, each behind its own length.

    Attributes:
        slots: [B, T].
        stop: slot behind the last one.
    """

    slots: Tensor
    stop: int

    def store(self, buffer: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write each row behind its end, and see what any row has."""
        rows = torch.arange(buffer.shape[0], device=buffer.device).unsqueeze(1)
        buffer.transpose(1, 2)[rows, self.slots] = new.transpose(1, 2)
        return buffer, buffer[:, :, : self.stop]


@dataclass
class StaticFill(Pass):
    """As `Fill`, in one shape: a pass over all rows, of which some are kept.

    Attributes:
        begun: [B, 1, 1, 1] bool, the rows that begin.
    """

    begun: Tensor

    def store(self, buffer: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Select the rows that begin."""
        whole = torch.cat((new.to(buffer.dtype), buffer[:, :, new.shape[2] :]), 2)
        return torch.where(self.begun, whole, buffer), new


@dataclass(kw_only=True)
class StaticStep(Pass):
    """As `Scatter`, in one shape, for one position of each row.

    Attributes:
        slots: [B, 1].
    """

    slots: Tensor

    def store(self, buffer: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Select the slot of each row: a partitioner divides this like the buffer, and a scatter it gathers."""
        slots = torch.arange(buffer.shape[2], device=buffer.device).view(1, 1, -1, 1)
        buffer = torch.where(slots == self.slots.view(-1, 1, 1, 1), new.to(buffer.dtype), buffer)
        return buffer, buffer


class LayerCache:
    """One layer's keys and values.

    Args:
        cache: of all layers.
        buffers: of keys and of values; (): allocated when the first come, which say how wide they are.
    """

    def __init__(self, cache: KVCache, buffers: Sequence[Tensor] = ()):
        self._cache = cache
        self.buffers = list(buffers)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the positions of a pass.

        Args:
            k: [B, heads, T, width].
            v: likewise, of a width of its own.

        Returns:
            The keys and values that they see, [B, heads, S, width].
        """
        cache, new = self._cache, (self._cache.part(k), self._cache.part(v))
        if not self.buffers:
            self.buffers = [part.new_zeros(cache.rows, part.shape[1], 0, part.shape[3]) for part in new]
        stored = [
            cache.current.store(cache.reserve(buffer), part) for buffer, part in zip(self.buffers, new, strict=True)
        ]
        self.buffers = [cache.place(buffer) for buffer, _ in stored]
        return stored[0][1], stored[1][1]


class KVCache:
    """The caches of all layers, of rows that grow.

    A pass begins with `fill` or `step`; then the model is called with the cache.

    Args:
        layers: of the model.
        rows: texts.
        page: positions by which it grows.
        part: what a rank keeps of keys, values or latents; a strategy gives it.

    Attributes:
        lengths: positions of each row.
        current: the pass.
    """

    def __init__(self, layers: int, rows: int, *, page: int = PAGE, part: Callable[[Tensor], Tensor] = unchanged):
        self.rows, self.page, self.part = rows, page, part
        self.lengths = [0] * rows
        self.layers = [LayerCache(self) for _ in range(layers)]
        self.current: Pass = Append(0)
        self._stop = 0

    def fill(self, rows: Sequence[int], lengths: Sequence[int], padded: int) -> None:
        """Let texts begin in some rows, whatever was there.

        Args:
            rows: their numbers.
            lengths: positions of each.
            padded: T of the pass.
        """
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        whole = list(rows) == list(range(self.rows))
        self.current, self._stop = Fill(None if whole else torch.tensor(rows)), padded

    def step(self, counts: Sequence[int], padded: int) -> list[int]:
        """Let rows go on.

        Args:
            counts: new positions of each row; 0: the row has ended, and what is written there is nothing's.
            padded: T of the pass.

        Returns:
            The position at which each row goes on.
        """
        alive = {length for length, count in zip(self.lengths, counts, strict=True) if count}
        if len(alive) == 1:
            starts = [*alive] * self.rows
            self.current = Append(starts[0])
        else:
            starts = list(self.lengths)
            slots = torch.tensor(starts).unsqueeze(1) + torch.arange(padded)
            self.current = Scatter(slots=slots, stop=max(starts) + padded)
        self._stop = max(starts) + padded
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return starts

    def send(self, send: Callable[[Tensor], Tensor]) -> None:
        """Bring the numbers of the pass to the device of the model: data of its program, and no constants of it.

        Args:
            send: brings a tensor there whose first dim is that of the rows.
        """
        current = self.current
        if isinstance(current, Fill) and current.rows is not None:
            current.rows = send(current.rows)
        elif isinstance(current, (Scatter, StaticStep)):
            current.slots = send(current.slots)
        elif isinstance(current, StaticFill):
            current.begun = send(current.begun)

    @property
    def past(self) -> int:
        """Positions before those of the pass, the same for all rows."""
        return self.current.past

    def mask(self, queries: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Make the mask of the pass where rows differ; None: plain causality behind `past`.

        Args:
            queries: T of the pass.
            window: positions that a position sees, itself included, or None.
            dtype: of the scores.
        """
        return self.current.mask(self._stop, window, dtype)

    def reserve(self, buffer: Tensor) -> Tensor:
        """Return a buffer with room for the pass: by whole pages more, where there is none.

        Args:
            buffer: [rows, heads, capacity, width].
        """
        if buffer.shape[2] >= self._stop:
            return buffer
        more = -(-self._stop // self.page) * self.page - buffer.shape[2]
        return torch.cat((buffer, buffer.new_zeros(*buffer.shape[:2], more, buffer.shape[3])), 2)

    def place(self, buffer: Tensor) -> Tensor:
        """Return a layer's buffer as it is kept.

        Args:
            buffer: [rows, heads, capacity, width].
        """
        return buffer

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some rows alone, in this order; their memory is all that stays.

        Args:
            rows: their numbers.
        """
        self.rows, self.lengths = len(rows), [self.lengths[row] for row in rows]
        pages = -(-max(self.lengths, default=0) // self.page) * self.page
        for layer in self.layers:
            layer.buffers = [buffer[list(rows), :, :pages].contiguous() for buffer in layer.buffers]

    def cut(self, row: int, length: int) -> None:
        """Forget the positions of a row behind its first ones.

        Args:
            row: its number.
            length: positions that stay.
        """
        self.lengths[row] = min(self.lengths[row], length)

    @property
    def nbytes(self) -> int:
        """Memory of all layers in bytes."""
        return sum(buffer.nbytes for layer in self.layers for buffer in layer.buffers)


class StaticKVCache(KVCache):
    """The caches of all layers, in one shape whatever they hold: each kind of pass is one program.

    Args:
        kept: of each layer, its key heads, and the widths of a key and of a value: `ModelConfig.cached`.
        rows: texts.
        capacity: positions of a row.
        make: makes a buffer of zeros of a shape, divided over the devices.
        keep_placed: keeps a layer's new buffer divided so.
    """

    def __init__(
        self,
        kept: Sequence[tuple[int, int, int]],
        rows: int,
        capacity: int,
        make: Callable[[Sequence[int]], Tensor],
        keep_placed: Callable[[Tensor], Tensor] = unchanged,
    ):
        super().__init__(0, rows)
        self.layers = [
            LayerCache(self, [make((rows, heads, capacity, width)) for width in widths]) for heads, *widths in kept
        ]
        self._capacity, self._keep_placed = capacity, keep_placed

    def fill(self, rows: Sequence[int], lengths: Sequence[int], padded: int) -> None:
        """Let texts begin in some rows, in a pass over all of them."""
        super().fill(rows, lengths, padded)
        begun = torch.zeros(self.rows, dtype=torch.bool)
        begun[list(rows)] = True
        self.current = StaticFill(begun.view(-1, 1, 1, 1))

    def step(self, counts: Sequence[int], padded: int = 1) -> list[int]:
        """Let rows go on, each by one position or by none."""
        starts = [min(length, self._capacity - 1) for length in self.lengths]
        self.current = StaticStep(slots=torch.tensor(starts).unsqueeze(1))
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return starts

    def mask(self, queries: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Make the mask of a step; texts that begin see their own positions, by plain causality."""
        return self.current.mask(self._capacity, window, dtype)

    def place(self, buffer: Tensor) -> Tensor:
        """Return a layer's buffer as it is kept: divided over the devices."""
        return self._keep_placed(buffer)

    def reserve(self, buffer: Tensor) -> Tensor:
        """Return `buffer`, which has its whole capacity."""
        return buffer
