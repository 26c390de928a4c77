"""Say a configuration as the words of a command line that compose it again."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import OwnOptimConfig, RunConfig

_BEFORE_QUOTE = re.compile(r"(\\*)('|$)")
_FREE_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def as_words(config: RunConfig, without: Collection[str] = ()) -> list[str]:
    """Return words from which `compose` makes `config`.

    Args:
        config: a valid configuration.
        without: keys, or beginnings of such (`islands`), that are left as the defaults have them.

    Raises:
        ConfigErrors: the configuration is not valid.
    """
    groups = [f"optim={getattr(config.optim, 'name', 'own')}", f"launch={config.launch.name}"]
    if isinstance(config.optim, OwnOptimConfig):
        groups[0] = "optim=own"
    own = [f"optim._target_={config.optim._target_}"] if isinstance(config.optim, OwnOptimConfig) else []
    base = to_dict(compose([*groups, *own]).config)
    passed = {"experiment", *without}
    words = [
        f"{key}={value_word(value)}"
        for key, value in _changed(base, to_dict(config))
        if not any(key == one or key.startswith(f"{one}.") for one in passed)
    ]
    return [*groups, *own, *(word for word in words if word not in own)]


def value_word(value: Any) -> str:
    """Return a value as Hydra's grammar writes it.

    Args:
        value: plain data.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key_word(key)}:{value_word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(value_word, value)) + "]"
    # A quote and what stands before it are escaped; and what OmegaConf would take for a reference to another key.
    escaped = _BEFORE_QUOTE.sub(lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(value))
    return "'" + escaped.replace("${", "\\${") + "'"


def _key_word(key: str) -> str:
    return key if _FREE_KEY.fullmatch(key) else value_word(key)


def _changed(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in now.items():
        before = was.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and before.keys() == value.keys() and value:
            yield from _changed(before, value, f"{prefix}{key}.")
        elif value != before or type(value) is not type(before):
            yield prefix + key, value
