"""Scaling of a job on one kind of chip, from a host to a million, and where each link becomes the limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.chips.catalogue import Catalogue
from orchestrator.planner.explain import AXES, link_of, parts
from orchestrator.planner.fleet import Fleet, resolve_fleet
from orchestrator.planner.job_plan import MOST_CHIPS, Request, ladder, search_fleet, sized
from orchestrator.planner.search import Candidate
from orchestrator.planner.slices import is_tpu

BINDS = 0.1
"""A link binds where waiting for it is at least this share of the step."""
_FROM = 8
_STEP = 4  # between the sizes
_LEADERS = 5  # frames that are filled to the end: a curve needs less than a plan


@dataclass(frozen=True)
class ScalePoint:
    """The best layout of one size of fleet.

    Attributes:
        chips: size of the fleet.
        best: the best layout.
        links: link -> share of the step that waits for it.
    """

    chips: int
    best: Candidate
    links: dict[str, float]

    @property
    def per_chip(self) -> float:
        """Tokens per second and chip of the fleet, idle ones counted."""
        return self.best.tokens_per_second / self.chips


def sizes(fleet: Fleet) -> list[int]:
    """List numbers of chips to look at: about `_STEP` times more each time, and the fleet's own.

    Args:
        fleet: the chips.
    """
    wanted, size = [], _FROM
    while size <= MOST_CHIPS:
        wanted.append(size)
        size *= _STEP
    there = ladder(fleet)
    chosen = {max((size for size in there if size <= want), default=there[0]) for want in [*wanted, MOST_CHIPS]}
    if not is_tpu(fleet.cluster.chip):
        chosen |= set(wanted)
    return sorted(size for size in {*chosen, fleet.cluster.chips} if size >= min(_FROM, fleet.cluster.chips))


def scale(request: Request, fleet: Fleet, catalogue: Catalogue, chips: Iterable[int]) -> list[ScalePoint]:
    """Compute the curve at these sizes; those on which the model does not fit are left out.

    Args:
        request: what is to be planned.
        fleet: the chips.
        catalogue: of chips.
        chips: numbers of chips.
    """
    points = []
    for count in chips:
        other = resolve_fleet(sized(fleet, count), catalogue)
        best = search_fleet(request, other, leaders=_LEADERS).best
        if best is None:
            continue
        links: dict[str, float] = {}
        for name, seconds in parts(best.time).items():
            if name in AXES and seconds > 0:
                link = link_of(name, best.plan, other.cluster)
                links[link] = links.get(link, 0.0) + seconds / best.time.step
        points.append(ScalePoint(other.cluster.chips, best, links))
    return points


def binding(points: Sequence[ScalePoint]) -> dict[str, ScalePoint]:
    """Return link -> the first point at which it binds.

    Args:
        points: of the curve, by rising size.
    """
    first: dict[str, ScalePoint] = {}
    for point in points:
        for link, share in point.links.items():
            if share >= BINDS:
                first.setdefault(link, point)
    return first
