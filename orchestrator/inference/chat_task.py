"""A conversation on the terminal with a model, by its own chat template: what the verb `chat` has done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from orchestrator.data.chat_template import ChatTemplate
from orchestrator.errors import DataError
from orchestrator.inference.generate_task import notes
from orchestrator.inference.generator import Writer
from orchestrator.inference.passes import Passes
from orchestrator.inference.place import LayoutPlace
from orchestrator.inference.sampling import Sampling
from orchestrator.strategies.relay import Relay
from orchestrator.strategies.served_model import ServedModel

COMMANDS = {
    "/reset": "forget the conversation; the system message stays",
    "/system": "/system TEXT sets the system message, and begins anew",
    "/retry": "answer the last message again, with the next seed",
    "/exit": "end, as the end of the input does",
    "/help": "this list",
}
_CONTINUED = "\\"
Answer = Callable[[Sequence[int], int], Iterator[str]]
"""Prompt and seed -> pieces of the answer."""


@dataclass(frozen=True)
class ChatJob:
    """How a conversation is held; JSON carries it.

    Attributes:
        system: the system message; None: the template's own, if it has one.
        tokens: of each answer at most.
        sampling: arguments of `Sampling`.
        stop: texts at which an answer ends.
        seed: of the first answer; each has the next one.
        template: a chat template to use; None: the model's own.
        json: an object for each answer.
    """

    system: str | None
    tokens: int
    sampling: Mapping[str, Any]
    stop: Sequence[str]
    seed: int
    template: str | None = None
    json: bool = False


def chat(served: ServedModel, arguments: Mapping[str, Any]) -> None:
    """Hold a conversation with a model that is placed: a task of `launch.model_job`, which all ranks call together.

    Args:
        served: the model.
        arguments: of a `ChatJob`; those of rank 0 count.
    """
    writer = Writer(served.checkpoint, LayoutPlace(served.model, served.parallel))
    job = ChatJob(**served.parallel.broadcast(dict(arguments)))
    answering = Answering(writer, job)

    def answer(given: Sequence[Any]) -> None:
        for _ in answering(*given):
            pass

    relay = Relay(served.parallel, {"answer": answer})

    def answers(ids: Sequence[int], seed: int) -> Iterator[str]:
        relay.tell("answer", [list(ids), seed])
        return answering(ids, seed)

    relay.lead(lambda: ChatSession(answering, answers).hold(sys.stdin, sys.stdout))


class Answering:
    """Writes answers, each behind what the one before it has left in the cache.

    Args:
        writer: of the model.
        job: how.

    Raises:
        DataError: the model has no chat template, or it is no valid one.
    """

    def __init__(self, writer: Writer, job: ChatJob):
        self.writer, self.job = writer, job
        self.template = ChatTemplate(writer.tokenizer, job.template)
        self.stop_ids = writer.stop_ids | end_of_turn(self.template)
        self._passes: Passes | None = None
        self.facts: dict[str, Any] = {}

    def __call__(self, ids: Sequence[int], seed: int) -> Iterator[str]:
        """Yield the pieces of an answer. All processes of a layout do so together.

        Args:
            ids: the conversation so far.
            seed: of the draws.
        """
        request = self.writer.request(ids, self.job.tokens, Sampling(**self.job.sampling), seed, self.job.stop)
        request = replace(request, stop_ids=self.stop_ids)
        writing = self.writer.write([request], 1, self._passes)
        # In one shape for all lengths there is nothing to go on from.
        self._passes = None if self.writer.place.static else writing.decoding.passes
        yield from (piece for _, piece in writing if piece)
        text = writing.texts[0]
        self.facts = {"tokens": len(text.ids), "stopped": text.stopped, "seed": seed}


def end_of_turn(template: ChatTemplate) -> frozenset[int]:
    """Return the special token with which a template ends what the assistant says, if it does.

    A model that was fine-tuned by it ends its answers so, whatever its files call the end of a text.

    Args:
        template: of the model.
    """
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids, mask = template.encode(exchange)
    except DataError:
        return frozenset()
    said = ids[mask].tolist()
    return frozenset(said[-1:]) & frozenset(template.tokenizer.special_ids)


@dataclass
class ChatSession:
    """Messages and answers, as somebody types them or a file has them.

    Args:
        answering: has the template and the settings.
        answers: writes an answer.
    """

    answering: Answering
    answers: Answer
    messages: list[dict[str, str]] = field(default_factory=list)
    answered: int = 0

    def hold(self, source: TextIO, out: TextIO) -> None:
        """Answer each line of `source` until it ends.

        Args:
            source: a message on each line; one that ends with a backslash goes on.
            out: gets the answers.
        """
        typed = source.isatty()
        for note in notes(self.answering.writer.place):
            print(note, file=sys.stderr)
        self._reset(self.answering.job.system)
        if typed:
            print(f"{', '.join(COMMANDS)}; a line that ends with \\ goes on", file=sys.stderr)
        while (text := self._read(source, typed)) is not None:
            word, _, rest = text.partition(" ")
            if word == "/exit":
                return
            if word in COMMANDS:
                self._obey(word, rest.strip(), out)
            elif word.startswith("/") and word[1:].isalpha():
                print(f"there is no command {word}: {', '.join(COMMANDS)}", file=sys.stderr)
            elif text.strip():
                self._say(text, out)

    def _read(self, source: TextIO, typed: bool) -> str | None:
        lines: list[str] = []
        while True:
            if typed:
                print("... " if lines else "> ", end="", file=sys.stderr, flush=True)
            line = source.readline()
            if not line:
                return "\n".join(lines) if lines else None
            line = line.rstrip("\r\n")
            if not line.endswith(_CONTINUED):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _reset(self, system: str | None) -> None:
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def _obey(self, word: str, rest: str, out: TextIO) -> None:
        if word == "/help":
            print("\n".join(f"{name:<9}{what}" for name, what in COMMANDS.items()), file=sys.stderr)
        elif word == "/retry" and self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
            self._say(self.messages.pop()["content"], out)
        elif word == "/retry":
            print("there is no answer yet", file=sys.stderr)
        else:
            kept = self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None
            self._reset(rest if word == "/system" else kept)

    def _say(self, text: str, out: TextIO) -> None:
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._prompt()
        except DataError as error:
            self.messages.pop()
            print(f"error: {error}", file=sys.stderr)
            return
        said, job = "", self.answering.job
        for piece in self.answers(ids, job.seed + self.answered):
            said += piece
            if not job.json:
                print(piece, end="", file=out, flush=True)
        self.answered += 1
        self.messages.append({"role": "assistant", "content": said})
        if job.json:
            found = {"role": "assistant", "content": said, **self.answering.facts}
            print(json.dumps(found, ensure_ascii=False), file=out, flush=True)
        else:
            print(file=out, flush=True)

    def _prompt(self) -> list[int]:
        """Return the tokens of the conversation, without its oldest turns where they leave no room for an answer."""
        window = self.answering.writer.place.model.config.max_seq_len
        room = window - min(self.answering.job.tokens, window // 4)
        ids = self.answering.template.prompt_ids(self.messages)
        while len(ids) > room:
            first = int(self.messages[0]["role"] == "system")
            if len(self.messages) < first + 3:
                raise DataError(
                    "the message is too long for this model",
                    got=f"{len(ids)} tokens",
                    allowed=f"{room}, beside an answer within the {window} that it sees",
                    fix="shorten it, or /reset",
                )
            print("note: the conversation is too long for the model; its oldest turn is left out", file=sys.stderr)
            del self.messages[first : first + 2]
            ids = self.answering.template.prompt_ids(self.messages)
        return ids
