"""Make the keys that hold paths absolute, so that a run does not depend on the folder it was started from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig

# key -> values that are no path
_PATHS: dict[str, tuple[str, ...]] = {
    "runs_dir": (),
    "data.cache_dir": ("auto",),
    "data.tokenizer.path": (),
    "data.validation": ("builtin",),
    "checkpoint.dir": ("auto",),
    "checkpoint.memory.dir": ("auto",),
    "checkpoint.signing_key": (),
    "checkpoint.model_signing_key": (),
    "hardware.compilation_cache": ("auto",),
}
_SOURCE_WORDS = ("builtin",)


def absolute(config: RunConfig, base: Path | None = None) -> RunConfig:
    """Return the configuration with absolute paths, so that the run goes on from whatever folder it is resumed.

    Args:
        config: the configuration of a run.
        base: what relative paths are relative to; None for the working directory.
    """
    base = base or Path.cwd()
    data = to_dict(config)
    for key, words in _PATHS.items():
        *parents, last = key.split(".")
        section = data
        for parent in parents:
            section = section[parent]
        section[last] = _absolute(section[last], words, base)
    if isinstance(sets := data["data"]["validation"], dict):
        data["data"]["validation"] = {name: _absolute(path, _SOURCE_WORDS, base) for name, path in sets.items()}
    for source in data["data"]["sources"]:
        source["path"] = _absolute(source["path"], _SOURCE_WORDS, base)
    data["checkpoint"]["trusted_keys"] = [_absolute(key, (), base) for key in data["checkpoint"]["trusted_keys"]]
    return from_dict(RunConfig, data)


def _absolute(value: Any, words: tuple[str, ...], base: Path) -> Any:
    if not isinstance(value, str) or value in words or "://" in value or not value:
        return value
    # No resolution of links: a place that is a link today stays one. `..` and `*` of a glob stay as they are.
    return os.path.join(base, os.path.expanduser(value))
