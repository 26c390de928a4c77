"""What the hub knows of its run before any island comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RunTerms:
    """What the hub knows of the run.

    Attributes:
        run: its uuid.
        max_steps: global steps.
        sequences: of a global step.
        expected: names of the islands that the run begins with, and the share of each; None: by its speed.
        eval_every: global steps between two evaluations; None: at the end alone.
        save_every: global steps between two checkpoints; None: at the end alone.
    """

    run: str
    max_steps: int
    sequences: int
    expected: Mapping[str, float | None]
    eval_every: int | None = None
    save_every: int | None = None
