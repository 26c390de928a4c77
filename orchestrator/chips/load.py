"""Load the catalogue that ships with the package, with the chips of a user's own file over it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from orchestrator.chips.catalogue import Catalogue
from orchestrator.chips.parse import check_shape, parse_catalogue
from orchestrator.errors import ConfigError


def load_catalogue(extra_path: str | Path | None = None) -> Catalogue:
    """Load the catalogue, with the chips of the YAML file `extra_path` added or laid over it.

    An entry of a chip that is there already replaces only the fields that it names.

    Raises:
        ConfigError: `extra_path` cannot be read or is no YAML.
        ConfigErrors: wrong entries, each named by its path.
    """
    return _shipped() if extra_path is None else _merged(Path(extra_path))


def match_device_name(name: str) -> str | None:
    """Match a name with the shipped catalogue; see `Catalogue.match_device_name`.

    Args:
        name: as the driver calls the device.
    """
    return load_catalogue().match_device_name(name)


@functools.cache
def _shipped() -> Catalogue:
    return parse_catalogue(_shipped_data(), "chips.yaml")


def _shipped_data() -> dict[str, Any]:
    text = Path(__file__).with_name("chips.yaml").read_text(encoding="utf-8")
    # The parser in C, which most builds have, takes a tenth of the time.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data: dict[str, Any] = loader(text).get_single_data()
    return data


def _merged(path: Path) -> Catalogue:
    try:
        extra = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            "the chip catalogue cannot be read", got=f"{path}: {reason}", allowed="a YAML file"
        ) from error
    check_shape(extra, path.name)
    base = _shipped_data()
    chips = dict(base["chips"])
    for key, entry in extra.get("chips", {}).items():
        chips[key] = {**chips.get(key, {}), **entry}
    sources = {**base["sources"], **extra.get("sources", {})}
    return parse_catalogue({**base, "chips": chips, "sources": sources}, path.name)
