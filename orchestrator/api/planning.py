"""Plan a run from Python: chips, layout, time and cost. No torch, no device."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api.island_planning import plan_sites, read_sites
from orchestrator.api.plan_words import PlanOptions, read_fleets, read_requests
from orchestrator.chips.load import load_catalogue
from orchestrator.config.options import parse_options
from orchestrator.errors import ConfigError, ConfigErrors, UserError
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.job_plan import FleetPlan, Request, plan_fleet, rank
from orchestrator.planner.plan_data import as_data
from orchestrator.planner.quantity import write
from orchestrator.report.plan_text import PlanText

if TYPE_CHECKING:
    from orchestrator.chips.catalogue import Catalogue
    from orchestrator.planner.fleet import Fleet
    from orchestrator.planner.island_plan import IslandsPlan

_OF_THE_COMMAND_LINE = (
    "fleet",
    "islands",
    "jobs",
    "json",
    "html",
    "explain",
)  # options that `plan` here does not take by keyword


@dataclass(frozen=True)
class Plans:
    """A job planned on one fleet or several, the best first. `str` gives what the command line prints.

    Attributes:
        request: what was planned.
        fleets: the plan of each fleet; one without `figures` does not hold the model.
        objective: by which they are ranked.
        catalogue: of the chips.
        islands: the plan of all fleets as islands of one run; None: each is planned for the run alone.
    """

    request: Request
    fleets: Sequence[FleetPlan]
    objective: str
    catalogue: Catalogue
    islands: IslandsPlan | None = None

    @property
    def fits(self) -> bool:
        """Whether any of the fleets holds the model; every one where they are islands."""
        if self.islands is not None:
            return self.islands.fits
        return any(plan.figures for plan in self.fleets)

    def to_dict(self, explain: str | None = None) -> dict[str, Any]:
        """Return all plans as plain data, as `json=true` prints them.

        Args:
            explain: a figure whose derivation is added, such as `cost`, or `all`.
        """
        data = as_data(self.request, self.fleets, self.objective, explain)
        return data if self.islands is None else {**data, "islands": self.islands.as_data()}

    def write_html(self, path: str | Path) -> None:
        """Write a page with plots.

        Args:
            path: of the file.

        Raises:
            OSError: it cannot be written.
        """
        from orchestrator.report.plan_page import write_page

        plans = list(self.fleets)
        write_page(Path(path).expanduser(), self.request, plans, self.objective, self.catalogue, self.islands)

    def text(self, plain: bool = False, explain: str | None = None) -> str:
        """Return the plans for a terminal.

        Args:
            plain: without characters beyond ASCII.
            explain: as for `to_dict`.
        """
        target = [] if self.request.target is None else ["\n".join(self.request.target.lines())]
        writer = PlanText(plain)
        islands = [] if self.islands is None else [writer.islands(self.islands)]
        parts = [about(self.request), *target, *islands, writer.write(list(self.fleets), self.objective)]
        parts += [_derivation(plan, explain) for plan in self.fleets if explain]
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.text()


def plan(
    overrides: Sequence[str] = (),
    *,
    fleet: str | Sequence[str] | None = None,
    islands: str | Sequence[str | Mapping[str, Any]] | None = None,
    config_dir: str | Path | None = None,
    **options: Any,
) -> Plans:
    """Plan a run.

    Args:
        overrides: of the run, as for `train`; models that can only be planned are known, too.
        fleet: the chips, such as `h100x1024` or `["h100x1024", "tpu_v5px2048"]`; docs/planning.md has all forms.
        islands: in place of `fleet`: those of one run on several fleets, such as `["h100x64", {"fleet": "trn2x64",
            "gbit_per_s": 10}]`.
        config_dir: folder with options of your own.
        **options: those of the command line: `tokens`, `objective`, `precision`, `max_usd`, ...

    Raises:
        ConfigErrors: everything that is wrong with the configuration, the fleets and the options.
    """
    names = [field.name for field in fields(PlanOptions) if field.name not in _OF_THE_COMMAND_LINE]
    problems: list[UserError] = []
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            fix = f"did you mean '{close[0]}'?" if close else None
            problems.append(ConfigError(f"there is no option '{name}'", got=name, allowed=", ".join(names), fix=fix))
    if problems:
        raise ConfigErrors(problems)
    words = [f"{name}={value}" for name, value in options.items() if value is not None]
    if fleet is not None:
        words.append("fleet=" + (fleet if isinstance(fleet, str) else f"[{','.join(fleet)}]"))
    if islands is not None:
        words.append(f"islands={islands if isinstance(islands, str) else json.dumps(list(islands))}")
    parsed = parse_options(PlanOptions, words)
    catalogue = load_catalogue(parsed.chips_file)
    found = read_fleets(parsed, catalogue, problems)
    flags = [] if config_dir is None else ["--config-dir", str(config_dir)]
    requests = read_requests([*overrides, *flags], parsed, problems)
    if problems:
        raise ConfigErrors(problems)
    return plan_fleets(next(iter(requests.values())), found, catalogue, parsed)


def plan_fleets(request: Request, fleets: Sequence[Fleet], catalogue: Catalogue, options: PlanOptions) -> Plans:
    """Plan a job on each fleet and rank them; those beyond the user's limits come last.

    Args:
        request: what is to be planned.
        fleets: chips to plan on.
        catalogue: of chips.
        options: the user's limits and the objective.
    """
    in_order = [plan_fleet(request, fleet, catalogue) for fleet in fleets]
    islands = None
    if options.islands is not None and request.exchange is not None:
        islands = plan_sites(request, request.exchange, read_sites(options.islands), in_order, catalogue)
    plans = rank(in_order, options.objective)
    if request.target is not None:
        from orchestrator.api.target_requests import with_interval

        plans = [with_interval(plan, catalogue) for plan in plans]
    return Plans(request, _within(plans, options), options.objective, catalogue, islands)


def _within(plans: list[FleetPlan], options: PlanOptions) -> list[FleetPlan]:
    """Fleets beyond the user's limits last, with a note."""
    limits = (("days", options.max_days, "max_days"), ("cost", options.max_usd, "max_usd"))
    good: list[FleetPlan] = []
    over: list[FleetPlan] = []
    for plan in plans:
        notes = []
        for key, limit, name in limits:
            value = plan.figures[key].value if plan.figures else None
            if limit is not None and plan.figures and (value is None or value > limit):
                notes.append(f"{'not known to be within' if value is None else 'over'} {name}={limit:g}")
        (over if notes else good).append(replace(plan, notes=(*plan.notes, *notes)))
    return [*good, *over]


def about(request: Request) -> str:
    """Return the job in a line.

    Args:
        request: the job.
    """
    shape = request.job.model
    sparse = f", {shape.experts} experts of which {shape.experts_per_token} per token" if shape.experts else ""
    return (
        f"{shape.name}: {write(parameters(shape), 'parameters')}{sparse}; {request.tokens} in sequences of "
        f"{request.job.seq_len:,}, {request.job.precision}"
    )


def _derivation(plan: FleetPlan, name: str) -> str:
    if not plan.figures:
        return f"{plan.fleet.label}: nothing to derive, the model does not fit"
    chosen = plan.figures.values() if name == "all" else [plan.figures[name]]
    return "\n\n".join([plan.fleet.label, *(value.explain() for value in chosen)])
