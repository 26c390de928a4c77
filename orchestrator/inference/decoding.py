"""Many texts at a time: which rows of a batch have which text, and what comes next in each.

All processes of a layout run the same schedule: each knows the tokens of all texts, draws those of its own rows, and
hears the others'. A text's tokens depend on its own prompt, settings and seed, whatever is beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.distributed import standing
from orchestrator.errors import NonFiniteError
from orchestrator.inference.passes import CachedPasses, Passes, WholePasses, padded_length
from orchestrator.inference.place import Place
from orchestrator.inference.sampling import Sampling, choose_rows
from orchestrator.models.decoder import Decoder

_FAILED = -1  # in place of a token
ROWS = 16
"""Texts of a process that are written at one time, if nothing else is said."""


@dataclass(frozen=True)
class TextRequest:
    """A text to continue.

    Attributes:
        prompt: its tokens, at least one.
        count: tokens to draw at most.
        sampling: how each is drawn.
        seed: of its draws.
        stop_ids: the tokens that end it, and do not belong to it.
        stop: texts at which it ends, which a `Writing` looks for; they do not belong to it either.
    """

    prompt: Sequence[int]
    count: int
    sampling: Sampling = Sampling()
    seed: int = 0
    stop_ids: Collection[int] = ()
    stop: Sequence[str] = ()


@dataclass
class _Text:
    """A request on its way.

    Attributes:
        context: tokens that the model sees; the last one it has not seen yet.
        seen: all tokens, for the repetition penalty.
        group: of processes that has it.
        row: of the cache of that group.
        fresh: its context is to be read from the beginning.
    """

    request: TextRequest
    context: list[int]
    seen: list[int]
    generator: torch.Generator
    group: int = 0
    row: int = 0
    fresh: bool = True
    drawn: int = 0
    ended: bool = False


class Decoding:
    """Texts that are being written: iterate over `(number of the request, token)`, None for the token at its end.

    The model sees at most `max_seq_len` tokens. Once these are full it goes on with the last half of them, so one
    long pass is paid per half window and not per token. A longer prompt loses its beginning.

    Args:
        place: of the model; the mode of the model is left as it is.
        requests: what to write.
        rows: texts of each process that are written at one time.
        vocabulary: tokens that may be drawn, the first ones; None: all that the model has.
        passes: those of an earlier text, of which one that begins alike need not be read again; None: new ones.

    Attributes:
        passes: of this process.

    Raises:
        ValueError: an empty prompt.
    """

    def __init__(
        self,
        place: Place,
        requests: Sequence[TextRequest],
        rows: int = ROWS,
        vocabulary: int | None = None,
        passes: Passes | None = None,
    ):
        if any(not request.prompt for request in requests):
            raise ValueError("the prompt must have at least one token")
        self._place, self._vocabulary = place, vocabulary
        self._window = place.model.config.max_seq_len
        self._texts = [
            _Text(one, list(one.prompt[-self._window :]), list(one.prompt), torch.Generator().manual_seed(one.seed))
            for one in requests
        ]
        # Like lengths together, the longest first: what does not fit shows at once.
        self._waiting = sorted(range(len(requests)), key=lambda index: -len(self._texts[index].context))
        per_group = min(rows, -(-len(requests) // place.groups) or 1)
        per_group = -(-per_group // place.row_multiple) * place.row_multiple
        self._held: list[list[int | None]] = [[None] * per_group for _ in range(place.groups)]
        self.passes = passes or self._make_passes(per_group)

    def _make_passes(self, rows: int) -> Passes:
        longest = max((len(text.context) + text.request.count for text in self._texts), default=1)
        capacity = padded_length(min(longest, self._window), self._place)
        return (CachedPasses if self._place.cached else WholePasses)(self._place, rows, capacity)

    def end(self, index: int) -> None:
        """End a text, as something in it says; all processes do so together.

        Args:
            index: number of its request.
        """
        self._texts[index].ended = True

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        for index, text in enumerate(self._texts):
            if text.request.count < 1:
                text.ended = True
                yield index, None
        self._waiting = [index for index in self._waiting if not self._texts[index].ended]
        while self._admit():
            begun = [index for index in self._alive() if self._texts[index].fresh]
            for index, token in self._pass(begun or self._alive(), bool(begun)):
                text = self._texts[index]
                if token in text.request.stop_ids:
                    text.ended = True
                else:
                    yield index, token
                    self._append(text, token)
                if text.ended:
                    yield index, None

    def _append(self, text: _Text, token: int) -> None:
        text.seen.append(token)
        text.context.append(token)
        text.drawn += 1
        text.ended = text.ended or text.drawn == text.request.count
        if len(text.context) > self._window:
            text.context = text.context[-max(1, self._window // 2) :]
            text.fresh = True

    def _alive(self) -> list[int]:
        return [index for rows in self._held for index in rows if index is not None]

    def _admit(self) -> bool:
        """Free the rows of texts that have ended, and give them to those that wait; returns whether there are any."""
        for rows in self._held:
            for row, index in enumerate(rows):
                if index is not None and self._texts[index].ended:
                    rows[row] = None
        for row in range(len(self._held[0])):
            for group, rows in enumerate(self._held):
                if self._waiting and rows[row] is None:
                    rows[row] = index = self._waiting.pop(0)
                    self._texts[index].group, self._texts[index].row = group, row
        if not self._waiting:
            self._shrink()
        return bool(self._alive())

    def _shrink(self) -> None:
        """Give back the rows that nobody needs any more, where most do not."""
        longest = max(sum(index is not None for index in rows) for rows in self._held)
        if self._place.static or not longest or longest * 2 > len(self._held[0]):
            return
        for group, rows in enumerate(self._held):
            kept = [row for row, index in enumerate(rows) if index is not None]
            free = [row for row, index in enumerate(rows) if index is None]
            kept += free[: longest - len(kept)]
            if group == self._place.group:
                self.passes.keep(kept)
            self._held[group] = [rows[row] for row in kept]
            for row, index in enumerate(self._held[group]):
                if index is not None:
                    self._texts[index].row = row

    def _pass(self, indices: list[int], begins: bool) -> list[tuple[int, int]]:
        """Make one pass; returns the next token of each text that is in it."""
        standing.mark()
        mine = [self._texts[index] for index in indices if self._texts[index].group == self._place.group]
        training = self._place.model.training
        self._place.model.eval()
        try:
            if begins:
                logits = self.passes.fill({text.row: text.context for text in mine})
            else:
                logits = self.passes.step({text.row: text.context[-1] for text in mine})
        finally:
            self._place.model.train(training)
        chosen, problem = [0] * len(self._held[self._place.group]), None
        try:
            for text, token in zip(mine, self._choose(mine, logits), strict=True):
                chosen[text.row] = token
        except NonFiniteError as error:
            chosen, problem = [_FAILED] * len(chosen), error
        everyone = self._place.share(chosen)
        if any(_FAILED in tokens for tokens in everyone):
            raise problem or NonFiniteError("the model gives logits that are not finite", got="in another process")
        for index in indices:
            self._texts[index].fresh = False
        return [(index, everyone[self._texts[index].group][self._texts[index].row]) for index in sorted(indices)]

    def _choose(self, texts: list[_Text], logits: Tensor) -> list[int]:
        return choose_rows(
            logits[:, : self._vocabulary],
            [text.request.sampling for text in texts],
            [text.generator for text in texts],
            [text.seen for text in texts],
        )


def generate_tokens(
    model: Decoder, prompt: Sequence[int], count: int, sampling: Sampling, seed: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """Continue a prompt, one token at a time, with a model on one device.

    Args:
        model: on one device; its training mode is left as it is.
        prompt: token ids, at least one.
        count: tokens to draw at most.
        sampling: how each token is drawn.
        seed: of the draws.
        stop_ids: the tokens that end the text and are not yielded.

    Raises:
        ValueError: an empty prompt.
    """
    for _, token in Decoding(Place(model), [TextRequest(prompt, count, sampling, seed, stop_ids)]):
        if token is not None:
            yield token
