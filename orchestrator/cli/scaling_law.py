"""`python -m orchestrator scaling-law`: fit a ladder of runs, and say what more parameters and tokens bring."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError, ConfigErrors, UserError

if TYPE_CHECKING:
    from orchestrator.planner.scaling_law import LadderFit, LadderPoint

_PROGRAM = "python -m orchestrator scaling-law"

_HELP = """usage: {program} runs=RUN,... | table=FILE.csv [key=value ...]

Fit L(N, D) = E + A / N^alpha + B / D^beta to the losses of a ladder of runs: sizes of model, each with several numbers
of tokens, each trained to the end of its schedule. Prints the law, the intervals of its numbers (95%, of resampled
runs), and model and tokens of the least loss for some amounts of compute. No torch, no device.

Options
{options}

Examples
  {program} runs=ladder/* out=fit.json html=fit.html
  {program} table=losses.csv columns=N,D,loss
  python -m orchestrator plan target_loss=2.5 fit=fit.json fleet=h100x256"""


@dataclass(frozen=True)
class ScalingLawOptions:
    """Options of `scaling-law`."""

    runs: tuple[str, ...] = option((), help="directories or names of runs; ladder/* takes all of that name")
    table: str | None = option(None, help="CSV file with a header instead of runs")
    columns: tuple[str, ...] = option(
        ("parameters", "tokens", "loss"),
        help="of the table: N, D and loss; a second one with FLOP in its name is 6 N D",
    )
    leave_out_worst: int = option(0, help="points with the largest losses that are left out")
    loss: Literal["val_loss", "loss_mean"] = option("val_loss", help="of runs: val_loss, or loss_mean (last 20 steps)")
    runs_dir: str = option("runs", help="where names of runs are looked for")
    resamples: int = option(400, help="of the points, for the intervals")
    seed: int = option(0, help="of the resamples")
    out: str | None = option(None, help="file of the fit, for plan target_loss=... fit=FILE")
    html: str | None = option(None, help="file for a page with the curves")
    json: bool = option(False, help="print JSON")


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit code.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: what is wrong with the options, the runs or the table.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP.format(program=_PROGRAM, options=describe_options(ScalingLawOptions)))
        return 0
    options = parse_options(ScalingLawOptions, argv)
    _check(options)
    from orchestrator.api.ladders import write_fit
    from orchestrator.planner.scaling_law import fit_ladder
    from orchestrator.report.scaling_law_page import law_text, write_law_page

    fit = fit_ladder(_points(options), options.resamples, options.seed)
    if options.out:
        write_fit(Path(options.out).expanduser(), fit)
    if options.html:
        write_law_page(Path(options.html).expanduser(), fit)
    if options.json:
        print(json.dumps(_data(fit), indent=2))
        return 0
    print(law_text(fit))
    for name, path in (("fit", options.out), ("page", options.html)):
        if path:
            print(f"{name:<10} {path}")
    return 0


def _check(options: ScalingLawOptions) -> None:
    problems: list[UserError] = []
    if bool(options.runs) == (options.table is not None):
        got = "both" if options.runs else "neither"
        problems.append(ConfigError("either runs= or table= names the ladder", got=got, fix="runs=ladder/*"))
    for name in ("resamples", "leave_out_worst"):
        if getattr(options, name) < 0:
            problems.append(ConfigError(f"{name}= is negative", got=getattr(options, name), allowed="0 or more"))
    if options.resamples > 10_000:
        problems.append(ConfigError("resamples= is too large", got=options.resamples, allowed="at most 10,000"))
    if problems:
        raise ConfigErrors(problems)


def _points(options: ScalingLawOptions) -> list[LadderPoint]:
    from orchestrator.api.ladders import read_runs, read_table

    if options.table is not None:
        points = read_table(options.table, options.columns)
    else:
        points = read_runs(options.runs, options.runs_dir, options.loss)
    kept = sorted(points, key=lambda point: point.loss)
    return kept[: len(kept) - options.leave_out_worst]


def _data(fit: LadderFit) -> dict[str, object]:
    names = vars(fit.law)
    return {
        "law": names,
        "intervals": {name: fit.interval(lambda law, name=name: getattr(law, name)) for name in names},  # type: ignore[misc]
        "points": len(fit.points),
        "resamples": len(fit.resamples),
        "objective": fit.objective,
        "mean_error": fit.mean_error,
    }
