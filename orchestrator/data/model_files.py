"""The files that travel with a model beside its weights and `config.json`.

Import, data preparation, training, resuming and export hand them on with their bytes unchanged. In a checkpoint they
are plain files of its manifest, without folders: the templates that transformers keeps in one have flat names there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from orchestrator.data.plain_files import read_regular
from orchestrator.errors import DataError

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE = "special_tokens_map.json", "added_tokens.json"
GENERATION_FILE, VOCAB_FILE, MERGES_FILE = "generation_config.json", "vocab.json", "merges.txt"
SOURCE_CONFIG_FILE = "hf_config.json"  # in a checkpoint: the config.json that its model was imported with
TEMPLATES_FOLDER = "additional_chat_templates"
_LARGE, _SMALL = 1 << 26, 1 << 22
# name -> how many bytes it may have: a vocabulary's or those of settings and templates
CARRIED: dict[str, int] = {
    TOKENIZER_FILE: _LARGE,
    TOKENIZER_CONFIG_FILE: _SMALL,
    SPECIAL_TOKENS_FILE: _SMALL,
    ADDED_TOKENS_FILE: _SMALL,
    "chat_template.jinja": _SMALL,
    "chat_template.json": _SMALL,
    GENERATION_FILE: _SMALL,
    "tokenizer.model": _LARGE,
    "tekken.json": _LARGE,
    VOCAB_FILE: _LARGE,
    MERGES_FILE: _LARGE,
    "vocab.txt": _LARGE,
}
_MAX_TEMPLATES = 32
_FLAT_TEMPLATE = re.compile(rf"{TEMPLATES_FOLDER}\.([A-Za-z0-9_-]{{1,64}})\.jinja")


def collect(folder: Path) -> dict[str, bytes]:
    """Read the travelling files of a directory, by their flat names; links are followed.

    Args:
        folder: the directory.

    Raises:
        OSError: one cannot be read.
        DataError: one is no plain file, or too large.
    """
    found = {name: folder / name for name in CARRIED if (folder / name).exists()}
    found |= {path.name: path for path in sorted(folder.glob(f"{TEMPLATES_FOLDER}.*.jinja"))}
    templates = sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    found |= {f"{TEMPLATES_FOLDER}.{path.name}": path for path in templates}
    for name, path in found.items():
        if limit_of(name) is None:
            raise DataError("a chat template has a name that cannot travel", got=path, allowed="A-Z a-z 0-9 _ - .jinja")
    if len(found) > len(CARRIED) + _MAX_TEMPLATES:
        raise DataError("there are too many chat templates", got=len(templates), allowed=f"at most {_MAX_TEMPLATES}")
    return {name: read_regular(path, limit_of(name) or 0) for name, path in found.items()}


def carried(names: Iterable[str], read: Callable[[str, int], bytes]) -> dict[str, bytes]:
    """Those files of a checkpoint that travel on.

    Args:
        names: the files that its manifest lists.
        read: gives the content of one, which may have so many bytes.
    """
    wanted = sorted(name for name in names if limit_of(name) is not None)
    return {name: read(name, limit_of(name) or 0) for name in wanted[: len(CARRIED) + _MAX_TEMPLATES]}


def limit_of(name: str) -> int | None:
    """Return how many bytes the travelling file of this flat name may have; None where it is none.

    Args:
        name: flat.
    """
    return CARRIED.get(name, _SMALL if _FLAT_TEMPLATE.fullmatch(name) else None)


def as_transformers_names(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files by the relative paths under which transformers looks for them.

    Args:
        files: content by flat name.
    """
    result = {}
    for name, content in files.items():
        flat = _FLAT_TEMPLATE.fullmatch(name)
        result[f"{TEMPLATES_FOLDER}/{flat[1]}.jinja" if flat else name] = content
    return result
