"""Forward passes that write text: over whole texts that begin, and over one more token of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from orchestrator.inference.place import Place
from orchestrator.models.decoder import Decoder

_SHORTEST = 32  # of the lengths that static shapes have


def padded_length(length: int, place: Place) -> int:
    """Return the T of a pass over `length` positions: what the layout divides, or one of few static shapes.

    Args:
        length: positions.
        place: of the model.
    """
    if place.static:
        length = max(_SHORTEST, 1 << (length - 1).bit_length())
    return -(-length // place.split) * place.split


class Passes:
    """Passes of this process's rows.

    Args:
        place: of the model.
        rows: of this process.
        capacity: positions that a row can have.
    """

    def __init__(self, place: Place, rows: int, capacity: int):
        self.place, self.rows = place, rows
        self._learned = place.model.config.max_seq_len

    def fill(self, contexts: Mapping[int, Sequence[int]]) -> Tensor:
        """Let texts begin in rows.

        Args:
            contexts: tokens of each row that begins; none: the pass is made for the other processes.

        Returns:
            Logits behind each, [len(contexts), V], on the host, in the order of `contexts`.
        """
        raise NotImplementedError

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Let rows go on.

        Args:
            tokens: the next one of each row that has not ended.

        Returns:
            Logits behind them, [len(tokens), V], on the host, in the order of `tokens`.
        """
        raise NotImplementedError

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some rows alone, which are numbered anew.

        Args:
            rows: their numbers, in the new order.
        """
        self.rows = len(rows)

    def _positions(self, starts: Sequence[int], length: int) -> Tensor:
        """[rows, length]; those of padding may be beyond what a model has learned."""
        positions = torch.tensor(starts).unsqueeze(1) + torch.arange(length)
        return positions.clamp(max=self._learned - 1)

    def _nothing(self, length: int) -> None:
        """Make a pass for the other processes."""
        with self.place.around():
            zeros = torch.zeros(1, length, dtype=torch.int64)
            arrays = self.place.batch({"tokens": zeros, "positions": self._positions([0], length)})
            self.place.host(self.place.model(**arrays, at=self.place.rows(torch.zeros(1, dtype=torch.int64))))


class CachedPasses(Passes):
    """Passes that keep keys and values, and compute each position once.

    Args:
        place: of the model.
        rows: of this process.
        capacity: positions that a row can have.
    """

    def __init__(self, place: Place, rows: int, capacity: int):
        super().__init__(place, rows, capacity)
        self.cache = place.cache(rows, capacity)
        self._held: list[int] = []  # by a single row

    def fill(self, contexts: Mapping[int, Sequence[int]]) -> Tensor:
        """Let texts begin in rows."""
        if not contexts:
            self._nothing(self.place.split)
            return torch.empty(0, 0)
        if kept := self._kept(contexts):
            return self._go_on(contexts[0], kept)
        self._held = list(contexts.get(0, ()))
        rows = list(contexts)
        lengths = [len(context) for context in contexts.values()]
        padded = padded_length(max(lengths), self.place)
        self.cache.fill(rows, lengths, padded)
        passed = list(range(self.rows)) if self.place.static else rows
        tokens, at = torch.zeros(len(passed), padded, dtype=torch.int64), torch.zeros(len(passed), dtype=torch.int64)
        for row, context in contexts.items():
            number = passed.index(row)
            tokens[number, : len(context)] = torch.tensor(context)
            at[number] = len(context) - 1
        logits = self._run(tokens, self._positions([0], padded).expand(len(passed), -1), at)
        return logits[[passed.index(row) for row in rows]]

    def _kept(self, contexts: Mapping[int, Sequence[int]]) -> int:
        """How far the context of a single row is what the row has already; of several nothing is looked for."""
        if self.place.static or self.rows > 1:
            return 0
        # The last token is read in any case: its logits are wanted.
        pairs = list(zip(self._held, contexts[0][:-1], strict=False))
        return next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))

    def _go_on(self, context: Sequence[int], kept: int) -> Tensor:
        """Read what is new of the one row's context."""
        self.cache.cut(0, kept)
        self._held = list(context)
        new = context[kept:]
        padded = padded_length(len(new), self.place)
        starts = self.cache.step([len(new)], padded)
        tokens = torch.zeros(1, padded, dtype=torch.int64)
        tokens[0, : len(new)] = torch.tensor(new)
        return self._run(tokens, self._positions(starts, padded), torch.tensor([len(new) - 1]))

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Let rows go on, all in one pass."""
        length = self.place.split
        starts = self.cache.step([int(row in tokens) for row in range(self.rows)], length)
        array = torch.zeros(self.rows, length, dtype=torch.int64)
        for row, token in tokens.items():
            array[row, 0] = token
        self._held += tokens.values() if self.rows == 1 else ()
        logits = self._run(array, self._positions(starts, length), torch.zeros(self.rows, dtype=torch.int64))
        return logits if len(tokens) == self.rows else logits[list(tokens)]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some rows alone, which are numbered anew."""
        super().keep(rows)
        self.cache.keep(rows)
        self._held = []  # of more than one row nothing was noted

    def _run(self, tokens: Tensor, positions: Tensor, at: Tensor) -> Tensor:
        place = self.place
        with place.around():
            arrays = place.batch({"tokens": tokens, "positions": positions.contiguous()})
            self.cache.send(place.rows)
            return place.host(place.model(**arrays, cache=self.cache, at=place.rows(at)))[:, 0]


class WholePasses(Passes):
    """Passes over the whole of each text for every token: where keys and values cannot be kept.

    Args:
        place: of the model.
        rows: of this process.
        capacity: positions that a row can have.
    """

    def __init__(self, place: Place, rows: int, capacity: int):
        super().__init__(place, rows, capacity)
        self._texts: list[list[int]] = [[] for _ in range(rows)]

    def fill(self, contexts: Mapping[int, Sequence[int]]) -> Tensor:
        """Let texts begin in rows."""
        for row, context in contexts.items():
            self._texts[row] = list(context)
        return self._run(list(contexts))

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Let rows go on."""
        for row, token in tokens.items():
            self._texts[row].append(token)
        return self._run(list(tokens))

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some rows alone, which are numbered anew."""
        super().keep(rows)
        self._texts = [self._texts[row] for row in rows]

    def _run(self, rows: list[int]) -> Tensor:
        place = self.place
        length = padded_length(max((len(text) for text in self._texts), default=1) or 1, place)
        tokens = torch.zeros(self.rows, length, dtype=torch.int64)
        for row, text in enumerate(self._texts):
            tokens[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
        at = torch.tensor([max(0, len(text) - 1) for text in self._texts])
        wanted = {"at": place.rows(at)} if isinstance(place.model, Decoder) else {}
        with place.around():
            arrays = place.batch({"tokens": tokens, "positions": self._positions([0] * self.rows, length)})
            logits = place.model(**arrays, **wanted)
            logits = logits if wanted else logits[torch.arange(self.rows), at.to(logits.device)].unsqueeze(1)
            return place.host(logits)[rows, 0]
