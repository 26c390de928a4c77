"""Plan a run on several islands: what they exchange, what that takes of their links, how long they wait, days and cost.

The islands' tokens are divided by their speeds, so that all take the same time for a step of the run. An exchange is an
offer to the hub and its answer, one after the other. What exchanging rarely does to the loss is not predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.planner.estimate.exchange_bytes import KINDS
from orchestrator.planner.estimate.money import bill
from orchestrator.planner.exchange_terms import ExchangeTerms
from orchestrator.planner.job_plan import FleetPlan, Request
from orchestrator.planner.quantity import Value, derive, given

PATIENT = 0.05
"""Share of the time that islands may wait where nothing hides an exchange: `needed` is what keeps to it."""
SWEEP = (1, 4, 16, 64, 256, 1024)
_DAY = 86400.0


@dataclass(frozen=True)
class Site:
    """An island as it is asked for.

    Attributes:
        name: of the island.
        fleet: its chips, in the short form.
        link: bits/s of its link to the hub, one way.
    """

    name: str
    fleet: str
    link: Value


@dataclass(frozen=True)
class ExchangeOutcome:
    """What one way of exchanging gives.

    Attributes:
        terms: of the exchange.
        figures: `size`, `per_step`, `needed`, `hidden`, `waiting`, `goodput`, `speed`, `days`, `cost`, `energy`.
    """

    terms: ExchangeTerms
    figures: dict[str, Value]


@dataclass(frozen=True)
class IslandsPlan:
    """The plan of a job on several islands.

    Attributes:
        request: what was planned.
        terms: as configured.
        sites: the islands.
        plans: of each island alone, for all tokens of the run.
        together: all their chips as one fleet; None where they are of several kinds, or make no fleet.
        step: seconds of a step of the run, the same on all islands; None where one of them does not hold the model.
        shares: of the tokens.
        outcomes: of the ways to exchange, as configured first.
        sweep: as configured, by inner steps.
        kinds: as configured, by the numbers on the way.
    """

    request: Request
    terms: ExchangeTerms
    sites: tuple[Site, ...]
    plans: tuple[FleetPlan, ...]
    together: FleetPlan | None = None
    step: Value | None = None
    shares: tuple[Value, ...] = ()
    outcomes: tuple[ExchangeOutcome, ...] = ()
    sweep: tuple[ExchangeOutcome, ...] = ()
    kinds: tuple[ExchangeOutcome, ...] = field(default=())

    @property
    def fits(self) -> bool:
        """Whether every island holds the model."""
        return all(plan.figures for plan in self.plans)

    @property
    def misfits(self) -> tuple[str, ...]:
        """Names of the islands that do not hold the model."""
        return tuple(site.name for site, plan in zip(self.sites, self.plans, strict=True) if not plan.figures)

    def as_data(self) -> dict[str, Any]:
        """Return the plan as plain data."""

        def rows(outcomes: Sequence[ExchangeOutcome]) -> list[dict[str, Any]]:
            return [
                {
                    **{key: value for key, value in vars(one.terms).items() if key != "shapes"},
                    "figures": {name: value.as_dict() for name, value in one.figures.items()},
                }
                for one in outcomes
            ]

        islands = [
            {
                "name": site.name,
                "fleet": plan.fleet.label,
                "fits": bool(plan.figures),
                "link": site.link.as_dict(),
                "share": share.as_dict() if share else None,
            }
            for site, plan, share in zip(self.sites, self.plans, self.shares or [None] * len(self.sites), strict=True)
        ]
        together = None
        if self.together is not None:
            figures = {name: value.as_dict() for name, value in self.together.figures.items()}
            together = {"fleet": self.together.fleet.label, "figures": figures}
        return {
            "islands": islands,
            "step": None if self.step is None else self.step.as_dict(),
            "outcomes": rows(self.outcomes),
            "by_inner_steps": rows(self.sweep),
            "by_numbers": rows(self.kinds),
            "one_fleet": together,
        }


def blocked_seconds(size: float, bits: float, step: float, terms: ExchangeTerms) -> float:
    """Return the seconds for which an island waits for its link, per round of inner steps.

    Every fragment goes to the hub and back; what takes longer than the steps of the overlap is waited for. However much
    is overlapped, a round lasts at least as long as all fragments need in one direction.

    Args:
        size: bytes of all fragments, in one direction.
        bits: per second of the link, one way.
        step: seconds of an inner step.
        terms: of the exchange.
    """
    one_way = 8 * size / bits
    exposed = terms.fragments * max(0.0, 2 * one_way / terms.fragments - terms.overlap_steps * step)
    return max(exposed, one_way - terms.inner_steps * step)


def needed_bits(size: float, step: float, terms: ExchangeTerms) -> float:
    """Return the bits/s of a link with which nothing is waited for; without overlap: no more than `PATIENT`.

    Args:
        size: bytes of all fragments, in one direction.
        step: seconds of an inner step.
        terms: of the exchange.
    """
    whole = 8 * size / (terms.inner_steps * step)
    if not terms.overlap_steps:
        return 2 * whole * (1 - PATIENT) / PATIENT
    return max(2 * 8 * size / (terms.fragments * terms.overlap_steps * step), whole)


def plan_islands(
    request: Request,
    terms: ExchangeTerms,
    sites: Sequence[Site],
    plans: Sequence[FleetPlan],
    together: FleetPlan | None = None,
) -> IslandsPlan:
    """Plan a job on several islands.

    Args:
        request: what is planned.
        terms: of the exchange.
        sites: the islands.
        plans: of each island alone.
        together: of all their chips as one fleet; None: there is no such fleet.
    """
    plan = IslandsPlan(request, terms, tuple(sites), tuple(plans), together)
    if not plan.fits:
        return plan
    speeds = [one.figures["speed"].renamed(f"speed of {site.name}") for site, one in zip(sites, plans, strict=True)]
    total = derive("speed of all islands", "tokens/s", "sum of the islands' speeds", lambda *s: sum(s), *speeds)
    formula = "speed of the island / speed of all"
    shares = [
        derive(f"share of {site.name}", "ratio", formula, lambda s, t: s / t, speed, total)
        for site, speed in zip(sites, speeds, strict=True)
    ]
    formula = "tokens of a step of the run / speed of all islands, which take the same time for their shares"
    step = derive("inner step", "s", formula, lambda b, s: b / s, _batch(request, plans), total, falling=(1,))
    islands = _Islands(plan, total, tuple(shares), step)
    sweep = {steps: replace(terms, inner_steps=steps) for steps in sorted({*SWEEP, terms.inner_steps})}
    return replace(
        plan,
        step=step,
        shares=tuple(shares),
        outcomes=tuple(islands.outcome(one) for one in _ways(terms)),
        sweep=tuple(islands.outcome(_within(one)) for one in sweep.values() if terms.algorithm != "synchronous"),
        kinds=tuple(islands.outcome(replace(terms, kind=kind)) for kind in KINDS if terms.algorithm != "synchronous"),
    )


def _batch(request: Request, plans: Sequence[FleetPlan]) -> Value:
    """Return the tokens of a step of the run: as given, else what suits each island, together."""
    if request.batch_tokens is not None:
        return given("tokens of a step of the run", float(request.batch_tokens), "tokens", "the global batch")
    batches = [plan.best.job.global_batch_tokens for plan in plans if plan.best is not None]
    return given("tokens of a step of the run", float(sum(batches)), "tokens", "what suits each island, together")


def _within(terms: ExchangeTerms) -> ExchangeTerms:
    """Return the terms with no more fragments than inner steps, and no more overlap than a round is long."""
    steps = terms.inner_steps
    return replace(terms, fragments=min(terms.fragments, steps), overlap_steps=min(terms.overlap_steps, steps))


def _ways(terms: ExchangeTerms) -> list[ExchangeTerms]:
    """List the ways to exchange that are compared, as configured first."""
    rarely = terms if terms.algorithm != "synchronous" else replace(terms, algorithm="diloco")
    hiding = replace(rarely, overlap_steps=max(1, rarely.inner_steps // rarely.fragments))
    found = [terms]
    for one in (rarely, rarely if rarely.overlap_steps else hiding):
        found += [replace(one, algorithm=algorithm) for algorithm in ("diloco", "decoupled")]
    return list(dict.fromkeys([*found, terms.exact]))


@dataclass(frozen=True)
class _Islands:
    """What all ways to exchange have in common."""

    plan: IslandsPlan
    total: Value
    shares: tuple[Value, ...]
    step: Value

    def outcome(self, terms: ExchangeTerms) -> ExchangeOutcome:
        """Return what one way of exchanging gives."""
        size, step, inner = terms.size(self.plan.request.job.model), self.step, float(terms.inner_steps)
        steps = given("inner steps", inner, "steps", "islands.inner_steps")
        per_step = derive("bytes a step, each way", "bytes", "exchange / inner steps", lambda e, h: e / h, size, steps)
        hiding = replace(terms, overlap_steps=max(1, terms.inner_steps // terms.fragments))
        patient = replace(terms, overlap_steps=0)
        figures = {"size": size, "per_step": per_step}
        for name, way in (("needed", patient), ("hidden", terms if terms.overlap_steps else hiding)):
            what = f"to wait at most {PATIENT:.0%} of the time" if way is patient else "to hide behind the steps"
            figures[name] = derive(
                f"link needed {what}",
                "bit/s",
                "twice the bytes in the time that may pass",
                lambda e, s, way=way: needed_bits(e, s, way),
                size,
                step,
                falling=(1,),
            )
        waiting, kept = self._waiting(terms, size), self._goodput(terms)
        formula = "speed of all islands x (1 - waiting)"
        speed = derive("speed", "tokens/s", formula, lambda t, w: t * (1 - w), self.total, waiting, falling=(1,))
        tokens = self.plan.request.tokens
        formula = "tokens / speed / goodput / 86400"
        days = derive("days", "days", formula, lambda n, s, g: n / s / g / _DAY, tokens, speed, kept, falling=(1, 2))
        bills = [bill(plan.fleet, days, tokens) for plan in self.plan.plans]
        cost = derive("cost", "usd", "sum over the islands", lambda *c: sum(c), *(one.run for one in bills))
        energy = derive("energy", "MWh", "sum over the islands", lambda *e: sum(e), *(one.energy for one in bills))
        figures |= {"waiting": waiting, "goodput": kept, "speed": speed, "days": days, "cost": cost, "energy": energy}
        return ExchangeOutcome(terms, figures)

    def _waiting(self, terms: ExchangeTerms, size: Value) -> Value:
        """Share of the time that the islands wait for their links: of the slowest one where all wait for all."""

        def share(e: float, s: float, link: float) -> float:
            blocked = blocked_seconds(e, link, s, terms)
            return blocked / (terms.inner_steps * s + blocked)

        formula = "what no step hides of an offer and its answer / (inner steps + that)"
        each = [
            derive(f"waiting of {site.name}", "ratio", formula, share, size, self.step, site.link, falling=(1, 2))
            for site in self.plan.sites
        ]
        if terms.algorithm != "decoupled":
            return derive("waiting", "ratio", "that of the slowest link: all wait for all", max, *each)
        return self._mean("waiting", "mean of the islands, by their shares", each)

    def _goodput(self, terms: ExchangeTerms) -> Value:
        """Share of the time that failures leave: those of all islands where all wait for all, else each its own."""
        each = [
            plan.figures["goodput"].renamed(f"goodput of {site.name}")
            for site, plan in zip(self.plan.sites, self.plan.plans, strict=True)
        ]
        if terms.algorithm == "decoupled":
            return self._mean("goodput", "mean of the islands, by their shares: nobody waits for one that fails", each)
        formula = "product of the islands' goodputs: all wait for one that fails"
        return derive("goodput", "ratio", formula, lambda *g: math.prod(g), *each)

    def _mean(self, name: str, formula: str, each: Sequence[Value]) -> Value:
        count = len(each)
        return derive(
            name,
            "ratio",
            formula,
            lambda *v: sum(a * b for a, b in zip(v[:count], v[count:], strict=True)),
            *each,
            *self.shares,
        )


def figures_of(plan: FleetPlan) -> Mapping[str, Value]:
    """Return speed, goodput, days, cost and energy of a fleet, beside those of an `ExchangeOutcome`.

    Args:
        plan: of the fleet.
    """
    return {name: plan.figures[name] for name in ("speed", "goodput", "days", "cost", "energy")}
