"""Compose configurations from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.config import compose as composing
from orchestrator.config.compose import Composed
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.config.validate import validate
from orchestrator.errors import ConfigError, ConfigErrors

Configuration = Composed | RunConfig | Sequence[str]
"""What functions take for a run: overrides as on the command line, what `compose` made of them, or a `RunConfig`."""


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> Composed:
    """Compose the configuration of a run.

    Args:
        overrides: the words of the command line, such as `["model=llama_20m", "optim.lr=1e-3"]`.
        config_dir: folder with options of your own: `DIR/model/mine.yaml` is then `model=mine`.

    Returns:
        The configuration (`.config`, a `RunConfig`) and how it was chosen.

    Raises:
        ConfigErrors: everything that is wrong with the words and the values, all at once.
    """
    if isinstance(overrides, str):
        raise ConfigError("overrides are a list", got=repr(overrides), fix=f"write [{overrides!r}]")
    return composing.compose(list(overrides), str(config_dir) if config_dir is not None else None)


def to_composed(config: Configuration, config_dir: str | Path | None = None) -> Composed:
    """Return whatever a user gave for a run as a composed configuration.

    Args:
        config: whatever form of a configuration the user has.
        config_dir: a folder of the user's own options.

    Raises:
        ConfigErrors: everything that is wrong with it.
    """
    if isinstance(config, Composed):
        return config
    if not isinstance(config, RunConfig):
        return compose(config, config_dir=config_dir)
    if problems := validate(config):
        raise ConfigErrors(problems)
    return Composed(config, to_dict(config), {"experiment": config.experiment}, {}, words=())
