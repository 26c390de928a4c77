"""Plan a run from Python: chips, layout, time and cost. No torch, no device."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

_OF_THE_COMMAND_LINE = ("fleet", "jobs", "json", "html", "explain")  # options that `plan` here does not take by keyword


@dataclass(frozen=True)
class Plans:
    """A job planned on one fleet or several, the best first. `str` gives what the command line prints.

    Attributes:
        request: what was planned.
        fleets: the plan of each fleet; one without `figures` does not hold the model.
        objective: by which they are ranked.
        catalogue: of the chips.
    """

    request: Request
    fleets: Sequence[FleetPlan]
    objective: str
    catalogue: Catalogue

    @property
    def fits(self) -> bool:
        """Whether any of the fleets holds the model."""
        return any(plan.figures for plan in self.fleets)

    def to_dict(self, explain: str | None = None) -> dict[str, Any]:
        """Return all plans as plain data, as `json=true` prints them.

        Args:
            explain: a figure whose derivation is added, such as `cost`, or `all`.
        """
        return as_data(self.request, self.fleets, self.objective, explain)

    def write_html(self, path: str | Path) -> None:
        """Write a page with plots.

        Args:
            path: of the file.

        Raises:
            OSError: it cannot be written.
        """
        from orchestrator.report.plan_page import write_page

        write_page(Path(path).expanduser(), self.request, list(self.fleets), self.objective, self.catalogue)

    def text(self, plain: bool = False, explain: str | None = None) -> str:
        """Return the plans for a terminal.

        Args:
            plain: without characters beyond ASCII.
            explain: as for `to_dict`.
        """
        target = [] if self.request.target is None else ["\n".join(self.request.target.lines())]
        parts = [about(self.request), *target, PlanText(plain).write(list(self.fleets), self.objective)]
        parts += [_derivation(plan, explain) for plan in self.fleets if explain]
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.text()


def plan(
    overrides: Sequence[str] = (), *, fleet: str | Sequence[str], config_dir: str | Path | None = None, **options: Any
) -> Plans:
    """Plan a run.

    Args:
        overrides: of the run, as for `train`; models that can only be planned are known, too.
        fleet: the chips, such as `h100x1024` or `["h100x1024", "tpu_v5px2048"]`; docs/planning.md has all forms.
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
    fleets = fleet if isinstance(fleet, str) else f"[{','.join(fleet)}]"
    words = [f"{name}={value}" for name, value in options.items() if value is not None]
    parsed = parse_options(PlanOptions, [f"fleet={fleets}", *words])
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
    plans = rank([plan_fleet(request, fleet, catalogue) for fleet in fleets], options.objective)
    if request.target is not None:
        from orchestrator.api.target_requests import with_interval

        plans = [with_interval(plan, catalogue) for plan in plans]
    return Plans(request, _within(plans, options), options.objective, catalogue)


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
