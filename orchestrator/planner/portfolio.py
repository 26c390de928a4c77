"""Assign several jobs to several fleets.

Jobs on one fleet run one after the other, each on the whole of it. All assignments are compared where there are at
most `EXACT` of them; beyond that jobs are placed the longest first and then moved one by one while that helps, which
need not find the best. The objective `time` is when the last fleet is done, `cost` and `energy` are sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.planner.job_plan import FleetPlan
from orchestrator.planner.quantity import Value, derive

EXACT = 100_000


@dataclass(frozen=True)
class Portfolio:
    """An assignment of jobs to fleets.

    Attributes:
        placed: job -> its plan on the fleet that it runs on.
        impossible: jobs that fit no fleet.
        exact: whether all assignments were compared.
        days: until the last fleet is done.
        cost: of all jobs.
        energy: of all jobs.
    """

    placed: Mapping[str, FleetPlan]
    impossible: tuple[str, ...]
    exact: bool
    days: Value
    cost: Value
    energy: Value

    def on(self, fleet: str) -> list[tuple[str, FleetPlan]]:
        """List the jobs of one fleet, in the order in which they were asked for.

        Args:
            fleet: its label.
        """
        return [(job, plan) for job, plan in self.placed.items() if plan.fleet.label == fleet]


def assign(table: Mapping[str, Sequence[FleetPlan]], objective: str) -> Portfolio:
    """Assign every job to a fleet.

    Args:
        table: job -> its plan on each fleet, the fleets in the same order for all.
        objective: `time`, `cost` or `energy`. Where the cost or energy of a choice is unknown, it is not chosen
            while a known one is there.
    """
    options = {job: [plan for plan in plans if plan.figures] for job, plans in table.items()}
    impossible = tuple(job for job, plans in options.items() if not plans)
    jobs = [job for job in options if options[job]]
    count = 1
    for job in jobs:
        count *= len(options[job])
    if count <= EXACT:
        choices = itertools.product(*(options[job] for job in jobs))
        best = min((dict(zip(jobs, choice, strict=True)) for choice in choices), key=lambda c: _score(c, objective))
    else:
        best = _improve(_longest_first(jobs, options, objective), options, objective)
    return Portfolio(
        best, impossible, count <= EXACT, _finish(best), _sum(best, "cost", "usd"), _sum(best, "energy", "MWh")
    )


def _score(placed: Mapping[str, FleetPlan], objective: str) -> tuple[float, float, float]:
    """To be as small as can be: unknowns, the objective, and the other one of time and cost to decide ties."""
    days = _fleet_days(placed)
    finish = max(days.values(), default=0.0)
    if objective == "time":
        return 0.0, finish, _known_sum(placed, "cost")
    key = {"cost": "cost", "energy": "energy"}[objective]
    unknown = sum(plan.figures[key].value is None for plan in placed.values())
    return float(unknown), _known_sum(placed, key), finish


def _known_sum(placed: Mapping[str, FleetPlan], key: str) -> float:
    return sum(plan.figures[key].value or 0.0 for plan in placed.values())


def _fleet_days(placed: Mapping[str, FleetPlan]) -> dict[str, float]:
    days: dict[str, float] = {}
    for plan in placed.values():
        days[plan.fleet.label] = days.get(plan.fleet.label, 0.0) + (plan.figures["days"].value or 0.0)
    return days


def _longest_first(
    jobs: Sequence[str], options: Mapping[str, Sequence[FleetPlan]], objective: str
) -> dict[str, FleetPlan]:
    def shortest(job: str) -> float:
        return min(plan.figures["days"].value or 0.0 for plan in options[job])

    placed: dict[str, FleetPlan] = {}
    for job in sorted(jobs, key=shortest, reverse=True):
        placed[job] = min(options[job], key=lambda plan: _score({**placed, job: plan}, objective))
    return placed


def _improve(
    placed: dict[str, FleetPlan], options: Mapping[str, Sequence[FleetPlan]], objective: str
) -> dict[str, FleetPlan]:
    better = True
    while better:
        better = False
        for job, plans in options.items():
            for plan in plans:
                moved = {**placed, job: plan}
                if _score(moved, objective) < _score(placed, objective):
                    placed, better = moved, True
    return placed


def _finish(placed: Mapping[str, FleetPlan]) -> Value:
    per_fleet = []
    for label in dict.fromkeys(plan.fleet.label for plan in placed.values()):
        days = [plan.figures["days"] for plan in placed.values() if plan.fleet.label == label]
        per_fleet.append(derive(f"days of {label}", "days", "its jobs, one after the other", lambda *d: sum(d), *days))
    return derive(
        "days until all are done", "days", "the fleet that takes longest", lambda *d: max(d, default=0.0), *per_fleet
    )


def _sum(placed: Mapping[str, FleetPlan], key: str, unit: str) -> Value:
    values = [plan.figures[key].renamed(f"{key} of {job}") for job, plan in placed.items()]
    return derive(f"{key} of all jobs", unit, "sum over the jobs", lambda *v: sum(v), *values)
