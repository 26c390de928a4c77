"""Measure one case on all processes of a job: the worst of what they find, known to all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.certify.certificate import NOT_RUN, Case, judge
from orchestrator.distributed.exchange import exchange, new_topic
from orchestrator.errors import LostPeerError, shown
from orchestrator.stopping import Stopped
from orchestrator.strategies.parallel_strategy import ParallelStrategy

Found = tuple[float, str]
"""What a process has measured, and a note."""


class NotRunError(Exception):
    """A case needs what an earlier one has not made."""


def attempt(parallel: ParallelStrategy, name: str, layout: str, measure: Callable[[], Found]) -> Case:
    """Measure a case on all ranks together. What one of them raises is the case's failure, and not the job's.

    Args:
        parallel: the strategy, joined.
        name: of `KINDS`.
        layout: as text.
        measure: called on every rank.

    Returns:
        The same case on all ranks: the worst of what they measured.
    """
    missing = False
    try:
        value, note = measure()
    except (LostPeerError, Stopped):
        raise
    except NotRunError as error:
        value, note, missing = math.nan, str(error), True
    except Exception as error:
        value, note = math.nan, f"{type(error).__name__}: {shown(error, 300)}"
    told = gather(parallel, [value if math.isfinite(value) else None, note, missing])
    worst = max(range(len(told)), key=lambda rank: math.inf if told[rank][0] is None else told[rank][0])
    value, note, missing = told[worst]
    if note and parallel.size > 1 and (value is None or value):
        note = f"{note} (process {worst})"
    case = judge(name, layout, value, note)
    return replace(case, status=NOT_RUN) if missing else case


def gather(parallel: ParallelStrategy, mine: Any) -> list[Any]:
    """Return what every rank brings, on all ranks. They call it together.

    Args:
        parallel: the strategy, joined.
        mine: what JSON can carry.
    """
    topic = parallel.broadcast(new_topic())
    told: list[Any] = json.loads(exchange(parallel, topic, json.dumps(mine), lambda texts: f"[{','.join(texts)}]"))
    return told


def farthest(measured: Sequence[float | None], wanted: Sequence[float | None]) -> float:
    """Return the largest relative difference of two series; infinite where they do not fit, or are not finite.

    Args:
        measured: here.
        wanted: the values that they are held against.
    """
    if len(measured) != len(wanted) or not wanted:
        return math.inf
    return max(relative(one, other) for one, other in zip(measured, wanted, strict=True))


def relative(measured: float | None, wanted: float | None) -> float:
    """Return the relative difference of two numbers; infinite where one is not finite.

    Args:
        measured: here.
        wanted: the value that it is held against.
    """
    if measured is None or wanted is None or not (math.isfinite(measured) and math.isfinite(wanted)):
        return math.inf
    return abs(measured - wanted) / max(abs(wanted), 1e-30)


def named(names: Iterable[str]) -> str:
    """Return the first of some names, and how many more there are.

    Args:
        names: of tensors.
    """
    found = list(names)
    return ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")
