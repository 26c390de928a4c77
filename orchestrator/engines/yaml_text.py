"""YAML that means the same to every reader: text that a parser may take for a number or a truth value is quoted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9./_-]*")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf", "infinity"}


class _Dumper(yaml.SafeDumper):
    """Quotes `1e3`, `012`, `on` and the like, which YAML 1.1 and 1.2 read differently."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    style = None if plain else "|" if "\n" in text and _is_block(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _is_block(text: str) -> bool:
    return all(line.isprintable() and line == line.rstrip() for line in text.split("\n"))


_Dumper.add_representer(str, _text)


def dump_yaml(*documents: Any, head: Sequence[str] = ()) -> str:
    """Return YAML of plain data.

    Args:
        documents: one or several.
        head: lines of a comment on top.
    """
    top = "".join(f"# {line}\n" for line in head)
    # Long lines stay: a folded one reads as another text.
    return top + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1 << 20, default_flow_style=False)
