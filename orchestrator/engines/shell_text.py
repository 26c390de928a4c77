"""Text for shell scripts: whatever comes from a configuration is quoted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from orchestrator.errors import ConfigError, shown

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def exports(environment: Mapping[str, str]) -> list[str]:
    """Return a line of `export` for each variable.

    Args:
        environment: by name; names that are none are `bad_variables`.
    """
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def bad_variables(key: str, environment: Mapping[str, str]) -> list[ConfigError]:
    """List the names that no shell takes for a variable, and values of several lines.

    Args:
        key: of the configuration.
        environment: by name.
    """
    problems = []
    for name, value in environment.items():
        if not _VARIABLE.fullmatch(name):
            allowed = "letters, digits and '_', the first no digit"
            problems.append(ConfigError(f"a name in '{key}' is none of a variable", got=shown(name), allowed=allowed))
        if "\n" in value or "\0" in value:
            fix = "write it on one line"
            problems.append(ConfigError(f"'{key}.{name}' has several lines", got=shown(value), fix=fix))
    return problems
