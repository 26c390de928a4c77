"""`python -m orchestrator launch`: submit a training to an engine, and ask after it."""

from __future__ import annotations

import difflib
import os
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import DONE, ConfigError, ConfigErrors, LaunchError, UserError

if TYPE_CHECKING:
    from orchestrator.config.schema import RunConfig
    from orchestrator.engines.engine import Engine, Rendered
    from orchestrator.engines.engine_job import EngineJob

_PROGRAM = "python -m orchestrator launch"
_SWEEP = ("-m", "--multirun")

_HELP = """usage: {program} engine=ENGINE hardware=TARGET [launch.nodes=N] [group=option ...] [key=value ...]
       {program} status|logs|cancel [RUN]
       {program} list

Train on a cluster: what the engine takes is rendered from the configuration of `train`, checked, written into the run's
directory and submitted by the engine's own client. Every start of the job, also the engine's own after a failure, is
`train resume=auto run_id=...`: it goes on from the newest checkpoint of the run.

Engines
{engines}

Options
{options}

Examples
  {program} engine=slurm hardware=cuda hardware.devices=8 launch.nodes=4 launch.time=12:00:00 model=llama3_8b
  {program} engine=slurm hardware=cpu dry_run=true          look at what would be submitted
  {program} engine=slurm hardware=cpu -m optim.lr=1e-3,3e-4 one job per value
  {program} status                                          of the run that was submitted last
  {program} logs tiny follow=true                           what it prints, until it ends
  {program} cancel runs/tiny/tiny-1130-2210-9f3c            ask it to save and stop

RUN is `latest` (the default), a run directory, a name, a run_id or the engine's id of the job. The keys of an engine:
conf/launch/ENGINE.yaml; what was run where: docs/launch.md."""


@dataclass(frozen=True)
class LaunchOptions:
    """Options of `launch`; everything else is `train`'s."""

    dry_run: bool = option(False, help="print the files and the command, write and submit nothing")


@dataclass(frozen=True)
class AskOptions:
    """Options of the sub-verbs."""

    run: str = option("latest", help="which run")
    runs_dir: str = option("runs", help="folder of all runs")


@dataclass(frozen=True)
class LogsOptions(AskOptions):
    """Options of `logs`."""

    follow: bool = option(False, help="go on until the job has ended")


@dataclass(frozen=True)
class ListOptions:
    """Options of `list`."""

    runs_dir: str = option("runs", help="folder of all runs")


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit code.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: what is wrong with the configuration or the job, or what the engine says.
    """
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_help())
        return DONE if argv else ConfigError.exit_code
    if argv[0] in _SUB_VERBS:
        return _SUB_VERBS[argv[0]](argv[1:])
    if "=" not in argv[0] and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], _SUB_VERBS, n=1)
        fix = f"did you mean '{close[0]}'?" if close else f"{_PROGRAM} --help"
        allowed = f"{', '.join(_SUB_VERBS)}, or engine=... and overrides"
        raise ConfigError("there is no such word under 'launch'", got=argv[0], allowed=allowed, fix=fix)
    own = [word for word in argv if word.partition("=")[0] in LaunchOptions.__dataclass_fields__]
    options = parse_options(LaunchOptions, own)
    return _launch([word for word in argv if word not in own], options.dry_run)


def _help() -> str:
    from orchestrator.engines.engine_table import ENGINES, engine_of

    width = max(map(len, ENGINES))
    engines = "\n".join(f"  {name:<{width}}  {engine_of(name).state}" for name in ENGINES)
    return _HELP.format(program=_PROGRAM, engines=engines, options=describe_options(LaunchOptions))


def _launch(argv: Sequence[str], dry_run: bool) -> int:
    from orchestrator.config.compose import compose
    from orchestrator.engines.engine_job import engine_job, new_run_id
    from orchestrator.engines.engine_table import ENGINES, engine_of
    from orchestrator.planner.planned_models import refuse_planned_only

    words = [f"launch={word.partition('=')[2]}" if word.startswith("engine=") else word for word in argv]
    refuse_planned_only(words, "launch")
    lines, flags, config_dir = _command_lines(words)
    configs = [compose(line, config_dir).config for line in lines]
    first = configs[0]
    name = first.launch.name
    if name not in ENGINES:
        raise ConfigError(
            "say who is to start the job",
            got=f"engine={name}",
            allowed=", ".join(ENGINES),
            fix="add engine=...; on this machine alone, without an engine: python -m orchestrator train",
        )
    if any(config.launch != first.launch or config.runs_dir != first.runs_dir for config in configs):
        raise ConfigError("the jobs of a sweep have one engine and one place", fix="sweep over other keys")
    engine, run_id = engine_of(name), first.run_id or new_run_id(first.name)
    ids = [run_id] if len(lines) == 1 else [f"{run_id}-{number}" for number in range(len(lines))]
    jobs = []
    for config, one, line in zip(configs, ids, lines, strict=True):
        _check(config)
        jobs.append(engine_job(config, one, [*flags, *_without_identity(line)]))
    if len(jobs) > 1 and engine.in_foreground:
        raise ConfigError(f"{name} runs one job at a time", got="-m", fix="train -m ... runs them one after the other")
    if len(jobs) > 1 and engine.takes_sweeps:
        whole = engine_job(first, run_id, [])
        jobs = [
            replace(
                jobs[0],
                name=whole.name,
                run_id=run_id,
                run_dir=whole.run_dir,
                folder=whole.folder,
                sweep=tuple(job.command for job in jobs),
            )
        ]
    for job in jobs:
        _hand_over(engine, job, dry_run)
    return DONE


def _command_lines(words: Sequence[str]) -> tuple[list[list[str]], list[str], str | None]:
    """Return the overrides of each job, the flags that each needs, and the folder of the user's own options."""
    from orchestrator.config.words import combinations, split_flags

    sweeps = any(word in _SWEEP for word in words)
    overrides, config_dir = split_flags([word for word in words if word not in _SWEEP])
    flags = ["--config-dir", str(Path(config_dir).absolute())] if config_dir else []
    left = [word for word in words if word.startswith("-") and word not in _SWEEP]
    if [word for word in left if word.partition("=")[0] not in ("--config-dir", "-cd")]:
        fix = "python -m orchestrator train ... --cfg job prints the configuration"
        raise ConfigError("launch has no such flag", got=" ".join(left), allowed="--config-dir, -m", fix=fix)
    if sweeps and any(word.lstrip("+").startswith("hydra/") for word in overrides):
        fix = "leave out hydra/...: the jobs of a sweep run side by side, each by itself"
        raise ConfigError("launch submits every combination at once", got=" ".join(overrides)[:300], fix=fix)
    return combinations(overrides) if sweeps else [list(overrides)], flags, config_dir


def _without_identity(line: Sequence[str]) -> list[str]:
    return [word for word in line if word.partition("=")[0] not in ("run_id", "resume")]


def _check(config: RunConfig) -> None:
    """Find what `train` would find at its start, as far as it can be known here."""
    from orchestrator.hardware.target_table import target_of
    from orchestrator.training.check import check_elsewhere

    if config.resume not in (None, "auto"):
        raise ConfigError(
            "a launched job goes on with the run of its own run_id at every start",
            got=f"resume={config.resume}",
            allowed="resume=auto",
            fix="to go on with a run, name it: run_id=<last part of its directory>",
        )
    hardware = config.hardware
    devices = 1 if hardware.target == "cpu" and hardware.devices == "auto" else hardware.devices
    if hardware.target != "auto" and devices != "auto":  # else `engine_job` and the machine ask for what they need
        target = target_of(hardware)
        check_elsewhere(config, config.launch.nodes * devices, target.strategy, planned=target.name != "cpu")


def _hand_over(engine: Engine, job: EngineJob, dry_run: bool) -> None:
    rendered = engine.render(job)
    if problems := engine.problems(job, rendered):
        raise ConfigErrors(problems)
    if dry_run:
        print(_shown(job, rendered))
        return
    from orchestrator.config.convert import to_dict
    from orchestrator.engines.submission import Submission

    _refuse_twice(job)
    try:
        job.folder.mkdir(parents=True)
        for name, text in rendered.files.items():
            (job.folder / name).write_text(text)
    except OSError as error:
        fix = "set runs_dir to a folder that you may write"
        what = f"the files of the job cannot be written: {error.strerror or error}"
        raise LaunchError(what, got=job.folder, fix=fix) from None
    print(f"files      {_from_here(job.folder)}", flush=True)
    options = to_dict(job.config.launch)

    def record(id: str) -> None:
        Submission(engine.name, id, job.run_id, time.time(), job.command, rendered.submit, options, job.folder).write()

    if engine.in_foreground:
        record(f"{socket.gethostname()}:{os.getpid()}")
        print(f"run        {_from_here(job.run_dir)}", flush=True)
        engine.submit(job, rendered)
    id = engine.submit(job, rendered)
    record(id)
    print(f"submitted  {engine.name} {id}: {shlex.join(rendered.submit)}")
    print(f"run        {_from_here(job.run_dir)}")
    print(f"look       {_PROGRAM} status {_from_here(job.run_dir)}   (or: logs, cancel)")


def _refuse_twice(job: EngineJob) -> None:
    """Refuse a run that an engine still has: its processes would only wait for each other."""
    from orchestrator.engines.engine_table import engine_of
    from orchestrator.engines.submission import submissions_of

    for earlier in submissions_of(job.run_dir):
        try:
            state: str = engine_of(earlier.engine).status(earlier).state
        except UserError:
            continue  # an engine that does not answer keeps nobody from trying
        if state in ("waiting", "running"):
            raise LaunchError(
                f"this run is submitted already, and {state}",
                got=f"{earlier.engine} {earlier.id}",
                fix=f"{_PROGRAM} cancel {earlier.id}, or give another run_id",
            )


def _shown(job: EngineJob, rendered: Rendered) -> str:
    parts = [f"--- {name}\n{text.rstrip()}\n" for name, text in rendered.files.items()]
    return "\n".join([*parts, f"run        {_from_here(job.run_dir)}", f"submit     {shlex.join(rendered.submit)}"])


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _status(argv: list[str]) -> int:
    from orchestrator.engines.engine_table import engine_of
    from orchestrator.engines.submission import find_submission

    options = parse_options(AskOptions, argv, positional=["run"])
    found = find_submission(options.run, options.runs_dir)
    status = engine_of(found.engine).status(found)
    rows = [("run", str(_from_here(found.folder.parent))), ("job", f"{found.engine} {found.id}")]
    rows.append(("state", f"{status.state} ({status.said})" if status.said else status.state))
    if status.hosts:
        rows.append(("hosts", ", ".join(status.hosts)))
    print("\n".join(f"{name:<10} {text}" for name, text in rows))
    return DONE


def _logs(argv: list[str]) -> int:
    from orchestrator.engines.engine_table import engine_of
    from orchestrator.engines.submission import find_submission

    options = parse_options(LogsOptions, ["follow=true" if word == "follow" else word for word in argv], ["run"])
    found = find_submission(options.run, options.runs_dir)
    for line in engine_of(found.engine).lines(found, options.follow):
        print(line, flush=True)
    return DONE


def _cancel(argv: list[str]) -> int:
    from orchestrator.engines.engine_table import engine_of
    from orchestrator.engines.submission import find_submission

    options = parse_options(AskOptions, argv, positional=["run"])
    found = find_submission(options.run, options.runs_dir)
    engine_of(found.engine).cancel(found)
    print(f"cancelled  {found.engine} {found.id}: it was asked to save and stop")
    return DONE


def _list(argv: list[str]) -> int:
    from orchestrator.engines.engine_table import ENGINES, engine_of
    from orchestrator.engines.submission import submissions

    options = parse_options(ListOptions, argv)
    rows = [("submitted", "engine", "job", "state", "run")]
    for found in submissions(Path(options.runs_dir)):
        try:
            state: str = engine_of(found.engine).status(found).state if found.engine in ENGINES else "unknown"
        except UserError:
            state = "unknown"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.submitted))
        rows.append((when, found.engine, found.id, state, str(_from_here(found.folder.parent))))
    if len(rows) == 1:
        print(f"nothing was submitted from {options.runs_dir}")
        return DONE
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return DONE


_SUB_VERBS: dict[str, Callable[[list[str]], int]] = {
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "list": _list,
}
