"""Extract the text of a row: a field, nested or not; several fields by a template; or a list of messages."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from orchestrator.data.conversation import columns_of
from orchestrator.errors import ConfigError, DataError

_ABSENT = object()
_FIELD = "text"
_OPTION = "text_field=... (data.text_field, or text_field of the source, in a run)"


@dataclass(frozen=True)
class TextSpec:
    r"""The fields of a row that hold its text.

    Attributes:
        field: its name; where no field has the whole name, a dot leads into a nested object: `text.content`.
        template: several fields instead: `{title}\n\n{body}`. Nothing but substitution; `{{` and `}}` are braces, and
            a backslash before n or t stands for a line end or a tab.
        messages: what a list of messages (objects with role and content) becomes: `refuse`, or `plain`, which is
            "role: content" of each, with an empty line between. `chat`: rows are conversations, and no text;
            `preference`: pairs of responses.
        on_null: of rows whose field is null or missing: `error`, or `skip`, which counts them.
    """

    field: str = _FIELD
    template: str | None = None
    messages: Literal["refuse", "plain", "chat", "preference"] = "refuse"
    on_null: Literal["error", "skip"] = "error"

    @cached_property
    def parts(self) -> tuple[tuple[str, str | None], ...]:
        """The template as pairs of literal text and the field after it; None at the end.

        Raises:
            ConfigError: it is not a template.
        """
        if self.template is None:
            return (("", self.field),)
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise _no_template(self.template, str(error)) from error
        plain = all(not spec and not conversion for _, field, spec, conversion in parsed if field is not None)
        names = [field for _, field, _, _ in parsed if field is not None]
        if not names or not plain or any(not name or "[" in name for name in names):
            raise _no_template(self.template, "fields by name, without conversion" if names else "it names no field")
        unescape = lambda text: text.replace("\\n", "\n").replace("\\t", "\t")  # noqa: E731
        return tuple((unescape(literal), field) for literal, field, _, _ in parsed)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that a row needs, each once."""
        return tuple(dict.fromkeys(field for _, field in self.parts if field is not None))

    def columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the columns of a table that are read; where one is missing, those that are asked for.

        Args:
            names: of all columns of the table.
        """
        if not self.holds_conversations:
            return self.fields
        usual = ("chosen", "rejected") if self.messages == "preference" else ("messages",)
        return columns_of(names, self.named_field, self.messages == "preference") or usual

    @property
    def holds_conversations(self) -> bool:
        """Whether rows are conversations, or pairs of responses, and no text."""
        return self.messages in ("chat", "preference")

    @property
    def named_field(self) -> str | None:
        """The column of messages that the user has named."""
        return None if self.field == _FIELD else self.field

    @property
    def facts(self) -> list[str | None]:
        """What the documents depend on, for a key."""
        return [self.field, self.template, self.messages, self.on_null]

    def text_of(self, row: Mapping[str, Any], place: object) -> str | None:
        """Return the text of a row; None if a field that it needs is null or missing.

        Args:
            row: its fields.
            place: of the row, for messages.

        Raises:
            DataError: a field holds something that is not text.
        """
        if self.template is None:
            value = row.get(self.field, _ABSENT)
            return value if type(value) is str else self._text(row, self.field, place)
        pieces: list[str] = []
        for literal, field in self.parts:
            pieces.append(literal)
            if field is not None:
                text = self._text(row, field, place)
                if text is None:
                    return None
                pieces.append(text)
        return "".join(pieces)

    def _text(self, row: Mapping[str, Any], field: str, place: object) -> str | None:
        value = look_up(row, field)
        if isinstance(value, str):
            return value
        if value is None or value is _ABSENT:
            if self.on_null == "skip":
                return None
            raise _no_text(row, field, value, place)
        if self.template is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
            return self._conversation(value, field, place)
        raise DataError(
            f"the row has no text in '{field}': {place}",
            got=f"{field} of type {type(value).__name__}",
            allowed="text",
            fix=f"name the field: {_OPTION}",
        )

    def _conversation(self, messages: Sequence[Mapping[str, Any]], field: str, place: object) -> str:
        if self.messages == "refuse":
            raise DataError(
                f"the field '{field}' is a list of messages, and nothing says how they become text: {place}",
                got=f"objects with {', '.join(messages[0])}",
                allowed="text; or messages by the chat template, or as 'role: content' with an empty line between",
                fix="choose one: messages=chat, or messages=plain (in a run data.messages=...)",
            )
        return "\n\n".join(_message(message, field, place) for message in messages)


def look_up(row: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field: of that very name, else along the dots; `_ABSENT` if there is none.

    Args:
        row: its fields.
        field: name, or names joined by dots.
    """
    value: Any = row.get(field, _ABSENT)
    if value is _ABSENT and "." in field:
        value = row
        for name in field.split("."):
            if value is None:
                return None
            value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value


def has_fields(row: object, spec: TextSpec) -> bool:
    """Return whether an object has all the fields that `spec` asks for.

    Args:
        row: parsed JSON.
        spec: the fields of a document.
    """
    if isinstance(row, Mapping) and spec.holds_conversations:
        return bool(columns_of(tuple(row), spec.named_field, spec.messages == "preference"))
    return isinstance(row, Mapping) and all(look_up(row, field) is not _ABSENT for field in spec.fields)


def _message(message: Mapping[str, Any], field: str, place: object) -> str:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    known = {"role", "from", "content", "value"}
    more = [key for key, value in message.items() if key not in known and value not in (None, [], {}, "")]
    if isinstance(role, str) and isinstance(content, str) and not more:
        return f"{role}: {content}"
    raise DataError(
        f"a message in '{field}' is more than a role and a text: {place}",
        got=", ".join(f"{key} of type {type(value).__name__}" for key, value in message.items()),
        allowed="role and content (or from and value), both text, and nothing else",
        fix="write the text of the conversation into a field of its own first",
    )


def _no_text(row: Mapping[str, Any], field: str, value: Any, place: object) -> DataError:
    missing = value is _ABSENT
    others = [kind for kind in ("preference", "chat") if columns_of(tuple(row), None, kind == "preference")]
    if missing and others:
        return DataError(
            f"the row has no text in '{field}': {place}",
            got=f"fields {', '.join(map(str, row))}",
            allowed=f"an object with the field '{field}'",
            fix=f"such rows are read by messages={others[0]} (data.messages={others[0]} in a run); or name a field: "
            f"{_OPTION}",
        )
    return DataError(
        f"the row has no text in '{field}': {place}",
        got=(f"fields {', '.join(map(str, row)) or 'none'}" if missing else "null"),
        allowed=f"an object with the field '{field}'" if missing else "text",
        fix=(f"name the field: {_OPTION}, or skip" if missing else "skip and count")
        + " such rows: on_null=skip (data.on_null=skip in a run)",
    )


def _no_template(template: str, reason: str) -> ConfigError:
    return ConfigError(
        "the template of a text cannot be used",
        got=f"text_template={template!r}",
        allowed="text with fields in braces: '{title}\\n\\n{body}'; {{ and }} are braces",
        fix=f"mend it ({reason})",
    )
