"""Where this process stands: what it is at, and how far. Written by whatever does the work, read by who watches it.

A process is one rank of a run, so there is one of these. To note something costs a step less than a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STARTING, LOADING, COMPILING, ENDING = "starting", "loading", "compiling", "ending"
TRAINING, EVALUATING, SAVING = "training", "evaluating", "saving"
LONG_PHASES = (STARTING, LOADING, COMPILING, SAVING, ENDING)
"""Phases that may be one long piece: there is no step and no batch whose end would show that it goes on."""


@dataclass
class Standing:
    """Where a process stands.

    Attributes:
        phase: one of the constants of this module.
        step: optimizer steps completed.
        marks: grows whenever something was completed or begun.
        heard: called when a step is completed.
        moved: called when another phase begins.
    """

    phase: str = STARTING
    step: int = 0
    marks: int = 0
    heard: list[Callable[[], object]] = field(default_factory=list)
    moved: list[Callable[[], object]] = field(default_factory=list)


here = Standing()


def enter(phase: str) -> None:
    """Note that this process is at `phase` from now on.

    Args:
        phase: one of the constants of this module.
    """
    is_new, here.phase = phase != here.phase, phase
    here.marks += 1
    if is_new:
        for listener in here.moved:
            listener()


@contextmanager
def within(phase: str) -> Iterator[None]:
    """Note that this process is at `phase` in the block, and then at what it was at before.

    Args:
        phase: one of the constants of this module.
    """
    before = here.phase
    enter(phase)
    try:
        yield
    finally:
        enter(before)


def mark() -> None:
    """Note that a piece of the phase was begun or completed, such as a batch."""
    here.marks += 1


def reached(step: int) -> None:
    """Note that a step is completed. The first one of a process ends its compiling.

    Args:
        step: optimizer steps completed.
    """
    here.step = step
    enter(TRAINING)
    for listener in here.heard:
        listener()
