"""`python -m orchestrator plan`: chips, layout, time and cost of a run. No torch, no device."""

from __future__ import annotations

import difflib
import json
import sys
from typing import TYPE_CHECKING

from orchestrator.config.options import describe_options, parse_options
from orchestrator.errors import ConfigError, ConfigErrors, UserError

if TYPE_CHECKING:
    from orchestrator.api.plan_words import PlanOptions
    from orchestrator.chips.catalogue import Catalogue
    from orchestrator.planner.fleet import Fleet
    from orchestrator.planner.job_plan import FleetPlan, Request

_PROGRAM = "python -m orchestrator plan"
DOES_NOT_FIT = 1

_HELP = """usage: {program} fleet=FLEET|islands=[FLEET,FLEET] [model=NAME] [group=option ...] [key=value ...]

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

Islands
  'islands=[{{fleet: h100x1024, gbit_per_s: 10}}, {{fleet: tpu_v5px2048}}]' islands.inner_steps=64 islands.exchange=int8
                          one run on fleets that exchange rarely; gbit_per_s: of the link, one way; name: of the island

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


def main(argv: list[str]) -> int:
    """Run the verb. Returns 0, or `DOES_NOT_FIT` where no fleet holds the model.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: all that is wrong with the configuration, the fleets and the options.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_help())
        return 0
    from orchestrator.api.plan_words import PlanOptions, read_fleets, read_requests
    from orchestrator.chips.load import load_catalogue

    own = [word for word in argv if _is_option(word, PlanOptions)]
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


def _is_option(word: str, options: type[PlanOptions]) -> bool:
    """Whether a word is an option of the verb; `islands=NAME` is the configuration's, `islands=[...]` the verb's."""
    key, _, value = word.partition("=")
    return key in options.__dataclass_fields__ and (key != "islands" or value.startswith("["))


def _check_split(options: PlanOptions, fleets: list[Fleet]) -> list[UserError]:
    """Return the errors of options that go with a single job only."""
    problems: list[UserError] = [
        ConfigError(f"{name}= is for one job", got=f"{name}={getattr(options, name)} with jobs=", fix="leave out one")
        for name in ("html", "explain", "max_days", "max_usd", "islands")
        if getattr(options, name) is not None
    ]
    problems += [
        ConfigError("a budget is for one job", got=f"{fleet.label} with jobs=", fix="give the fleet's chips")
        for fleet in fleets
        if fleet.entry.budget_usd is not None
    ]
    return problems


def _help() -> str:
    from orchestrator.api.plan_words import SEQ_LEN, PlanOptions
    from orchestrator.planner.planned_models import planned_models

    return _HELP.format(
        program=_PROGRAM,
        options=describe_options(PlanOptions),
        models=", ".join(planned_models()),
        seq_len=SEQ_LEN,
    )


def _compare(request: Request, fleets: list[Fleet], catalogue: Catalogue, options: PlanOptions) -> int:
    from orchestrator.api.planning import plan_fleets

    plans = plan_fleets(request, fleets, catalogue, options)
    if options.html:
        plans.write_html(options.html)
    if options.json:
        print(json.dumps(plans.to_dict(options.explain), indent=2))
    else:
        print(plans.text(_is_plain(), options.explain))
        if options.html:
            print(f"\nreport: {options.html}")
    return 0 if plans.fits else DOES_NOT_FIT


def _split(requests: dict[str, Request], fleets: list[Fleet], catalogue: Catalogue, options: PlanOptions) -> int:
    from tqdm import tqdm

    from orchestrator.api.planning import about
    from orchestrator.planner.job_plan import plan_fleet
    from orchestrator.planner.plan_data import portfolio_data
    from orchestrator.planner.portfolio import assign
    from orchestrator.report.plan_text import PlanText

    pairs = [(job, fleet) for job in requests for fleet in fleets]
    table: dict[str, list[FleetPlan]] = {job: [] for job in requests}
    for job, fleet in tqdm(pairs, desc="planning", leave=False, disable=None):
        table[job].append(plan_fleet(requests[job], fleet, catalogue))
    portfolio = assign(table, options.objective)
    if options.json:
        print(json.dumps(portfolio_data(portfolio, options.objective), indent=2))
    else:
        print("\n".join(f"{job}: {about(request)}" for job, request in requests.items()))
        print(f"\n{PlanText(_is_plain()).portfolio(portfolio, options.objective)}")
    return DOES_NOT_FIT if portfolio.impossible else 0


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
