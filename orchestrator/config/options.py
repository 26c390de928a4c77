"""`key=value` options of the verbs that are not a training run, parsed without Hydra."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

from orchestrator.config.convert import convert_text
from orchestrator.errors import ConfigError, ConfigErrors, UserError

Options = TypeVar("Options")


def option(default: Any = dataclasses.MISSING, *, help: str, several: str = "") -> Any:
    """Declare a field of a verb's options, with the line that `--help` shows.

    Args:
        default: its value where it is not given; without one it is required.
        help: one line.
        several: what to do instead of giving it more than once.
    """
    return dataclasses.field(default=default, metadata={"help": help, "several": several})


def parse_options(cls: type[Options], argv: Sequence[str], positional: Sequence[str] = ()) -> Options:
    """Fill the dataclass `cls` from `key=value` words.

    Args:
        cls: a dataclass whose fields are made by `option`.
        argv: the words.
        positional: fields that words without a key are for, in order.

    Raises:
        ConfigErrors: unknown keys, wrong types and missing ones, all at once.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems: list[UserError] = []
    values: dict[str, Any] = {}
    open_places = [name for name in positional if not any(word.startswith(f"{name}=") for word in argv)]
    for word in argv:
        key, separator, text = word.partition("=")
        # A path may have an = in it.
        if open_places and not key.startswith("-") and not (separator and key.isidentifier()):
            key, separator, text = open_places.pop(0), "=", word
        if not separator:
            what, fix = "an option is written key=value", "see --help of the verb"
            problems.append(ConfigError(what, got=word, allowed=_names(fields), fix=fix))
        elif key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            fix = f"did you mean '{close[0]}'?" if close else "see --help of the verb"
            problems.append(ConfigError(f"there is no option '{key}'", got=word, allowed=_names(fields), fix=fix))
        elif key in values:
            fix = str(fields[key].metadata.get("several") or "say it once; a list is separated by commas")
            problems.append(ConfigError(f"'{key}' is given more than once", got=word, fix=fix))
        else:
            try:
                values[key] = convert_text(cls, key, text)
            except ConfigErrors as error:
                problems.extend(error.problems)
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if not problems:
        problems.extend(
            ConfigError(f"'{name}' is missing", fix=f"add {name}=...: {_help(fields[name])}") for name in missing
        )
    if problems:
        raise ConfigErrors(problems)
    return cls(**values)


def describe_options(cls: type[Any]) -> str:
    """Return the options of a verb as aligned lines for `--help`.

    Args:
        cls: the dataclass.
    """
    rows = []
    for field in dataclasses.fields(cls):
        default = (
            "" if field.default is dataclasses.MISSING else f" [{'none' if field.default is None else field.default}]"
        )
        rows.append((f"{field.name}=", f"{_help(field)}{default}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(fields)


def _help(field: Any) -> str:
    return str(field.metadata.get("help", ""))
