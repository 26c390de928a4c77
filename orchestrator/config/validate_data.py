"""Validate what types cannot express of the data's configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

from orchestrator.config.data_schema import ChatConfig, DataConfig, TokenizerConfig
from orchestrator.config.validate_model import out_of_range
from orchestrator.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
"""What a folder, a metric and a label may be called."""
_LARGEST = 1 << 63
_OF_TEMPLATES = ("template", "loss_on", "date", "variables")  # without effect on stores that are prepared already


def check_data_config(data: DataConfig) -> list[ConfigError]:
    """List what is wrong with the data's configuration by itself, beyond ranges.

    Args:
        data: of a run.
    """
    return [*_tokenizer(data.tokenizer), *_names(data), *_skip(data), *check_chat(data)]


def _tokenizer(tokenizer: TokenizerConfig) -> list[ConfigError]:
    problems = []
    if tokenizer.path is not None and tokenizer.kind not in ("auto", "file"):
        problems.append(
            ConfigError(
                "data.tokenizer.path names a tokenizer, and data.tokenizer.kind another one",
                got=f"kind={tokenizer.kind} with path={tokenizer.path}",
                fix="leave out data.tokenizer.kind to use the file, or data.tokenizer.path",
            )
        )
    if tokenizer.eos is False and tokenizer.bos is False:
        problems.append(
            ConfigError(
                "without a token at either end, documents cannot be told apart",
                got="data.tokenizer.bos=false with data.tokenizer.eos=false",
                fix="leave out one of them",
            )
        )
    if tokenizer.bos is False and tokenizer.bos_token is not None:
        problems.append(
            ConfigError(
                "a BOS token is named that is not to be put",
                got=f"data.tokenizer.bos=false with data.tokenizer.bos_token={tokenizer.bos_token}",
                fix="leave out one of them",
            )
        )
    return problems


def _names(data: DataConfig) -> list[ConfigError]:
    """Names of sources and of validation sets: keys of metrics are made of them."""
    named = [(f"data.sources[{number}].name", source.name) for number, source in enumerate(data.sources)]
    sets = data.validation if isinstance(data.validation, dict) else {}
    found = [(key, name) for key, name in named if name is not None] + [("data.validation", name) for name in sets]
    allowed = "up to 100 letters, digits, '.', '_' and '-', the first no '.' or '-'"
    problems = [out_of_range(key, ascii(name)[:300], allowed) for key, name in found if not NAME.fullmatch(name)]
    names = [name for _, name in named if name is not None]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(out_of_range("data.sources", f"the name {twice[0]} twice", "a name for each source"))
    if data.validation == {}:
        problems.append(out_of_range("data.validation", "an empty mapping", "null, a path, or {NAME: PATH, ...}"))
    return problems


def _skip(data: DataConfig) -> list[ConfigError]:
    wrong = [pair for pair in data.skip if not 0 <= pair[0] < pair[1] < _LARGEST]
    shown = ", ".join(str(list(pair)) for pair in wrong[:3])
    allowed = "[FIRST, BEHIND_THE_LAST]: numbers of sequences, from 0, the second one larger"
    return [out_of_range("data.skip", shown, allowed)] if wrong else []


def check_chat(data: DataConfig) -> Iterator[ConfigError]:
    """List what is wrong with the settings of conversations.

    Args:
        data: the `data` group of a run.
    """
    chat, plain = data.chat, ChatConfig()
    if data.messages not in ("chat", "preference") and (
        said := [key for key in _OF_TEMPLATES if getattr(chat, key) != getattr(plain, key)]
    ):
        yield ConfigError(
            "a chat template is only used where conversations become tokens by one",
            got=f"{', '.join(f'data.chat.{key}={getattr(chat, key)}' for key in said)}, data.messages={data.messages}",
            fix="set data.messages=chat; of a prepared store it was decided when it was prepared",
        )
    if data.messages == "preference" and chat.loss_on != "assistant":
        yield ConfigError(
            "of a pair the responses count, whatever else there is",
            got=f"data.chat.loss_on={chat.loss_on} with data.messages=preference",
            fix="leave it out",
        )
    if data.messages in ("chat", "preference") and data.text_template is not None:
        yield ConfigError(
            "conversations are rendered by a chat template, not by a template of fields",
            got=f"data.messages={data.messages} with data.text_template={data.text_template!r}",
            fix="leave out one of them",
        )
    if chat.date is not None:
        try:
            datetime.strptime(chat.date, "%Y-%m-%d")
        except ValueError:
            yield out_of_range("data.chat.date", chat.date, "a date such as 2024-07-26")
    taken = {"messages", "tools", "documents", "add_generation_prompt"} & set(chat.variables)
    if taken:
        yield out_of_range("data.chat.variables", ", ".join(sorted(taken)), "variables that are not set already")
