"""`python -m orchestrator plan`: what a run needs, on whose chips, how long and for how much. No torch, no device."""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError, ConfigErrors, UserError

if TYPE_CHECKING:
    from orchestrator.chips.catalogue import Catalogue
    from orchestrator.planner.fleet import Fleet
    from orchestrator.planner.plan import FleetPlan, Request

_PROGRAM = "python -m orchestrator plan"
DOES_NOT_FIT = 1

_HELP = """usage: {program} fleet=FLEET [model=NAME] [group=option ...] [key=value ...]

What a run needs: whether it fits, how to shard it, how long it takes, how often it fails, what it costs and how
much power it draws. For
one fleet or several side by side, in seconds, without a device. The configuration is that of `train`.

Fleets
  h100x1024               so many chips; 1M and 400k are numbers too
  tpu_v7x@1GW             as many as so much power carries, cooling included; tpu_v7xx1M@1GW: at most a million
  h100@$5M                as many as make the run cost no more
  2xtpu_v5p:8x16x16       slices of that shape
  [h100x1024,trn2x4096]   several, compared
  FILE.yaml               `fleets:` a list of these, or of mappings with overrides (docs/planning.md)

Options
{options}

Models
  those of train, and {models}

Examples
  {program} model=llama3_70b fleet=h100x1024 tokens=15T
  {program} model=llama3_70b fleet=[h100x1024,tpu_v5px2048,trn2x4096] tokens=15T objective=cost html=plan.html
  {program} model=deepseek_v3 fleet=h100x2048 train.seq_len=4096 tokens=14.8T explain=cost

train.seq_len is {seq_len} and the batch follows the fleet unless you set them (train.global_batch_tokens). train.remat,
train.micro_batch_size, train.reduce_gradients and layout.* fix what the search may choose. Exits with 1 where the model
fits no fleet."""


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan`; everything else is `train`'s."""

    fleet: str = option(help="the chips, see above")
    tokens: str | None = option(None, help="of the run: 15T, 200B; none: an experiment's, else a trillion")
    objective: Literal["time", "cost", "energy"] = option("time", help="fleets are ranked by it: time, cost, energy")
    precision: Literal["bf16", "fp8", "fp32"] | None = option(None, help="bf16, fp8, fp32; none: hardware.precision")
    axes: Literal["all", "train"] = option("all", help="all, or train: those that the strategies of train have")
    stack: str = option(
        "auto", help="software whose speed is meant; auto: the vendor's usual one, or ours with axes=train"
    )
    jobs: str | None = option(None, help="YAML of several jobs, to be split over the fleets")
    chips_file: str | None = option(None, help="YAML that adds chips or overrides figures of the catalogue")
    price_usd_per_chip_hour: float | None = option(None, help="for all fleets; none: the lowest list price")
    watts_per_chip: float | None = option(None, help="of the server, per chip; none: the catalogue's")
    pue: float | None = option(None, help="facility power over server power; none: by vendor")
    inter_gb_per_s: float | None = option(None, help="network one way and chip; none: the catalogue's")
    failures_per_chip_day: float | None = option(None, help="that stop a job; none: as published")
    recovery: Literal["auto", "restart", "replace"] = option("auto", help="restart, replace a failed group, or auto")
    restart_seconds: float | None = option(None, help="from a failure to the next step")
    replace_seconds: float | None = option(None, help="from a failure until the other groups go on")
    save_stall_seconds: float | None = option(None, help="that a save stops the step; none: predicted")
    repair_hours: float | None = option(None, help="until a failed host is back")
    max_days: float | None = option(None, help="fleets that take longer are ranked last")
    max_usd: float | None = option(None, help="fleets that cost more are ranked last")
    explain: str | None = option(None, help="print the derivation of a figure: cost, days, goodput, ..., or all")
    json: bool = option(False, help="print JSON")
    html: str | None = option(None, help="file for a report with plots")


def main(argv: list[str]) -> int:
    """Run the verb. Returns 0, or `DOES_NOT_FIT` where no fleet holds the model.

    Raises:
        UserError: all that is wrong with the configuration, the fleets and the options.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_help())
        return 0
    from orchestrator.chips.load import load_catalogue
    from orchestrator.cli.plan_request import read_fleets, read_requests

    own = [word for word in argv if word.partition("=")[0] in PlanOptions.__dataclass_fields__]
    options = parse_options(PlanOptions, own)
    words = [word for word in argv if word not in own]
    catalogue = load_catalogue(options.chips_file)
    problems: list[UserError] = _check_figure(options.explain)
    fleets = read_fleets(options, catalogue, problems)
    requests = read_requests(words, options, problems)
    if options.jobs:
        problems += _check_split(options, fleets)
    if problems:
        raise ConfigErrors(problems)
    if options.jobs:
        return _split(requests, fleets, catalogue, options)
    return _compare(next(iter(requests.values())), fleets, catalogue, options)


def _check_split(options: PlanOptions, fleets: list[Fleet]) -> list[UserError]:
    """What goes with one job only."""
    problems: list[UserError] = [
        ConfigError(f"{name}= is for one job", got=f"{name}={getattr(options, name)} with jobs=", fix="leave out one")
        for name in ("html", "explain", "max_days", "max_usd")
        if getattr(options, name) is not None
    ]
    problems += [
        ConfigError("a budget is for one job", got=f"{fleet.label} with jobs=", fix="give the fleet's chips")
        for fleet in fleets
        if fleet.entry.budget_usd is not None
    ]
    return problems


def _help() -> str:
    from orchestrator.cli.plan_request import SEQ_LEN
    from orchestrator.planner.models import planned_models

    return _HELP.format(
        program=_PROGRAM,
        options=describe_options(PlanOptions),
        models=", ".join(planned_models()),
        seq_len=SEQ_LEN,
    )


def _compare(request: Request, fleets: list[Fleet], catalogue: Catalogue, options: PlanOptions) -> int:
    from orchestrator.observe.plan_text import PlanText
    from orchestrator.planner.plan import plan_fleet, rank

    plans = rank([plan_fleet(request, fleet, catalogue) for fleet in fleets], options.objective)
    plans = _within(plans, options)
    if options.html:
        from orchestrator.observe.plan_page import write_page

        write_page(Path(options.html).expanduser(), request, plans, options.objective, catalogue)
    if options.json:
        from orchestrator.planner.plan_data import as_data

        print(json.dumps(as_data(request, plans, options.objective, options.explain), indent=2))
    else:
        print(_about(request))
        print(f"\n{PlanText(_is_plain()).write(plans, options.objective)}")
        for plan in plans if options.explain else ():
            print(f"\n{_derivation(plan, str(options.explain))}")
        if options.html:
            print(f"\nreport: {options.html}")
    return 0 if any(plan.figures for plan in plans) else DOES_NOT_FIT


def _split(requests: dict[str, Request], fleets: list[Fleet], catalogue: Catalogue, options: PlanOptions) -> int:
    from tqdm import tqdm

    from orchestrator.observe.plan_text import PlanText
    from orchestrator.planner.plan import plan_fleet
    from orchestrator.planner.plan_data import portfolio_data
    from orchestrator.planner.portfolio import assign

    pairs = [(job, fleet) for job in requests for fleet in fleets]
    table: dict[str, list[FleetPlan]] = {job: [] for job in requests}
    for job, fleet in tqdm(pairs, desc="planning", leave=False, disable=None):
        table[job].append(plan_fleet(requests[job], fleet, catalogue))
    portfolio = assign(table, options.objective)
    if options.json:
        print(json.dumps(portfolio_data(portfolio, options.objective), indent=2))
    else:
        print("\n".join(f"{job}: {_about(request)}" for job, request in requests.items()))
        print(f"\n{PlanText(_is_plain()).portfolio(portfolio, options.objective)}")
    return DOES_NOT_FIT if portfolio.impossible else 0


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


def _about(request: Request) -> str:
    from orchestrator.planner.value import write
    from orchestrator.planner.work import parameters

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


def _check_figure(name: str | None) -> list[UserError]:
    from orchestrator.planner.figures import FIGURES

    known = (*FIGURES, "all")
    if name is None or name in known:
        return []
    close = difflib.get_close_matches(name, known, n=1)
    fix = f"did you mean '{close[0]}'?" if close else None
    return [ConfigError("there is no such figure to explain", got=f"explain={name}", allowed=", ".join(known), fix=fix)]


def _is_plain() -> bool:
    return "utf" not in (sys.stdout.encoding or "").lower()
