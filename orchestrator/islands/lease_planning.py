"""How the sequences of a run become leases: in rounds that all islands share, or for one island at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from orchestrator.islands.island_messages import LeaseStep
from orchestrator.islands.ledger import Range, count, split

_WORTH = 1.1  # times as fast a round must become for other shares to be taken: programs may have to be compiled anew


def divide_rows(total: int, shares: Mapping[str, float], units: Mapping[str, int]) -> dict[str, int]:
    """Divide the sequences of a step over islands. All of them get at least one.

    Args:
        total: sequences of a global batch.
        shares: weight of each island, more than 0.
        units: what each island can divide evenly; where it does not fit, the island pads its last rows.

    Returns:
        Sequences of each island, which add up to `total`. Islands beyond `total` get none.
    """
    names = sorted(shares)
    names = names[:total]
    whole = sum(shares[name] for name in names)
    wanted = {name: total * shares[name] / whole for name in names}
    rows = {name: max(1, math.floor(wanted[name] / units[name]) * units[name]) for name in names}
    while sum(rows.values()) > total:
        most = max((name for name in names if rows[name] > 1), key=lambda name: (rows[name] - wanted[name], name))
        rows[most] -= min(rows[most] - 1, sum(rows.values()) - total)
    while (left := total - sum(rows.values())) > 0:
        fitting = [name for name in names if units[name] <= left]
        least = max(fitting or names, key=lambda name: (wanted[name] - rows[name], name))
        rows[least] += min(units[least], left)
    return rows


def better_rows(
    rows: Mapping[str, int], speeds: Mapping[str, float], units: Mapping[str, int]
) -> dict[str, int] | None:
    """Return other shares of a step with which its slowest island is clearly faster; None where there are none.

    Args:
        rows: sequences of each island now.
        speeds: sequences per second of each; 0: not known.
        units: what each can divide evenly.
    """
    if not all(speeds.get(name, 0.0) > 0 for name in rows):
        return None
    new = divide_rows(sum(rows.values()), {name: speeds[name] for name in rows}, units)
    if new.keys() != rows.keys():
        return None
    now, then = (max(one[name] / speeds[name] for name in rows) for one in (rows, new))
    return new if now > _WORTH * then else None


def round_steps(
    ranges: Sequence[Range], begun: int, batch: int, rows: Mapping[str, int], last: int
) -> dict[str, list[LeaseStep]]:
    """Divide the sequences of a round into steps, and each step over the islands.

    Args:
        ranges: sequences of the round, in order.
        begun: sequences of the run that were given out before.
        batch: sequences of a global step.
        rows: sequences of each island in a whole step, which add up to `batch`.
        last: the last step of the run, for the schedule.

    Returns:
        Steps of each island; one that has no sequences of a step has the step without rows.
    """
    steps: dict[str, list[LeaseStep]] = {name: [] for name in rows}
    names, rest = sorted(rows), list(ranges)
    while rest:
        at = min(begun // batch, last)
        step, rest = split(rest, batch)
        whole = count(step)
        # Of a step that has fewer every island gets its part of what is there.
        parts = rows if whole == batch else divide_rows(whole, rows, dict.fromkeys(names, 1))
        for name in names:
            mine, step = split(step, parts.get(name, 0))
            steps[name].append(LeaseStep(at, tuple(mine)))
        begun += whole
    return steps


def own_steps(ranges: Sequence[Range], begun: int, rows: int, batch: int, last: int) -> list[LeaseStep]:
    """Divide the sequences of one island into its steps.

    Args:
        ranges: its sequences, in order.
        begun: sequences of the run that were given out before.
        rows: sequences of a step of the island.
        batch: sequences of a global step.
        last: the last step of the run, for the schedule.
    """
    steps, rest = [], list(ranges)
    while rest:
        step, rest = split(rest, rows)
        steps.append(LeaseStep(min(begun // batch, last), tuple(step)))
        begun += count(step)
    return steps


def own_length(speed: float, speeds: Sequence[float], rows: int, inner_steps: int, left: int) -> int:
    """Return how many steps an island that goes at its own pace gets.

    So many that it takes as long as the fastest one takes for `inner_steps`; near the end of the data no more than its
    part of what is left, so that all end at the same time.

    Args:
        speed: sequences per second of the island; 0: not known.
        speeds: of all islands that train.
        rows: sequences of a step of the island.
        inner_steps: of the fastest one.
        left: sequences that nobody has.
    """
    known = [one for one in speeds if one > 0]
    if not speed or len(known) < len(speeds):
        part, steps = 1 / max(1, len(speeds)), inner_steps
    else:
        # Steps per second are what counts; all have about as many rows.
        part, steps = speed / sum(known), max(1, round(inner_steps * speed / max(known)))
    return max(1, min(steps, math.ceil(left * part / rows)))
