"""Models that can be planned and have no preset to train: mixtures of experts, from `models.yaml`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from orchestrator.errors import ConfigError
from orchestrator.planner.spec import ModelShape


@dataclass(frozen=True)
class PlannedModel:
    """A model's sizes with their source.

    Attributes:
        shape: the model's sizes.
        max_seq_len: tokens that the model was made for.
        parameters: in all, as the source states them.
        source: of the sizes.
    """

    shape: ModelShape
    max_seq_len: int
    parameters: float
    source: str


@functools.cache
def planned_models() -> dict[str, PlannedModel]:
    """Return the models of `models.yaml` by the word that chooses them."""
    data = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text(encoding="utf-8"))
    return {
        name: PlannedModel(
            ModelShape(name, **entry["shape"]), entry["max_seq_len"], float(entry["parameters"]), entry["source"]
        )
        for name, entry in data.items()
    }


def refuse_planned_only(words: Sequence[str], verb: str) -> None:
    """Refuse a model that is only known to the planner.

    Args:
        words: of the command line.
        verb: that cannot have it.

    Raises:
        ConfigError: one of `words` chooses such a model.
    """
    for word in words:
        key, _, name = word.partition("=")
        if key == "model" and name in planned_models():
            raise ConfigError(
                f"the model '{name}' can be planned, not trained: it has no preset",
                got=f"{verb} {word}",
                allowed="a model of conf/model (train --help lists them)",
                fix=f"python -m orchestrator plan {word} fleet=...",
            )
