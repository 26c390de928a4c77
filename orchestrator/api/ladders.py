"""The runs of a ladder, from run directories or a table, and the file of a fit. No torch."""

from __future__ import annotations

import csv
import glob
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.atomic_files import write_atomically
from orchestrator.errors import ConfigError, ConfigErrors, UserError, shown
from orchestrator.planner.scaling_law import LadderFit, LadderPoint, ScalingLaw
from orchestrator.report.run_data import headline, number, read_run_data
from orchestrator.runs.listing import find_run

_COLUMNS = ("parameters", "tokens", "loss")
_FORMAT = 1


def read_table(path: str, columns: Sequence[str] = _COLUMNS) -> list[LadderPoint]:
    """Read a CSV file with a header.

    Args:
        path: of the file.
        columns: names of those with parameters, tokens and loss. `flops` in place of the second: it is divided by six
            times the parameters.

    Raises:
        ConfigErrors: the file cannot be read, or rows have no numbers.
    """
    if len(columns) != 3:
        raise ConfigErrors([ConfigError("three columns are needed", got=",".join(columns), allowed=",".join(_COLUMNS))])
    problems: list[UserError] = []
    points = []
    try:
        with open(Path(path).expanduser(), encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                there = ", ".join(shown(name) for name in reader.fieldnames or ())
                fix = "columns=N,D,LOSS names others"
                what = "the table lacks columns"
                raise ConfigErrors([ConfigError(what, got=f"{path}: {there}", allowed=", ".join(columns), fix=fix)])
            for row in reader:
                try:
                    size, tokens, loss = (float(row[name]) for name in columns)
                except (TypeError, ValueError):
                    problems.append(ConfigError("a row of the table has no numbers", got=f"{path}:{reader.line_num}"))
                    continue
                tokens = tokens / (6 * size) if "flop" in columns[1].lower() else tokens
                points.append(LadderPoint(size, tokens, loss, f"row {reader.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(ConfigError(f"the table cannot be read: {error}", got=path))
    if problems:
        raise ConfigErrors(problems)
    return points


def read_runs(patterns: Sequence[str], runs_dir: str = "runs", loss: str = "val_loss") -> list[LadderPoint]:
    """Read runs that have finished.

    Args:
        patterns: directories of runs, names below `runs_dir`, or patterns of either.
        runs_dir: where names are looked for.
        loss: `val_loss` or `loss_mean`, of the last evaluation or the last 20 steps.

    Raises:
        ConfigErrors: no such run, one that has not finished, or runs that cannot be compared.
    """
    points, problems, vocabularies = [], list[UserError](), dict[int, str]()
    for directory in _directories(patterns, runs_dir, problems):
        data = read_run_data(directory)
        facts, name = headline(data), f"{directory.parent.name}/{directory.name}"
        size = number(data.facts.get("active_parameters")) or number(data.facts.get("parameters"))
        if facts["status"] != "finished":
            fix = "leave it out, or train it to its end: the loss of a run that was cut short is above its law"
            problems.append(ConfigError("the run has not finished", got=f"{name}: {facts['status']}", fix=fix))
        elif size is None or facts["tokens"] is None or facts[loss] is None:
            problems.append(ConfigError(f"the run has no parameters, tokens or {loss}", got=name))
        else:
            points.append(LadderPoint(size, facts["tokens"], facts[loss], name))
            vocabularies.setdefault(int(number(data.facts.get("vocab_size")) or 0), name)
    if len(vocabularies) > 1:
        got = ", ".join(f"{size:,} of {name}" for size, name in vocabularies.items())
        fix = "take runs of one tokenizer: a loss per token depends on it"
        problems.append(ConfigError("the runs have different vocabularies", got=got, fix=fix))
    if problems:
        raise ConfigErrors(problems)
    return points


def _directories(patterns: Sequence[str], runs_dir: str, problems: list[UserError]) -> list[Path]:
    found: dict[Path, None] = {}
    for pattern in patterns:
        if any(sign in pattern for sign in "*?["):
            places = [Path(path) for root in ("", runs_dir) for path in glob.glob(str(Path(root) / pattern))]
            matched = [place for place in places if (place / "config.yaml").is_file()]
            found |= dict.fromkeys(sorted(place.absolute() for place in matched))
            if not matched:
                problems.append(ConfigError("no run has such a name", got=pattern, fix=f"see runs runs_dir={runs_dir}"))
            continue
        try:
            found[find_run(pattern, runs_dir).absolute()] = None
        except UserError as error:
            problems.append(error)
    return list(found)


def write_fit(path: Path, fit: LadderFit) -> None:
    """Write a fit, for `plan target_loss=... fit=FILE`.

    Args:
        path: of the file.
        fit: of a ladder.
    """
    data = {
        "format": _FORMAT,
        "law": vars(fit.law),
        "objective": fit.objective,
        "mean_error": fit.mean_error,
        "points": [vars(point) for point in fit.points],
        "resamples": [list(vars(law).values()) for law in fit.resamples],
    }
    write_atomically(path, json.dumps(data, indent=1) + "\n")


def read_fit(path: str) -> LadderFit:
    """Read a fit.

    Args:
        path: of the file, which is not trusted.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        data: Any = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']}")
        law = ScalingLaw(**{key: _finite(value) for key, value in data["law"].items()})
        points = [
            LadderPoint(_finite(one["parameters"]), _finite(one["tokens"]), _finite(one["loss"]), str(one["name"]))
            for one in data["points"]
        ]
        resamples = [ScalingLaw(*(_finite(value) for value in row)) for row in data["resamples"]]
        if not points:
            raise ValueError("no points")
        return LadderFit(law, tuple(points), resamples, _finite(data["objective"]), _finite(data["mean_error"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"the fit cannot be read: {shown(error)}", got=path, fix="make one: python -m orchestrator scaling-law"
        ) from error


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value} is no number")
    return float(value)
