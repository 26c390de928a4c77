"""How the conversations of a configuration become tokens, and which of them count in the loss."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from orchestrator.config.schema import ChatConfig
from orchestrator.data.chat_template import TEMPLATE_FILE, ChatTemplate
from orchestrator.data.conversation import Conversation
from orchestrator.data.model_files import limit_of
from orchestrator.data.plain_files import read_regular
from orchestrator.data.store_index import SECOND
from orchestrator.data.tokenize import Tokenizer
from orchestrator.errors import DataError

# For models without a template of their own: `simple` needs no token but the end of text; `chatml` is for vocabularies
# that have its two tokens.
BUILTIN_TEMPLATES = {
    "simple": """{%- for message in messages %}
    {{- message.role | capitalize + ':' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- ' ' + message.content + eos_token }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- ' ' + message.content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
""",
    "chatml": """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
}


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation in tokens.

    Attributes:
        ids: int64 of shape [tokens].
        mask: uint8 of shape [tokens]: `COUNTS` where one counts in the loss; `SECOND` where the second conversation
            of a pair begins.
        text_bytes: of the text that the template made.
        digest: of what was said.
    """

    ids: np.ndarray
    mask: np.ndarray
    text_bytes: int
    digest: int


class ConversationEncoder:
    """Makes tokens and masks of conversations, as a configuration says.

    Args:
        config: `data.chat` of a run.
        tokenizer: of the model, with its files.
        pairs: conversations are pairs of responses.

    Attributes:
        tokenizer: the same, with the template among its files where the configuration gives one.

    Raises:
        DataError: there is no template, or it is none.
    """

    def __init__(self, config: ChatConfig, tokenizer: Tokenizer, pairs: bool = False):
        given = None if config.template is None else given_template(config.template)
        if given is not None:
            tokenizer = tokenizer.with_files({**tokenizer.files, TEMPLATE_FILE: given.encode()})
        self._config, self.tokenizer, self._pairs = config, tokenizer, pairs
        self._template = ChatTemplate(tokenizer, given, self._today)

    @cached_property
    def facts(self) -> list[Any]:
        """JSON-able: what tokens and masks depend on beside conversations and tokenizer."""
        return ["conversations", 1, self.record()]

    def record(self) -> dict[str, Any]:
        """Return what a store keeps of it."""
        config = self._config
        return {
            "template_sha256": self._template.fingerprint,
            "template_given": config.template is not None,
            "loss_on": config.loss_on,
            "date": config.date,
            "variables": dict(config.variables),
            **({"pairs": True} if self._pairs else {}),
        }

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Encode one conversation.

        Args:
            conversation: to encode.

        Raises:
            DataError: the template refuses it, or what the assistant says in it cannot be told; names the place.
        """
        config, messages, tools = self._config, conversation.messages, conversation.tools
        if conversation.rejected:
            return self._encode_pair(conversation)
        try:
            if config.loss_on == "all":
                text, ids = self._template.encode_text(messages, tools, config.variables)
                mask = np.ones(ids.size, dtype=bool)
            else:
                text = self._template.render(messages, False, tools, **config.variables)
                first = conversation.first
                if config.loss_on == "last":
                    first = max(first, _last_of_assistant(messages))
                ids, mask = self._template.encode(messages, False, tools, first=first, **config.variables)
        except DataError as error:
            raise _placed(error, conversation.place) from None
        size = len(text.encode("utf-8", "replace"))
        return EncodedConversation(ids, mask.astype(np.uint8), size, _digest([messages, tools]))

    def _encode_pair(self, pair: Conversation) -> EncodedConversation:
        """Encode both conversations of a pair, one behind the other; nothing counts where a response has no token."""
        size, ids, marks = 0, list[np.ndarray](), list[np.ndarray]()
        try:
            for messages in (pair.messages, pair.rejected):
                text = self._template.render(messages, False, pair.tools, **self._config.variables)
                more = self._config.variables
                found, counts = self._template.encode(messages, False, pair.tools, first=pair.first, **more)
                size += len(text.encode("utf-8", "replace"))
                ids.append(found)
                marks.append(counts.astype(np.uint8))
        except DataError as error:
            raise _placed(error, pair.place) from None
        answered = all(part[1:].any() for part in marks)
        marks[1][:1] = SECOND
        mask = np.concatenate(marks)
        said = [pair.messages, pair.rejected, pair.tools]
        return EncodedConversation(np.concatenate(ids), mask if answered else np.zeros_like(mask), size, _digest(said))

    def _today(self) -> datetime:
        return _no_date() if self._config.date is None else datetime.strptime(self._config.date, "%Y-%m-%d")


def given_template(name: str, key: str = "data.chat.template") -> str:
    """Return the text of a chat template that the user names.

    Args:
        name: of a built-in one, or a file.
        key: under which it was given, for messages.

    Raises:
        DataError: there is no such file, or it is too large or not UTF-8.
    """
    if name in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[name]
    path = Path(name).expanduser()
    try:
        return read_regular(path, limit_of(TEMPLATE_FILE) or 0).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the chat template cannot be read",
            got=f"{key}={name} ({getattr(error, 'strerror', None) or error})",
            allowed=f"{', '.join(BUILTIN_TEMPLATES)}, or a file in Jinja",
        ) from None


def _digest(said: list[Any]) -> int:
    content = json.dumps(said, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _placed(error: DataError, place: str) -> DataError:
    return DataError(f"{error.what}: {place}", got=error.got, allowed=error.allowed, fix=error.fix)


def _last_of_assistant(messages: tuple[dict[str, Any], ...]) -> int:
    return max((number for number, message in enumerate(messages) if message.get("role") == "assistant"), default=0)


def _no_date() -> NoReturn:
    raise DataError(
        "the chat template writes today's date, so tokens would depend on the day on which they are made",
        got="data.chat.date=null",
        allowed="a date",
        fix="set one: data.chat.date=2024-07-26",
    )
