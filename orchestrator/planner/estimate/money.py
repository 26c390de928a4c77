"""Cost and energy of a run. Unknown prices and powers give unknown results, never zeros."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planner.fleet import Fleet
from orchestrator.planner.quantity import Value, derive, given


@dataclass(frozen=True)
class Bill:
    """Cost and energy of a run on a fleet; idle chips are paid for and draw power like the others.

    Attributes:
        run: USD for the whole run.
        per_trillion: USD per trillion tokens.
        energy: MWh at the meter of the facility.
        megawatts: power of the facility.
    """

    run: Value
    per_trillion: Value
    energy: Value
    megawatts: Value


def bill(fleet: Fleet, days: Value, tokens: Value) -> Bill:
    """Compute cost and energy of `days` on all chips of the fleet.

    Args:
        fleet: the chips that are paid for.
        days: length of the run.
        tokens: of the run.
    """
    chips = given("chips paid for", float(fleet.paid_chips), "chips", f"fleet {fleet.label}")
    run = derive(
        "cost of the run", "usd", "chips x days x 24 x price", lambda n, d, p: n * d * 24 * p, chips, days, fleet.price
    )
    per_trillion = derive(
        "cost per trillion tokens", "usd", "cost / tokens x 1e12", lambda c, t: c / t * 1e12, run, tokens
    )
    megawatts = derive(
        "power of the facility",
        "MW",
        "chips x server power x PUE / 1e6",
        lambda n, w, p: n * w * p / 1e6,
        chips,
        fleet.power,
        fleet.pue,
    )
    energy = derive(
        "energy of the run", "MWh", "power of the facility x days x 24", lambda m, d: m * d * 24, megawatts, days
    )
    return Bill(run, per_trillion, energy, megawatts)
