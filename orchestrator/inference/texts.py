"""The texts of tokens that are drawn, piece by piece, and where they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from orchestrator.data.tokenize import Tokenizer
from orchestrator.inference.decoding import ROWS, Decoding, TextRequest
from orchestrator.inference.passes import Passes
from orchestrator.inference.place import Place

Stopped = Literal["end", "stop", "tokens"]


class WrittenText:
    """The text that follows on a prompt, token by token.

    Args:
        tokenizer: of the model.
        request: whose text it is.
        alone: it is read without its prompt and without special tokens, as transformers decodes a text.

    Attributes:
        ids: the tokens that were drawn so far.
        stopped: by what it ended: the model's own end of text, a stop text, or the number of tokens.
        complete: a stop text was found: nothing more belongs to it.
    """

    def __init__(self, tokenizer: Tokenizer, request: TextRequest, alone: bool = False):
        self._tokenizer, self._count = tokenizer, request.count
        self._before = [] if alone else list(request.prompt)
        self._left_out = frozenset(tokenizer.special_ids if alone else ())
        self._stop = [text for text in request.stop if text]
        self._pending: list[int] = []
        self._held = ""
        self._pieces: list[str] = []
        self.ids: list[int] = []
        self.stopped: Stopped = "tokens"
        self.complete = False

    def __str__(self) -> str:
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Add a token. Returns what is certain of the text now, and was not before.

        Args:
            token: its id.
        """
        if self.complete:
            return ""
        self.ids.append(token)
        if token in self._left_out:
            return ""
        self._pending.append(token)
        text = self._tokenizer.decode_after(self._before, self._pending)
        # A character may take several tokens: hold back what is not whole yet.
        if text.endswith("\ufffd"):
            return ""
        self._before, self._pending = self._before + self._pending, []
        return self._certain(text)

    def finish(self) -> str:
        """End the text. Returns the rest of it."""
        if self.complete:
            return ""
        self.stopped = "tokens" if len(self.ids) == self._count else "end"
        piece = self._certain(self._tokenizer.decode_after(self._before, self._pending))
        if not self.complete:
            self._pieces.append(self._held)
            piece += self._held
        return piece

    def _certain(self, text: str) -> str:
        """Return what of the text held back, and of `text` behind it, belongs to no stop text."""
        self._held += text
        piece = self._held
        for stop in self._stop:  # one after the other, as lm-eval cuts: of those that overlap the order decides
            piece = piece.partition(stop)[0]
        if piece != self._held:
            self.stopped, self.complete = "stop", True
        else:
            safe = len(self._held) - self._may_begin_a_stop(self._held)
            piece, self._held = self._held[:safe], self._held[safe:]
        self._pieces.append(piece)
        return piece

    def _may_begin_a_stop(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0


class Writing:
    """Texts that are being written: iterate over `(number of the request, piece)`; "" is the last piece of each.

    Args:
        place: of the model. All processes of a layout iterate together, and each has all texts.
        tokenizer: of the model.
        requests: what to write.
        rows: texts of each process that are written at one time.
        passes: as for `Decoding`.
        alone: as for `WrittenText`.

    Attributes:
        texts: of each request.
        decoding: what draws the tokens.
    """

    def __init__(
        self,
        place: Place,
        tokenizer: Tokenizer,
        requests: Sequence[TextRequest],
        rows: int = ROWS,
        passes: Passes | None = None,
        alone: bool = False,
    ):
        self.texts = [WrittenText(tokenizer, request, alone) for request in requests]
        self.decoding = Decoding(place, requests, rows, passes=passes)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for index, token in self.decoding:
            text = self.texts[index]
            piece = text.finish() if token is None else text.push(token)
            if text.complete:
                self.decoding.end(index)
            if piece:
                yield index, piece
            if token is None:
                yield index, ""
