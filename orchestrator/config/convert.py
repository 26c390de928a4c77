"""Convert plain data to frozen dataclasses and back, strictly: all problems are collected, nothing is coerced."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from orchestrator.errors import ConfigError, ConfigErrors

T = TypeVar("T")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


class _Mismatch(Exception):
    """A value that its type does not admit."""


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build the dataclass `cls`, whose fields all have defaults, from nested mappings.

    Args:
        cls: the dataclass.
        data: as parsed from YAML or JSON.

    Raises:
        ConfigErrors: all unknown keys and values of a wrong type, each with its dotted path.
    """
    result, problems = from_dict_partly(cls, data)
    if problems:
        raise ConfigErrors(problems)
    return result


def from_dict_partly(cls: type[T], data: Mapping[str, Any]) -> tuple[T, list[ConfigError]]:
    """Do as `from_dict`, with defaults in place of what is wrong, so that the rest can be checked further.

    Args:
        cls: the dataclass.
        data: as parsed from YAML or JSON.
    """
    problems: list[ConfigError] = []
    result = _build(cls, data, "", problems)
    return typing.cast(T, cls() if result is None else result), problems


def to_dict(value: Any) -> Any:
    """Convert a dataclass to plain dicts, lists and scalars, ready for YAML or JSON.

    Args:
        value: the dataclass, or a value of one.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return value


def convert_text(cls: type[Any], key: str, text: str) -> Any:
    """Convert one word of a command line to the type of the field `key` of `cls`.

    Args:
        cls: the dataclass.
        key: name of the field.
        text: the word.
    """
    hint = typing.get_type_hints(cls)[key]
    problems: list[ConfigError] = []
    value = _convert(hint, _parse(hint, text), key, problems)
    if problems:
        raise ConfigErrors(problems)
    return value


def describe_type(hint: Any) -> str:
    """Describe what a field admits, in words for a message.

    Args:
        hint: its type annotation.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(repr(arg) if isinstance(arg, bool) else str(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if hint is type(None):
        return "null"
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list of {describe_type(args[0])}"
        return f"a list of {len(args)}: " + ", ".join(describe_type(arg) for arg in args)
    if origin is dict:
        return f"a mapping to {describe_type(args[1])}"
    if dataclasses.is_dataclass(hint):
        return "a mapping with " + ", ".join(field.name for field in dataclasses.fields(hint))
    if hint is Any:
        return "anything"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _build(cls: type[Any], data: Any, path: str, problems: list[ConfigError]) -> Any:
    if not isinstance(data, Mapping):
        shown = "null" if data is None else data
        fix = f"set its keys: {path}.KEY=..." if path else None
        problems.append(ConfigError(f"'{path}' is not a mapping", got=shown, allowed=describe_type(cls), fix=fix))
        return None
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            problems.append(
                ConfigError(
                    f"there is no key '{_join(path, key)}'",
                    got=f"{_join(path, key)}={data[key]}",
                    allowed=", ".join(names),
                    fix=f"did you mean '{_join(path, close[0])}'?" if close else "remove it",
                )
            )
    values = {}
    for name in names:
        if name in data:
            before = len(problems)
            value = _convert(hints[name], data[name], _join(path, name), problems)
            if len(problems) == before or dataclasses.is_dataclass(value):
                values[name] = value
    return cls(**values)


def _convert(hint: Any, value: Any, path: str, problems: list[ConfigError]) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, path, problems)
    if hint is Any:
        return value  # arguments of a part: what they may be, it says itself
    for member in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ():
        if typing.get_origin(member) is dict and isinstance(value, Mapping):
            hint = member
    if kinds := dataclasses_of(hint):
        chosen = _kind_of(kinds, value, path, problems)
        return None if chosen is None else _build(chosen, value, path, problems)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value))
        if len(args) == len(value):
            pairs = zip(args, value, strict=True)
            return tuple(_convert(arg, item, f"{path}[{i}]", problems) for i, (arg, item) in enumerate(pairs))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _convert(args[1], item, _join(path, key), problems) for key, item in value.items()}
    try:
        return _scalar(hint, value)
    except _Mismatch:
        shown = "null" if value is None else value
        fix = _fix(hint, path, value)
        what = f"'{path}' has the wrong type or value"
        problems.append(ConfigError(what, got=shown, allowed=describe_type(hint), fix=fix))
        return None


def dataclasses_of(hint: Any) -> list[type[Any]]:
    """Return the members of a union of dataclasses; nothing where `hint` is no such union."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    return list(members) if members and all(map(dataclasses.is_dataclass, members)) else []


def _kind_of(kinds: list[type[Any]], value: Any, path: str, problems: list[ConfigError]) -> type[Any] | None:
    """Which of the dataclasses a mapping is meant for: by `_target_`, else by `name`, else the first of them."""
    if not isinstance(value, Mapping):
        return kinds[0]  # said by _build
    open_kinds = [kind for kind in kinds if "_target_" in kind.__dataclass_fields__]
    if value.get("_target_") is not None and open_kinds:
        return open_kinds[0]
    names = {kind.name: kind for kind in kinds if kind not in open_kinds}
    name = value.get("name", kinds[0].name)
    if isinstance(name, str) and name in names:
        return names[name]
    close = difflib.get_close_matches(str(name), names, n=1)
    where = _join(path, "name")
    problems.append(
        ConfigError(
            f"'{where}' has the wrong type or value",
            got=name,
            allowed=", ".join(names) + (f", or any with {_join(path, '_target_')}" if open_kinds else ""),
            fix=f"did you mean '{close[0]}'?" if close else f"set {where}=...",
        )
    )
    return None


def _scalar(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        # YAML reads a bare off/no as False; the quoted word was meant.
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        raise _Mismatch
    if origin in (typing.Union, types.UnionType):
        for arg in args:
            try:
                return _scalar(arg, value)
            except _Mismatch:
                continue
        raise _Mismatch
    if hint is type(None) and value is None:
        return None
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise _Mismatch from None
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 (no dot) as text.
        try:
            return float(value)
        except ValueError:
            raise _Mismatch from None
    if hint is str and isinstance(value, str):
        return value
    raise _Mismatch


def _fix(hint: Any, path: str, value: Any) -> str:
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    words = [str(word) for arg in members if typing.get_origin(arg) is Literal for word in typing.get_args(arg)]
    if isinstance(value, str) and (close := difflib.get_close_matches(value, words, n=1)):
        return f"did you mean '{close[0]}'?"
    if str in members and isinstance(value, (bool, int, float)):
        return f"write '\"{value}\"': quoted for the shell, and for YAML"
    return f"set {path}=..."


def _parse(hint: Any, text: str) -> Any:
    """Return the plain value that a word stands for, given what the field wants."""
    args = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in args and text.lower() in ("null", "none", ""):
        return None
    if bool in args and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    for number in (int, float):
        if number in args:
            try:
                return number(text.replace("_", ""))
            except ValueError:
                continue
    for arg in args:
        if typing.get_origin(arg) is tuple:
            return [_parse(typing.get_args(arg)[0], part) for part in text.split(",") if part]
    return text


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
