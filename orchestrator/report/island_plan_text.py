"""The plan of a run on islands on the terminal: shares and links, ways to exchange, and what inner steps change."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.planner.island_plan import PATIENT, ExchangeOutcome, IslandsPlan, figures_of
from orchestrator.planner.quantity import Value
from orchestrator.report.run_text import aligned

Rows = list[Sequence[str]]
NOTE = (
    "The same tokens for every way to exchange: what it does to the loss is not predicted. An island's tokens/s are "
    "those of its own plan; its share follows them. Links are counted one way, an exchange as an offer and then its "
    "answer; the hub's own link carries the sum of all islands'."
)


def islands_text(plan: IslandsPlan) -> str:
    """Return the plan of the islands together.

    Args:
        plan: of the islands.
    """
    if not plan.fits:
        return f"islands: the model does not fit {', '.join(plan.misfits)}; see below what would help"
    head = f"islands, a step of {plan.step}; {plan.outcomes[0].terms.label}"
    blocks = [f"{head}\n{aligned(island_rows(plan))}", aligned(way_rows(plan))]
    if plan.sweep:
        blocks += [aligned(sweep_rows(plan)), aligned(kind_rows(plan))]
    return "\n\n".join([*blocks, NOTE])


def island_rows(plan: IslandsPlan) -> Rows:
    """Return a table of the islands.

    Args:
        plan: of the islands.
    """
    rows: Rows = [("island", "fleet", "share", "tokens/s", "tokens/day", "link", "goodput")]
    for site, one, share in zip(plan.sites, plan.plans, plan.shares, strict=True):
        speed = one.figures["speed"]
        day = Value("", None if speed.value is None else speed.value * 86400, "tokens", speed.estimated, speed.bound)
        figures = (share, speed, day, site.link, one.figures["goodput"])
        rows.append((site.name, one.fleet.label, *(_short(value) for value in figures)))
    return rows


def way_rows(plan: IslandsPlan) -> Rows:
    """Return a table of the ways to exchange, beside each island alone and one fleet of all chips.

    Args:
        plan: of the islands.
    """
    keys = ("waiting", "goodput", "speed", "days", "cost", "energy")
    rows: Rows = [("together", "waiting", "goodput", "tokens/s", "days", "cost", "energy")]
    rows += [(one.terms.label, *(_short(one.figures[key]) for key in keys)) for one in plan.outcomes]
    others = [(f"{site.name} alone", one) for site, one in zip(plan.sites, plan.plans, strict=True)]
    if plan.together is not None and plan.together.figures:
        others.insert(0, (f"one fleet, {plan.together.fleet.label}", plan.together))
    rows += [(name, "", *(_short(value) for value in figures_of(one).values())) for name, one in others]
    return rows


def sweep_rows(plan: IslandsPlan) -> Rows:
    """Return a table by inner steps.

    Args:
        plan: of the islands.
    """
    chosen = plan.terms.inner_steps
    rows: Rows = [_traffic_head("inner steps")]
    for one in plan.sweep:
        mark = " *" if one.terms.inner_steps == chosen else ""
        rows.append((f"{one.terms.inner_steps:,}{mark}", *_traffic(one)))
    return rows


def kind_rows(plan: IslandsPlan) -> Rows:
    """Return a table by the numbers on the way.

    Args:
        plan: of the islands.
    """
    rows: Rows = [_traffic_head("numbers")]
    for one in plan.kinds:
        mark = " *" if one.terms.kind == plan.terms.kind else ""
        rows.append((f"{one.terms.kind}{mark}", *_traffic(one)))
    return rows


def _traffic_head(first: str) -> tuple[str, ...]:
    return (first, "exchange", "a step", f"link, waiting {PATIENT:.0%}", "link, overlapped", "waiting", "days", "cost")


def _traffic(one: ExchangeOutcome) -> tuple[str, ...]:
    keys = ("size", "per_step", "needed", "hidden", "waiting", "days", "cost")
    return tuple(_short(one.figures[key]) for key in keys)


def _short(value: Value) -> str:
    return str(value).removesuffix(" tokens/s").removesuffix(" tokens")
