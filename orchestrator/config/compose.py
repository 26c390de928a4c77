"""Compose a `RunConfig` from command line and YAML. Only this file and `words.py` import Hydra or OmegaConf.

What is wrong with the words is found first (`words.py`); with anything wrong, the rest is still composed and converted,
and all problems are reported together. Whatever Hydra, OmegaConf or YAML raise is one error, of the user.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.config.convert import from_dict, from_dict_partly
from orchestrator.config.files import check_option, read_plain
from orchestrator.config.registry import is_dotted, permit, targets
from orchestrator.config.schema import RunConfig
from orchestrator.config.sweep import Scored, StoredSweep, Sweep, SweepStopped
from orchestrator.config.validate import check_ranges, validate
from orchestrator.config.words import check_word, complete_words, group_options, not_chosen, parse_words, split_flags
from orchestrator.errors import DONE, MISTAKE, ConfigError, ConfigErrors, UserError
from orchestrator.sweeps.sweep_record import FOLDER, SweepRecord

__all__ = ["Composed", "compose", "conf_dir", "group_options", "read_config", "read_plain", "run_composed"]

CONFIG_NAME = "train"
_MAX_FILES = 1000  # of --config-dir, that are looked into for what is wrong
_NO_SUCH_KEY = re.compile(r"Could not override '([^']+)'")  # said by Hydra of a key that the schema has
_SEE = "see python -m orchestrator train --help"
# Of the exceptions of Hydra, OmegaConf, YAML and the system, whatever the user's files and words can cause.
_OF_COMPOSING = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, OSError)


@dataclass(frozen=True)
class Composed:
    """A composed configuration, with the choices and overrides that led to it."""

    config: RunConfig
    data: dict[str, Any]  # the same, as plain data
    choices: dict[str, str | None]  # option of each config group
    overrides: dict[str, bool]  # dotted keys given on the command line -> whether it is a group
    job: int | None = None  # number of the job of a multirun
    words: tuple[str, ...] | None = None  # what it was composed from in code; None: from the command line


def conf_dir() -> Path:
    """Return the folder of YAML files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "conf"
    return beside if (beside / f"{CONFIG_NAME}.yaml").is_file() else package / "conf"


def run_composed(
    argv: Sequence[str],
    prog: str,
    task: Callable[[Composed], int | Scored],
    keep: Callable[[Path, SweepRecord], object] | None = None,
) -> int:
    """Compose from `argv` (overrides and Hydra's flags) and call `task`, once per job of a multirun.

    A job of a multirun that fails is reported and the others run; one that a signal stopped is the last. Hydra's
    sweeper gets the objective of each job, where `task` returns one.

    Args:
        argv: words of the command line.
        prog: name of the command, for messages.
        task: called with each job's configuration.
        keep: called with folder and record of a multirun whenever a job of it has ended; None: no record is kept.

    Returns:
        The exit code of the job. Of a multirun: that of the stopped job; else `FAILED` where trying again may help
        a job, else the largest.

    Raises:
        ConfigErrors: all problems of the overrides and of the values.
        Exception: whatever `task` raises, where it is the only job.
    """
    from omegaconf import DictConfig

    argv, chosen = complete_words(argv)
    _check_overrides(argv)
    sweep = Sweep(argv, keep)
    single: list[Scored | BaseException] = []

    def job(cfg: DictConfig) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        settings = HydraConfig.get()

        def work() -> Scored:
            with _environment("HYDRA_FULL_ERROR", full_error):
                composed = _convert(cfg, settings, chosen)
                if keep is not None and composed.job is not None and sweep.stored is None:
                    sweep.stored = StoredSweep(_folder_of(composed.config))
                ended = task(composed)
                return ended if isinstance(ended, Scored) else Scored(ended)

        if settings.mode is not None and settings.mode.name == "MULTIRUN":
            values = {key: value for key, _, value in (word.partition("=") for word in settings.overrides.task)}
            chosen_keys = sweep.stored.space if sweep.stored else {}
            said = [f"{key}={value}" for key, value in values.items() if key in chosen_keys]
            return sweep.run(settings.job.num, ",".join(said) or settings.job.override_dirname, values, work)
        try:
            single.append(ended := work())
            return ended.objective
        except BaseException as error:
            # Raised again below: Hydra would take it for its own.
            single.append(error)
            return None

    job.sweep = sweep  # type: ignore[attr-defined]  # a sweeper gets the task, and nothing else of ours
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    if (code := _run_hydra(job, prog, argv)) != DONE:
        return code
    if single:
        if isinstance(single[-1], BaseException):
            raise single[-1]
        return single[-1].code
    return sweep.conclude()


def _folder_of(config: RunConfig) -> Path:
    """Return where a multirun without a study is kept: named by the time, never one that is there already."""
    parent, stamp = Path(config.runs_dir) / FOLDER, time.strftime("%Y%m%d-%H%M%S")
    names = (f"{config.name}-{stamp}{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
    return next(parent / name for name in names if not (parent / name).exists())


def _run_hydra(job: Callable[[Any], float | None], prog: str, argv: Sequence[str]) -> int:
    """Let Hydra read `argv` and call `job`. Returns `MISTAKE` where it has printed what is wrong."""
    import hydra

    # Its parser wants its flags in front; `train key=value -m` is as good as `train -m key=value`.
    words, config_dir = split_flags(argv)
    saved, sys.argv = sys.argv, [prog, *(word for word in argv if word not in words), *words]
    try:
        # Else it prints a traceback, and ends the process.
        with _environment("HYDRA_FULL_ERROR", "1"):
            hydra.main(**_behaviour(), config_path=str(conf_dir()), config_name=CONFIG_NAME)(job)()
    except SystemExit as stop:
        # Its code for what it has printed is 1, ours for the user's mistakes is 2.
        if stop.code not in (0, None):
            return MISTAKE
    except SweepStopped:
        pass
    except BrokenPipeError:
        raise  # the reader of what --cfg prints has gone
    except Exception as error:
        raise ConfigErrors(_problems_of(error, words, config_dir)) from error
    finally:
        sys.argv = saved
    return DONE


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> Composed:
    """Compose in code, as tests and tools do.

    Args:
        overrides: as on the command line.
        config_dir: a folder of the user's own options, as `--config-dir`.

    Raises:
        ConfigErrors: as `run_composed`.
    """
    words, chosen = complete_words(overrides)
    folder = ["--config-dir", config_dir] if config_dir else []
    with _own_hydra():
        _check_overrides([*words, *folder])
        return replace(_compose_api(words, config_dir, chosen), words=(*overrides, *folder))


def read_config(path: Path) -> RunConfig:
    """Read the resolved configuration of a run directory, without Hydra.

    Args:
        path: of `config.yaml`.

    Raises:
        ConfigError: the file is missing or not a mapping.
        ConfigErrors: it does not fit this version's schema.
    """
    return from_dict(RunConfig, read_plain(path))


def _convert(cfg: Any, settings: Any, chosen: Sequence[str] = ()) -> Composed:
    """Convert what Hydra has composed; `chosen` are the groups that the user has not chosen in words."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        data: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)  # type: ignore[assignment]
    except (OmegaConfBaseException, *_OF_COMPOSING) as error:
        raise ConfigErrors([_problem_of(error)]) from error
    choices = {group: option for group, option in settings.runtime.choices.items() if not group.startswith("hydra")}
    data["experiment"] = choices.get("experiment")
    # What the user names, on the command line or in a file of --config-dir, may be imported; see `registry`.
    permit(named for _, named in targets(data) if isinstance(named, str) and is_dotted(named))
    given = [override for _, override in parse_words(settings.overrides.task)[0]]
    overrides = {override.key_or_group: override.key_or_group in choices for override in given}
    overrides = {key: is_group for key, is_group in overrides.items() if key not in chosen}
    config, problems = from_dict_partly(RunConfig, data)
    # Keys are checked against each other only where each is valid alone; where a checkpoint brings some, with those.
    elsewhere = config.resume is not None or config.train.init_from is not None
    problems += check_ranges(config) if problems or elsewhere else validate(config)
    if problems:
        raise ConfigErrors(problems)
    multirun = settings.mode is not None and settings.mode.name == "MULTIRUN"
    return Composed(config, data, choices, overrides, settings.job.num if multirun else None)


@contextlib.contextmanager
def _own_hydra() -> Iterator[None]:
    """Compose in a program that may be an application of Hydra itself, whose state is put back."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    before = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = before


def _behaviour() -> dict[str, str]:
    """Ask Hydra for the behaviour of 1.3. Later versions have it by default, and warn where it is asked for."""
    from hydra import __version__

    return {"version_base": "1.3"} if tuple(map(int, __version__.split(".")[:2])) < (1, 4) else {}


def _compose_api(overrides: list[str], config_dir: str | None, chosen: Sequence[str] = ()) -> Composed:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    words = overrides
    if config_dir:
        words = [*overrides, f"hydra.searchpath=[{_quoted(f'file://{Path(config_dir).absolute()}')}]"]
    try:
        with initialize_config_dir(str(conf_dir()), **_behaviour()):
            cfg = hydra_compose(CONFIG_NAME, overrides=words, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        settings = HydraConfig.get()
        plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    except Exception as error:
        raise ConfigErrors(_problems_of(error, overrides, config_dir)) from error
    return _convert(plain, settings, chosen)


def _quoted(text: str) -> str:
    """Return a value of Hydra's grammar that stands for `text` as it is."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _check_overrides(argv: Sequence[str]) -> None:
    if {"-sc", "--shell-completion"} & set(argv):
        return  # what follows is for the shell
    words, config_dir = split_flags(argv)
    groups = group_options([conf_dir(), *([Path(config_dir)] if config_dir else [])])
    parsed, problems = parse_words(words)
    good = []
    for word, override in parsed:
        problem = check_word(override, groups, config_dir)
        if problem is None:
            good.append((word, override))
        else:
            problems.append(problem)
    if not problems:
        return
    try:
        # A sweep's first value stands for it, so that the other values are checked too.
        _compose_api([w for w, o in good if not o.is_sweep_override()], config_dir)
    except ConfigErrors as errors:
        said = {str(problem) for problem in problems}
        found = typing.cast(list[ConfigError], errors.problems)
        problems.extend(problem for problem in found if str(problem) not in said)
    raise ConfigErrors(problems)


def _problems_of(error: Exception, words: Sequence[str], config_dir: str | None) -> Sequence[UserError]:
    """Find the causes of a failure to compose: broken files of the user's, each with its line, else the message."""
    if isinstance(error, ConfigErrors):
        return error.problems
    if isinstance(error, UserError):
        return [error]
    problems = []
    found = sorted(Path(config_dir).rglob("*.yaml"))[:_MAX_FILES] if config_dir else []
    files = [file for file in found if file.is_file()]
    for file in files:
        try:
            check_option(file)
        except ConfigError as broken:
            problems.append(broken)
    return problems or [_problem_of(error, " ".join(words))]


def _problem_of(error: BaseException, got: str | None = None) -> ConfigError:
    """Translate an error of Hydra, OmegaConf or the system into a `ConfigError`."""
    key = getattr(error, "full_key", None)
    if match := _NO_SUCH_KEY.search(str(error)):
        words = [word for word in (got or "").split() if word.lstrip("+").startswith(f"{match[1]}=")]
        return not_chosen(match[1], (words or [match[1]])[0])
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type", "reference_type")))
    if isinstance(error, RecursionError):
        said = "it goes round in a circle: options that name each other in their defaults, or values in theirs"
    what = f"'{key}' cannot be worked out: {said}" if key else f"the configuration cannot be put together: {said}"
    return ConfigError(what[:1000], got=got or key, fix=f"give {key} a value" if key else _SEE)
