"""Islands of `plan`: read them from its words, and plan them beside each of their fleets alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.config.convert import from_dict
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, ConfigErrors, UserError
from orchestrator.models.shapes import adapter_shapes, parameter_shapes
from orchestrator.planner.exchange_terms import ExchangeTerms
from orchestrator.planner.fleet import parse_fleet, resolve_fleet
from orchestrator.planner.island_plan import IslandsPlan, Site, plan_islands
from orchestrator.planner.job_plan import FleetPlan, Request, plan_fleet, sized
from orchestrator.planner.quantity import given

if TYPE_CHECKING:
    from orchestrator.chips.catalogue import Catalogue

LINK_GBIT = 10.0
"""Of an island's link where nobody says; marked."""
_FORM = "islands=[{fleet: h100x64, gbit_per_s: 10}, {fleet: tpu_v5px128}], two or more"


@dataclass(frozen=True)
class IslandEntry:
    """One island of `islands=[...]`: its chips in the short form, its name, and its link to the hub, one way."""

    fleet: str = ""
    name: str | None = None
    gbit_per_s: float | None = None


def read_sites(text: str) -> list[Site]:
    """Return the islands of `islands=[...]`.

    Args:
        text: the list, as YAML; an item is a fleet, or a mapping with the keys of `IslandEntry`.

    Raises:
        ConfigErrors: all that is wrong with them.
    """
    try:
        items = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigErrors([ConfigError("islands= is not a list", got=text, allowed=_FORM)]) from error
    if not isinstance(items, list) or len(items) < 2:
        raise ConfigErrors([ConfigError("islands= is not a list of two or more", got=text, allowed=_FORM)])
    problems: list[UserError] = []
    sites: list[Site] = []
    for number, item in enumerate(items):
        try:
            sites.append(_site(item, number))
        except UserError as error:
            problems += getattr(error, "problems", [error])
    names = [site.name for site in sites]
    problems += [
        ConfigError("two islands have one name", got=name, fix="give each a name of its own")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise ConfigErrors(problems)
    return sites


def _site(item: Any, number: int) -> Site:
    if not isinstance(item, (str, dict)):
        raise ConfigError(f"islands[{number}] is no island", got=item, allowed=_FORM)
    entry = IslandEntry(item) if isinstance(item, str) else from_dict(IslandEntry, item)
    fleet = parse_fleet(entry.fleet)
    if fleet.budget_usd is not None:
        fix = "give the number of chips, or the power"
        raise ConfigError("a budget is for one fleet, not for an island", got=entry.fleet, fix=fix)
    if entry.gbit_per_s is not None and not 0 < entry.gbit_per_s < float("inf"):
        raise ConfigError(f"islands[{number}].gbit_per_s is out of range", got=entry.gbit_per_s, allowed="above 0")
    name = entry.name or f"island-{number}"
    what = f"link of {name}"
    if entry.gbit_per_s is not None:
        return Site(name, entry.fleet, given(what, entry.gbit_per_s * 1e9, "bit/s", "gbit_per_s of the island"))
    why = f"assumption: {LINK_GBIT:g} Gbit/s, since gbit_per_s was not given"
    return Site(name, entry.fleet, given(what, LINK_GBIT * 1e9, "bit/s", why, estimated=True))


def exchange_terms(config: RunConfig, vocab: int | None) -> ExchangeTerms:
    """Return how the islands of a configuration exchange.

    Args:
        config: of the run.
        vocab: tokens of the vocabulary; None where the configuration's model is not the one that is planned.
    """
    islands = config.islands
    terms = ExchangeTerms(
        islands.algorithm, islands.inner_steps, islands.fragments, islands.overlap_steps, islands.exchange
    )
    if vocab is not None and config.model._target_ is None:
        model = dataclasses.replace(config.model, vocab_size=vocab)
        of_run = parameter_shapes(model) if config.train.lora.rank is None else adapter_shapes(model, config.train.lora)
        terms = replace(terms, shapes=tuple(shape for _, shape in of_run))
    return terms if terms.algorithm != "synchronous" else replace(terms.exact, shapes=terms.shapes)


def plan_sites(
    request: Request, terms: ExchangeTerms, sites: Sequence[Site], plans: Sequence[FleetPlan], catalogue: Catalogue
) -> IslandsPlan:
    """Plan a job on islands, beside one fleet of all their chips where they are of one kind.

    Args:
        request: what is planned.
        terms: of the exchange.
        sites: the islands.
        plans: of each island alone, in their order.
        catalogue: of chips.
    """
    together = None
    if len({plan.fleet.cluster.chip.key for plan in plans}) == 1:
        chips = sum(plan.fleet.cluster.chips for plan in plans)
        try:
            together = plan_fleet(request, resolve_fleet(sized(plans[0].fleet, chips), catalogue), catalogue)
        except UserError:
            together = None  # so many of these chips do not make a fleet
    return plan_islands(request, terms, sites, plans, together)
