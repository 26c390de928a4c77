"""`python -m orchestrator runs`: list the runs in a folder, and remove old ones."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError, UserError

if TYPE_CHECKING:
    from orchestrator.api.run_overview import RunOverview

_PROGRAM = "python -m orchestrator runs"
State = Literal["running", "finished", "interrupted", "pruned", "diverged", "failed", "dead", "unknown"]
_RUNS_HELP = "the folder of all runs"
_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_HEAD = ("run", "state", "step", "loss", "val loss", "goodput", "restarts", "devices", "host", "last sign of life")


@dataclass(frozen=True)
class ListRunsOptions:
    """Options of `runs`."""

    name: str | None = option(None, help="only runs of this name, the folder below runs_dir")
    states: tuple[State, ...] = option((), help="only those in these states: running, finished, dead, ...")
    limit: int = option(20, help="list so many, those first that were worked on last; 0: all")
    json: bool = option(False, help="print JSON")
    runs_dir: str = option("runs", help=_RUNS_HELP)


@dataclass(frozen=True)
class PruneRunsOptions:
    """Options of `runs prune`."""

    older_than: str | None = option(None, help="only runs without a sign of life for so long: 12h, 30d, 8w")
    keep_last: int | None = option(None, help="the newest so many of each name stay")
    states: tuple[State, ...] = option((), help="only those in these states: failed, dead, diverged, ...")
    name: str | None = option(None, help="only runs of this name")
    yes: bool = option(False, help="remove them; without it they are only listed")
    runs_dir: str = option("runs", help=_RUNS_HELP)


def main(argv: list[str]) -> int:
    """Run the verb; `argv` is what follows `runs`. Returns the exit status.

    Raises:
        UserError: wrong options, or a run that cannot be removed.
    """
    if any(word in ("-h", "--help", "help") for word in argv):
        print(_help())
        return 0
    if argv and argv[0] == "prune":
        return _prune(parse_options(PruneRunsOptions, argv[1:]))
    if argv and "=" not in argv[0]:
        close = difflib.get_close_matches(argv[0], ["prune"], n=1)
        fix = f"did you mean '{close[0]}'?" if close else f"{_PROGRAM} --help"
        raise ConfigError(f"there is no '{argv[0]}' under 'runs'", got=argv[0], allowed="prune, or options", fix=fix)
    return _list(parse_options(ListRunsOptions, argv))


def _help() -> str:
    return (
        f"usage: {_PROGRAM} [key=value ...]\n       {_PROGRAM} prune [key=value ...]\n\n"
        "List the runs in a folder: what each is doing, how far it is, and how much of its time was progress.\n"
        "A run is dead if it says that it runs, no process here holds it, and it gives no sign of life.\n\n"
        f"{describe_options(ListRunsOptions)}\n\n"
        "prune removes whole runs, with their checkpoints in the run's directory. Those that run stay, and what lies\n"
        "in an object store. (Old checkpoints of a run that stays: checkpoint prune.)\n\n"
        f"{describe_options(PruneRunsOptions)}\n\nExamples\n"
        f"  {_PROGRAM} states=running,dead\n"
        f"  {_PROGRAM} prune older_than=30d keep_last=3\n"
        f"  {_PROGRAM} prune states=failed,dead older_than=1d yes=true"
    )


def _list(options: ListRunsOptions) -> int:
    from orchestrator.api.run_overview import list_runs
    from orchestrator.cli.checkpoint_text import clean, strict_json

    if options.limit < 0:
        raise ConfigError("there are no fewer runs than none", got=f"limit={options.limit}", allowed="0 or more")
    runs = [
        run
        for run in list_runs(options.runs_dir, name=options.name)
        if not options.states or run.state in options.states
    ]
    shown = runs[: options.limit or None]
    if options.json:
        print(strict_json([run.to_dict() for run in shown]))
        return 0
    if not runs:
        print(
            f"no such runs in {options.runs_dir}"
            if Path(options.runs_dir).is_dir()
            else f"there is no folder {options.runs_dir}"
        )
        return 0
    print(clean(_table(shown)))
    if len(runs) > len(shown):
        print(f"and {len(runs) - len(shown)} older ones: limit=0")
    return 0


def _table(runs: Sequence[RunOverview]) -> str:
    from orchestrator.report.run_text import aligned

    rows = [
        (
            run.run,
            run.state,
            _of(run.step, run.max_steps),
            "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.val_loss is None else f"{run.val_loss:.4f}",
            "" if run.goodput is None else f"{run.goodput:.1%}",
            str(run.restarts) if run.restarts else "",
            run.devices or "",
            run.host or "",
            ago(time.time() - run.worked),
        )
        for run in runs
    ]
    kept = [at for at in range(len(_HEAD)) if any(row[at] for row in rows)]
    return aligned([[row[at] for at in kept] for row in (_HEAD, *rows)])


def _of(step: int | None, steps: int | None) -> str:
    return f"{step or 0:,}" + (f" of {steps:,}" if steps is not None else "")


def ago(seconds: float) -> str:
    """Say how long ago something was, in its largest unit.

    Args:
        seconds: since then.
    """
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _prune(options: PruneRunsOptions) -> int:
    from orchestrator.cli.checkpoint_text import clean, size_text
    from orchestrator.runs.removal import measure, remove_run

    going = _chosen(options)
    if not going:
        print("no run is to be removed")
        return 0
    freed, problems = 0, list[UserError]()
    for run in going:
        found = measure(run.directory, _checkpoint_dir(run.directory))
        stays = f"; its checkpoints in {found.elsewhere} stay" if found.elsewhere else ""
        try:
            if options.yes:
                remove_run(found)
        except UserError as error:  # one that has just been started; the others go
            problems.append(error)
            continue
        freed += found.size
        word = "removed" if options.yes else "would go"
        print(
            clean(f"{word:<10} {run.run}  {run.state}, {ago(time.time() - run.worked)}, {size_text(found.size)}{stays}")
        )
    print(f"{'freed' if options.yes else 'to free':<10} {size_text(freed)}")
    if not options.yes:
        print("nothing was removed: add yes=true")
    if problems:
        raise problems[0]
    return 0


def _chosen(options: PruneRunsOptions) -> list[RunOverview]:
    """Return the runs that the options mean, the oldest last; never one that runs.

    Raises:
        ConfigError: they mean all, or are no age or number.
    """
    from orchestrator.api.run_overview import list_runs

    if options.older_than is None and options.keep_last is None and not options.states:
        raise ConfigError("say which runs are to go", allowed="older_than=30d, keep_last=3, states=failed,dead")
    if "running" in options.states:
        raise ConfigError("a run that runs is not removed", got="states=running", fix="stop it first")
    if options.keep_last is not None and options.keep_last < 0:
        raise ConfigError("a number of runs stays", got=f"keep_last={options.keep_last}", allowed="0 or more")
    age = _seconds(options.older_than)
    kept: dict[str, int] = {}
    going = []
    for run in list_runs(options.runs_dir, name=options.name):
        family = run.directory.parent.name
        kept[family] = kept.get(family, 0) + 1
        if options.keep_last is not None and kept[family] <= options.keep_last:
            continue
        wanted = not options.states or run.state in options.states
        if run.state != "running" and wanted and time.time() - run.worked >= age:
            going.append(run)
    return going


def _seconds(text: str | None) -> float:
    if text is None:
        return 0.0
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([mhdw])", text)
    if match is None:
        what = "an age is a number and a unit: m, h, d or w"
        raise ConfigError(what, got=f"older_than={text}", allowed="90m, 12h, 30d, 8w")
    return float(match[1]) * _UNITS[match[2]]


def _checkpoint_dir(run_dir: Path) -> str | None:
    from orchestrator.config.compose import read_config
    from orchestrator.runs.run_directory import CONFIG

    try:
        return str(read_config(run_dir / CONFIG).checkpoint.dir)
    except UserError:
        return None  # of another version: what it says of a store cannot be told
