"""Read YAML files of configuration; each mistake is reported with file and line."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import ConfigError

_MAX_BYTES, _MAX_DEPTH = 1 << 20, 50


def read_plain(path: Path) -> dict[str, Any]:
    """Read a YAML mapping as plain data.

    Args:
        path: the file.

    Raises:
        ConfigError: the file is missing, no plain file, unreadable as YAML, or not a mapping.
    """
    data = _load(path)
    if not isinstance(data, dict):
        raise ConfigError("the configuration is not a mapping", got=path, fix="write key: value, one a line")
    return data


def check_option(path: Path) -> None:
    """Check a file of a config group before it is composed.

    Args:
        path: the file.

    Raises:
        ConfigError: it is no YAML, names a key twice, is nested without end, or is no mapping.
    """
    data = _load(path)
    if data is None:
        return  # an empty file sets nothing
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else "text" if isinstance(data, str) else type(data).__name__
        fix = "write key: value, one a line"
        raise ConfigError("a file of options holds keys and their values", got=f"{kind} in {path}", fix=fix)
    defaults = data.get("defaults", [])
    if not isinstance(defaults, list):
        fix = "write defaults: [base, _self_]"
        raise ConfigError("'defaults' is a list of options", got=f"{defaults!r}"[:80] + f" in {path}", fix=fix)


def _load(path: Path) -> Any:
    text = _text(path)
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"not YAML: {error.problem or error.context}", got=where, fix=_fix(error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", got=path, fix="mend the file") from None
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        # PyYAML's own constructors: a date that is none, a number of thousands of digits.
        raise ConfigError(f"not YAML: {error}"[:300], got=path, fix="mend the file") from None


def _text(path: Path) -> str:
    try:
        # A pipe would be waited for without end.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ConfigError("a configuration is a plain file", got=path)
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError("there is no configuration file", got=path) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the configuration cannot be read: {reason}", got=path) from None
    if len(content) > _MAX_BYTES:
        raise ConfigError("the file is too large to be a configuration", got=path, allowed=f"{_MAX_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8", got=f"{path}, line {line}", fix="save it as UTF-8") from None


def _fix(error: yaml.MarkedYAMLError) -> str:
    said = f"{error.problem} {error.context}"
    if "'\\t'" in said:
        return "indent with spaces instead of a tab"
    if "expected ',' or" in said or "stream end" in said:
        return "close the bracket or the quote"
    if "duplicate key" in said:
        return "leave out one of the two"
    if "constructor for the tag" in said:
        return "leave out the tag: a file of options is plain data"
    return "mend that line, or quote the value"


class _Loader(yaml.SafeLoader):
    """Plain data, of bounded nesting; a key that is named twice is a mistake, not the second value."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="it is nested too deep", problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"found duplicate key {key!r}", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, (str, int, float, bool)) else None)
        return super().construct_mapping(node, deep)


# As OmegaConf: a date is text. One that is none would be an error of PyYAML's.
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)  # type: ignore[type-var]
