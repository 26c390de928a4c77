"""Chat templates: messages become the text, and the tokens, that a model was made for.

A template is a small program in Jinja that comes with a model, so from a stranger. It runs in Jinja's sandbox, in the
environment that transformers gives it, and sees plain data only; so both render the same text. Templates that mark what
the assistant says (`{% generation %}`) give the loss mask themselves; of others it is found by what each of the
assistant's messages adds to the conversation before it.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np

from orchestrator.data.model_files import TEMPLATES_FOLDER, TOKENIZER_CONFIG_FILE
from orchestrator.data.template_environment import (
    GENERATION_END,
    GENERATION_START,
    MARKS,
    SPELT_END,
    SPELT_START,
    compile_template,
)
from orchestrator.data.tokenize import Tokenizer
from orchestrator.data.tokenizer_files import NAMED_TOKENS, Beside, parse_json
from orchestrator.errors import DataError

TEMPLATE_FILE = "chat_template.jinja"
ASSISTANT = "assistant"
_DEFAULT, _WITH_TOOLS = "default", "tool_use"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # what a message's reasoning is called, the usual one first
_ANY_MARK = re.compile(f"[{MARKS}]")
Message = Mapping[str, Any]
Span = tuple[int, int]


def chat_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the chat templates of a model by name; the one without a name of its own is `default`.

    As in transformers, files of templates take the place of what stands in tokenizer_config.json.

    Args:
        files: that travel with the model, by flat name.

    Raises:
        DataError: a file is damaged.
    """
    found = {}
    for name, content in files.items():
        if name == TEMPLATE_FILE:
            found[_DEFAULT] = _decoded(content, name)
        elif name.startswith(f"{TEMPLATES_FOLDER}.") and name.endswith(".jinja"):
            found[name.removeprefix(f"{TEMPLATES_FOLDER}.").removesuffix(".jinja")] = _decoded(content, name)
    if found:
        return found
    given = parse_json(files.get(TOKENIZER_CONFIG_FILE, b"{}"), TOKENIZER_CONFIG_FILE).get("chat_template")
    if isinstance(given, str):
        return {_DEFAULT: given}
    listed = [entry for entry in given if isinstance(entry, dict)] if isinstance(given, list) else []
    pairs = [(entry.get("name"), entry.get("template")) for entry in listed]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


class ChatTemplate:
    """The chat templates of a model, with the tokenizer that makes tokens of what they render.

    Args:
        tokenizer: of the model, with the files that travel with it. What a message means that spells a special token is
            what its documents say: plain text unless `data.tokenizer.special_tokens_in_text` says otherwise.
        template: the text of another template to use; None: the model's own.
        now: the date for templates that write it.

    Raises:
        DataError: the model has no template, or it is no valid one.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, now: Callable[[], datetime] = datetime.now):
        self.tokenizer = tokenizer
        self.texts = {_DEFAULT: template} if template is not None else chat_templates(tokenizer.files)
        if not self.texts:
            raise DataError(
                "the model has no chat template, so nothing says how messages become text",
                got=f"files {', '.join(sorted(tokenizer.files))}",
                allowed=f"{TEMPLATE_FILE}, or chat_template in {TOKENIZER_CONFIG_FILE}, beside its tokenizer.json",
                fix="name one: simple (text alone), chatml, or a file in Jinja, as data.chat.template=... of a run, "
                "chat_template=... of data prepare, template=... of chat",
            )
        self._compiled = {name: compile_template(text, name, now) for name, text in self.texts.items()}
        beside = Beside(tokenizer.files)
        named = {key: beside.token(key) for key in NAMED_TOKENS}
        self._tokens = {"eos_token": tokenizer.eos_token} | {key: text for key, text in named.items() if text}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the templates: equal ones render the same."""
        return hashlib.sha256(json.dumps([self.texts, self._tokens], sort_keys=True).encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: each with a `role`, and what the template wants of it: `content`, `tool_calls` and others.
            add_generation_prompt: end with what begins a message of the assistant.
            tools: JSON schemas of the functions that the assistant may call.
            **more: other variables of the template, such as `enable_thinking`.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        return _ANY_MARK.sub("", self._render(messages, add_generation_prompt, tools, more))

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **more: Any
    ) -> list[int]:
        """Return the tokens of a conversation that the assistant is to continue.

        Args:
            messages: of the conversation so far.
            tools: as in `render`.
            **more: as in `render`.
        """
        text, plain, _ = self._prepared(messages, True, tools, more)
        ids: list[int] = self._encode(text, plain)[0].tolist()
        return ids

    def encode_text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, more: Mapping[str, Any]
    ) -> tuple[str, np.ndarray]:
        """Return the text of a conversation and its tokens, int64 of shape [tokens].

        Args:
            messages: as in `render`.
            tools: as in `render`.
            more: other variables of the template.
        """
        text, plain, _ = self._prepared(messages, False, tools, more)
        return text, self._encode(text, plain)[0]

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        last_turn_only: bool = False,
        first: int = 0,
        **more: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a conversation and which of them the assistant says: int64 and bool, of shape [tokens].

        Args:
            messages: as in `render`.
            add_generation_prompt: as in `render`.
            tools: as in `render`.
            last_turn_only: of the assistant's messages the last one alone.
            first: of the assistant's messages those from this number on.
            **more: as in `render`.

        Raises:
            DataError: the template refuses the conversation, or rewrites what it rendered of its beginning, so that the
                assistant's part cannot be told.
        """
        messages = [dict(message) for message in messages]
        text, plain, spans = self._prepared(messages, add_generation_prompt, tools, more)
        said = [number for number, message in enumerate(messages) if message.get("role") == ASSISTANT]
        wanted = [number for number in (said[-1:] if last_turn_only else said) if number >= first]
        if not self.marks_generation(tools):
            spans = self._turns(messages, wanted, text, tools, more)
        elif len(wanted) < len(said):
            low = self._length_of(messages[: wanted[0]], True, text, wanted[0], tools, more) if wanted else len(text)
            spans = [(start, stop) for start, stop in spans if stop > low]
        ids, starts, stops = self._encode(text, plain)
        mask = np.zeros(ids.size, dtype=bool)
        for start, stop in spans:
            inside = np.flatnonzero((starts < stop) & (stops > start) & (stops > starts))
            if inside.size:
                mask[inside[0] : inside[-1] + 1] = True
        return ids, mask

    def marks_generation(self, tools: Sequence[Mapping[str, Any]] | None = None) -> bool:
        """Return whether the template itself says what of its text the assistant's is.

        Args:
            tools: as in `render`.
        """
        return self._compiled[self._name(tools)].marks_generation

    # --- the text ------------------------------------------------------------------------------------------

    def _name(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        name = _WITH_TOOLS if tools is not None and _WITH_TOOLS in self.texts else _DEFAULT
        if name not in self.texts:
            raise DataError(
                "the model has several chat templates, and none is the default",
                got=", ".join(sorted(self.texts)),
                fix=f"name the file of one of them: data.chat.template=...; or add {TEMPLATE_FILE}",
            )
        return name

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        more: Mapping[str, Any],
    ) -> str:
        """Return the text, with marks around what the assistant says and around special tokens that messages spell."""
        chat = [_with_reasoning(self._marked(message)) for message in map(_without_nulls, messages)]
        variables = {**self._tokens, **self._marked(dict(more))}
        schemas = None if tools is None else [self._marked(tool) for tool in tools]
        return self._compiled[self._name(tools)].render(
            messages=chat, tools=schemas, documents=None, add_generation_prompt=add_generation_prompt, **variables
        )

    def _prepared(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        more: Mapping[str, Any],
    ) -> tuple[str, list[Span], list[Span]]:
        """Return the text without marks; where messages spell special tokens in it; and where the assistant speaks."""
        marked = self._render(messages, add_generation_prompt, tools, more)
        places = [found.start() for found in _ANY_MARK.finditer(marked)]
        text = _ANY_MARK.sub("", marked)
        plain = _between(marked, places, SPELT_START, SPELT_END)
        return text, plain, _between(marked, places, GENERATION_START, GENERATION_END)

    def _marked(self, value: Any) -> Any:
        """Plain data, with marks around special tokens that its texts spell and that are to be text."""
        if isinstance(value, str):
            text = _ANY_MARK.sub("", str.__str__(value))
            if self._spelling is None or not (found := self._spelling.search(text)):
                return text
            if self.tokenizer.documents.special_tokens_in_text == "error":
                raise DataError(
                    "a message spells a special token",
                    got=f"{found[0]} in {text[max(0, found.start() - 30) : found.end() + 30]!r}",
                    allowed="messages without special tokens, as data.tokenizer.special_tokens_in_text=error asks for",
                    fix="set it to text (it only spells it) or to token (the message means the token)",
                )
            return self._spelling.sub(lambda one: f"{SPELT_START}{one[0]}{SPELT_END}", text)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            return {str(key): self._marked(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._marked(item) for item in value]
        raise DataError(
            "a message holds something that is no text, number, list or object",
            got=type(value).__name__,
            allowed="plain data, as JSON has it",
        )

    @cached_property
    def _spelling(self) -> re.Pattern[str] | None:
        """What finds special tokens in messages; None where they mean the tokens."""
        tokens = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        if self.tokenizer.documents.special_tokens_in_text == "token" or not tokens:
            return None
        return re.compile("|".join(map(re.escape, tokens)))

    # --- what the assistant says ---------------------------------------------------------------------------

    def _turns(
        self,
        messages: Sequence[Message],
        numbers: Sequence[int],
        text: str,
        tools: Sequence[Mapping[str, Any]] | None,
        more: Mapping[str, Any],
    ) -> list[Span]:
        """Where these messages of the assistant are in the text, by what each adds to what comes before it."""
        spans = []
        for number in numbers:
            start = self._length_of(messages[:number], True, text, number, tools, more)
            stop = self._length_of(messages[: number + 1], False, text, number, tools, more)
            spans.append((start, self._without_trailing_space(text, start, stop)))
        return spans

    def _length_of(
        self,
        part: Sequence[Message],
        add_generation_prompt: bool,
        text: str,
        number: int,
        tools: Sequence[Mapping[str, Any]] | None,
        more: Mapping[str, Any],
    ) -> int:
        """How far into the text of a conversation its first messages reach."""
        try:
            beginning = self.render(part, add_generation_prompt, tools, **more)
            why = "the template writes the beginning of this conversation differently when more follows"
        except DataError as error:
            beginning, why = None, f"the template does not render its first {len(part)} messages: {error.got}"
        if beginning is not None and text.startswith(beginning):
            return len(beginning)
        raise DataError(
            f"what the assistant says in message {number + 1} cannot be told from the rest",
            got=why,
            allowed="a template that only adds to what it has written, or one with {% generation %} around what the"
            " assistant says",
            fix="give such a one: data.chat.template=FILE; or train on the last answer alone:"
            " data.chat.loss_on=last, with conversations that end with it",
        )

    def _without_trailing_space(self, text: str, start: int, stop: int) -> int:
        """Where a turn ends: white space behind the special token that ends it belongs to the next one."""
        bare = len(text[start:stop].rstrip()) + start
        return bare if any(text.endswith(token, start, bare) for token in self.tokenizer.special_tokens) else stop

    # --- the tokens ----------------------------------------------------------------------------------------

    def _encode(self, text: str, plain: Sequence[Span]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids, and where in the text each begins and ends. Special tokens within `plain` become plain pieces."""
        ids, starts, stops = self.tokenizer.encode_rendered(text)
        special = set(self.tokenizer.special_ids) if plain else set()
        for start, stop in reversed(plain):
            for at in np.flatnonzero((starts < stop) & (stops > start))[::-1].tolist():
                if int(ids[at]) in special:
                    pieces = self.tokenizer.encode_within(text[start:stop])
                    rows = ((ids, pieces), (starts, [start] * len(pieces)), (stops, [stop] * len(pieces)))
                    ids, starts, stops = (np.concatenate([old[:at], new, old[at + 1 :]]) for old, new in rows)
        return ids, starts, stops


def _between(marked: str, places: Sequence[int], start: str, stop: str) -> list[Span]:
    """Return the spans between pairs of marks, in the text without any; a mark without its other is none."""
    spans: list[Span] = []
    begun: int | None = None
    for at in places:
        if marked[at] == start:
            begun = at
        elif marked[at] == stop and begun is not None:
            first, last = (place - bisect_left(places, place) for place in (begun, at))
            spans.append((first, last))
            begun = None
    return spans


def _without_nulls(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose reasoning has every name that templates read it under."""
    found = next((message[key] for key in _REASONING if key in message), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("the chat template cannot be read", got=f"{name}: not UTF-8 at byte {error.start}") from None
