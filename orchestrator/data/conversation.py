"""Conversations in rows of data: lists of messages, or columns of a prompt and its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import DataError

_LISTS = ("messages", "conversations", "conversation")
_ANSWERS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
)
_CONTEXTS = ("input", "context")  # of an instruction
_TOOLS, _SYSTEM = "tools", "system"
PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"  # of pairs of responses
_ROLES = {"human": "user", "gpt": "assistant"}  # as lists of `from` and `value` call them
ALLOWED = (
    "a list of messages (role and content, or from and value) in messages or conversations; or texts in prompt and"
    " completion, question and answer, or instruction (with input) and output"
)


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        messages: each with a role.
        tools: JSON schemas of the functions that the assistant may call; None where there are none.
        first: number of the first message that may count in the loss: what the prompt has said before does not.
        consumed: bytes of the input file that reading it took.
        place: where it was read, for messages.
        rejected: of a pair of responses: the messages with the rejected one, where `messages` has the chosen one.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    first: int = 0
    consumed: int = 0
    place: str = ""
    rejected: tuple[dict[str, Any], ...] = ()

    @property
    def size(self) -> int:
        """Characters of what is said, nearly."""
        return sum(len(str(message.get("content") or "")) for message in (*self.messages, *self.rejected))

    def texts(self) -> list[str]:
        """Return what is said, for a vocabulary to be trained on."""
        return [content for message in self.messages if isinstance(content := message.get("content"), str)]


def columns_of(names: Sequence[str], field: str | None, pairs: bool = False) -> tuple[str, ...]:
    """Return those columns of a table that make conversations; none where there are no such.

    Args:
        names: of its columns.
        field: the column of the messages, where the user named it.
        pairs: they are to make pairs of responses.
    """
    more = [name for name in (_TOOLS, _SYSTEM) if name in names]
    if pairs:
        optional = [name for name in (PROMPT, *more) if name in names]
        return (CHOSEN, REJECTED, *optional) if CHOSEN in names and REJECTED in names else ()
    if field is not None:
        return (field, *more) if field in names else ()
    for name in _LISTS:
        if name in names:
            return (name, *more)
    for prompt, answer in _ANSWERS:
        if prompt in names and answer in names:
            context = [name for name in _CONTEXTS if name in names][:1] if prompt == "instruction" else []
            return (prompt, answer, *context, *more)
    return ()


def conversation_of(row: Mapping[str, Any], field: str | None, place: object, consumed: int = 0) -> Conversation | None:
    """Return the conversation of a row; None where a column that it needs is null.

    Args:
        row: its columns.
        field: the column of the messages, where the user named it.
        place: of the row, for messages.
        consumed: bytes that reading it took.

    Raises:
        DataError: it is none.
    """
    columns = columns_of(tuple(row), field)
    if not columns:
        raise DataError(
            f"the row has no conversation: {place}",
            got=f"columns {', '.join(map(str, row)) or 'none'}",
            allowed=ALLOWED if field is None else f"a list of messages in '{field}'",
            fix="name the column of the messages: data.text_field=...; or skip such rows: data.on_null=skip",
        )
    listed = field is not None or columns[0] in _LISTS
    first = 0
    if listed:
        if row[columns[0]] is None:
            return None
        messages = _messages(row[columns[0]], columns[0], place)
    else:
        if row[columns[0]] is None or row[columns[1]] is None:
            return None
        prompt = messages_of(_with_context(row, columns), "user", columns[0], place)
        messages, first = [*prompt, *messages_of(row[columns[1]], "assistant", columns[1], place)], len(prompt)
    system = system_of(row)
    if system is not None and not (messages and messages[0].get("role") == "system"):
        messages, first = [system, *messages], first and first + 1
    return Conversation(tuple(messages), tools_of(row, place), first, consumed, str(place))


def system_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the message of the system that a row has in a column of its own; None where it has none.

    Args:
        row: its columns.
    """
    system = row.get(_SYSTEM)
    return {"role": "system", "content": system} if isinstance(system, str) and system else None


def _with_context(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    prompt = row[columns[0]]
    context = next((row[name] for name in columns[2:] if name in _CONTEXTS), None)
    return f"{prompt}\n\n{context}" if isinstance(prompt, str) and isinstance(context, str) and context else prompt


def messages_of(value: Any, role: str, column: str, place: object) -> list[dict[str, Any]]:
    """Return a text as one message, or a list of messages as it is.

    Args:
        value: of a column.
        role: whose message a text is.
        column: its name, for messages.
        place: of the row, for messages.

    Raises:
        DataError: it is neither.
    """
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, column, place)


def _messages(value: Any, column: str, place: object) -> list[dict[str, Any]]:
    value = _parsed(value, place, column) if isinstance(value, str) else value
    if not isinstance(value, Sequence) or not all(isinstance(message, Mapping) for message in value):
        raise DataError(f"'{column}' is no list of messages: {place}", got=type(value).__name__, allowed=ALLOWED)
    return [_message(message, column, place) for message in value]


def _message(message: Mapping[str, Any], column: str, place: object) -> dict[str, Any]:
    known = {str(key): value for key, value in message.items() if value is not None}
    if "role" not in known and isinstance(speaker := known.pop("from", None), str):
        known = {"role": _ROLES.get(speaker, speaker), "content": known.pop("value", ""), **known}
    if not isinstance(known.get("role"), str):
        raise DataError(
            f"a message in '{column}' has no role: {place}",
            got=", ".join(known) or "nothing",
            allowed="role and content (or from and value), and what the chat template knows beside",
        )
    return known


def tools_of(row: Mapping[str, Any], place: object) -> tuple[dict[str, Any], ...] | None:
    """Return the functions that the assistant of a row may call; None where there are none.

    Args:
        row: its columns.
        place: of the row, for messages.

    Raises:
        DataError: the column is no list of functions.
    """
    value = row.get(_TOOLS)
    value = _parsed(value, place, _TOOLS) if isinstance(value, str) and value.strip() else value
    if value is None or value in ("", []):
        return None
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(
            f"'{_TOOLS}' is no list of functions: {place}",
            got=type(value).__name__,
            allowed="a list of JSON schemas, or its JSON as text",
        )
    return tuple(dict(tool) for tool in value)


def _parsed(text: str, place: object, column: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the text in '{column}' is not JSON: {place}", got=str(error)[:200], allowed=ALLOWED) from None
