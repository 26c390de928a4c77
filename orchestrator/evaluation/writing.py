"""Text that a placed model writes, many prompts at a time: what a task asks to be generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.config.convert import from_dict
from orchestrator.data.model_files import GENERATION_FILE
from orchestrator.data.tokenize import Tokenizer
from orchestrator.data.tokenizer_files import parse_json, stop_ids
from orchestrator.inference.decoding import TextRequest
from orchestrator.inference.place import LayoutPlace
from orchestrator.inference.sampling import Sampling
from orchestrator.inference.texts import Writing
from orchestrator.models.protocol import ShardableModel
from orchestrator.strategies.parallel_strategy import ParallelStrategy


@dataclass(frozen=True)
class WritingRequest:
    """Prompts that are continued in the same way.

    Attributes:
        prompts: tokens of each, at least one.
        count: tokens to write at most.
        stop: texts at which to end; they are not part of what is returned.
        sampling: how tokens are drawn.
        seed: of the first prompt; each further one has the next.
    """

    prompts: tuple[tuple[int, ...], ...]
    count: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling(temperature=0.0)
    seed: int = 0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WritingRequest:
        """Return the request whose fields JSON has carried.

        Args:
            data: its fields.
        """
        return from_dict(cls, dict(data))


class TaskWriter:
    """Writes what tasks ask for. All processes of a job make one, and call it together with the same request.

    Args:
        model: placed.
        parallel: the strategy that has placed it.
        tokenizer: of the model.
        rows: texts of each process at one time.
        heard: called with the number of texts that have ended.
    """

    def __init__(
        self,
        model: ShardableModel,
        parallel: ParallelStrategy,
        tokenizer: Tokenizer,
        rows: int = 16,
        heard: Callable[[int], object] = lambda count: None,
    ):
        self._place, self._words = LayoutPlace(model, parallel), tokenizer
        self._rows, self._heard = rows, heard

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text: the end-of-text token, and those of the model's settings of generation."""
        settings = parse_json(self._words.files.get(GENERATION_FILE, b"{}"), GENERATION_FILE)
        return frozenset({self._words.eos_id, *stop_ids(settings)})

    def __call__(self, request: WritingRequest) -> list[str]:
        """Return what follows on each prompt, without special tokens, on every process alike.

        Args:
            request: the same on all of them.
        """
        asked = [
            TextRequest(prompt, request.count, request.sampling, request.seed + number, self.ends, request.stop)
            for number, prompt in enumerate(request.prompts)
        ]
        # Of all that the model has, as the exported model draws: what a vocabulary was padded with, too.
        writing = Writing(self._place, self._words, asked, self._rows, alone=True)
        for _, piece in writing:
            if not piece:
                self._heard(1)
        return [str(text) for text in writing.texts]
