"""Command line and YAML files to a `RunConfig`: the only file that imports Hydra or OmegaConf.

Hydra reports the first wrong override and stops, and lets `+newkey=1` through. So the overrides are first
checked against the schema here; with anything wrong, the rest is still composed and converted, and all
problems are reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import stopping
from orchestrator.config.convert import from_dict, from_dict_partly
from orchestrator.config.schema import RunConfig
from orchestrator.config.validate import check_ranges, validate
from orchestrator.errors import DONE, FAILED, MISTAKE, STOPPED, ConfigError, ConfigErrors, UserError

CONFIG_NAME = "train"


@dataclass(frozen=True)
class Composed:
    """A composed configuration and how the command line came to it."""

    config: RunConfig
    data: dict[str, Any]  # the same, as plain data
    choices: dict[str, str | None]  # option of each config group
    overrides: dict[str, bool]  # dotted keys given on the command line -> whether it is a group
    job: int | None = None  # number of the job of a multirun


def conf_dir() -> Path:
    """The folder of YAML files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "conf"
    return beside if (beside / f"{CONFIG_NAME}.yaml").is_file() else package / "conf"


def run_composed(argv: Sequence[str], prog: str, task: Callable[[Composed], int]) -> int:
    """Compose from `argv` (overrides and Hydra's flags) and call `task`, once per job of a multirun.

    A job of a multirun that fails is reported and the others run; one that a signal stopped is the last.

    Returns:
        The exit code of the job. Of a multirun: that of the stopped job; else `FAILED` where trying again may help
        a job, else the largest.

    Raises:
        ConfigErrors: all problems of the overrides and of the values.
        Exception: whatever `task` raises, where it is the only job.
    """
    import hydra
    from omegaconf import DictConfig

    _check_overrides(argv)
    sweep = _Sweep()
    failure: list[BaseException] = []

    def job(cfg: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        settings = HydraConfig.get()
        if settings.mode is not None and settings.mode.name == "MULTIRUN":
            sweep.run(f"{settings.job.num}: {settings.job.override_dirname}", lambda: task(_convert(cfg, settings)))
            return
        try:
            sweep.codes["0"] = task(_convert(cfg, settings))
        except BaseException as error:
            # Raised again below: Hydra would print a traceback of its own for it, and end with 1 whatever it is.
            failure.append(error)

    # Hydra's parser wants its flags in front; `train key=value -m` is as good as `train -m key=value`.
    words, _ = _split_flags(argv)
    saved, sys.argv = sys.argv, [prog, *(word for word in argv if word not in words), *words]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=CONFIG_NAME)(job)()
    except SystemExit as stop:
        # Hydra has printed what is wrong; its code for that is 1, ours for the user's mistakes is 2.
        if stop.code not in (0, None):
            return MISTAKE
    except _SweepStopped:
        pass
    finally:
        sys.argv = saved
    if failure:
        raise failure[-1]
    return sweep.conclude()


class _SweepStopped(BaseException):
    """Ends Hydra's loop over the jobs, which goes on after every `Exception`."""


class _Sweep:
    """What became of the jobs.

    Attributes:
        codes: number and overrides of a job -> its exit code.
    """

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def run(self, name: str, task: Callable[[], int]) -> None:
        stopping.check()  # a signal may have come when the last job was all but done
        print(f"--- job {name}", flush=True)
        try:
            code = task()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else DONE if stop.code is None else FAILED
        except Exception:
            traceback.print_exc()
            code = FAILED
        self.codes[name] = code
        if code in STOPPED:
            print("the sweep was stopped: jobs after this one are not started", file=sys.stderr)
            raise _SweepStopped

    def conclude(self) -> int:
        """Say which jobs failed, and return the exit code of all."""
        failed = {name: code for name, code in self.codes.items() if code}
        if len(self.codes) > 1 and failed:
            jobs = "\n".join(f"  job {name}  (exit code {code})" for name, code in failed.items())
            print(f"{len(failed)} of {len(self.codes)} jobs did not end well:\n{jobs}", file=sys.stderr)
        codes = set(failed.values())
        return next(
            (code for code in STOPPED if code in codes), FAILED if FAILED in codes else max(codes, default=DONE)
        )


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> Composed:
    """Compose in code, as tests and tools do.

    Raises:
        ConfigErrors: as `run_composed`.
    """
    argv = [*overrides, *(["--config-dir", config_dir] if config_dir else [])]
    _check_overrides(argv)
    return _compose_api(list(overrides), config_dir)


def read_config(path: Path) -> RunConfig:
    """The resolved configuration that a run directory carries, without Hydra.

    Raises:
        ConfigError: the file is missing or not a mapping.
        ConfigErrors: it does not fit this version's schema.
    """
    return from_dict(RunConfig, read_plain(path))


def read_plain(path: Path) -> dict[str, Any]:
    """A YAML mapping as plain data.

    Raises:
        ConfigError: the file is missing, unreadable as YAML, or not a mapping.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError("there is no configuration file", got=path) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", got=path) from None
    if not isinstance(data, dict):
        raise ConfigError("the configuration is not a mapping", got=path)
    return data


def group_options(directories: Sequence[Path]) -> dict[str, list[str]]:
    """Options of each config group found in the folders."""
    groups: dict[str, set[str]] = {}
    for directory in directories:
        for file in sorted(directory.glob("*/*.yaml")):
            groups.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(options) for group, options in groups.items()}


def _convert(cfg: Any, settings: Any) -> Composed:
    from omegaconf import OmegaConf

    data: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)  # type: ignore[assignment]
    choices = {group: option for group, option in settings.runtime.choices.items() if not group.startswith("hydra")}
    data["experiment"] = choices.get("experiment")
    given = _parse(settings.overrides.task)[0]
    overrides = {override.key_or_group: override.key_or_group in choices for override in given}
    config, problems = from_dict_partly(RunConfig, data)
    # Keys are held against each other only where each is right by itself; where a checkpoint brings some, beside those.
    elsewhere = config.resume is not None or config.train.init_from is not None
    problems += check_ranges(config) if problems or elsewhere else validate(config)
    if problems:
        raise ConfigErrors(problems)
    multirun = settings.mode is not None and settings.mode.name == "MULTIRUN"
    return Composed(config, data, choices, overrides, settings.job.num if multirun else None)


def _compose_api(overrides: list[str], config_dir: str | None) -> Composed:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if config_dir:
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = hydra_compose(CONFIG_NAME, overrides=overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        settings = HydraConfig.get()
        plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        return _convert(plain, settings)
    except (HydraException, OmegaConfBaseException) as error:
        fix = "see python -m orchestrator train --help"
        raise ConfigErrors([ConfigError(str(error), got=" ".join(overrides), fix=fix)]) from error


def _check_overrides(argv: Sequence[str]) -> None:
    if {"-sc", "--shell-completion"} & set(argv):
        return  # what follows is for the shell
    words, config_dir = _split_flags(argv)
    groups = group_options([conf_dir(), *([Path(config_dir)] if config_dir else [])])
    overrides, problems = _parse(words)
    good = []
    for word, override in zip([w for w in words if w not in {p.got for p in problems}], overrides, strict=True):
        problem = _check(override, groups)
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
        problems.extend(typing.cast(list[ConfigError], errors.problems))
    except Exception as error:
        problems.append(ConfigError(str(error)))
    raise ConfigErrors(problems)


def _split_flags(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Overrides among the words, and the value of --config-dir."""
    words, config_dir, skip = [], None, False
    for index, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if skip:
            skip = False
        elif flag in ("--config-dir", "-cd"):
            config_dir = value or (argv[index + 1] if index + 1 < len(argv) else None)
            skip = not value
        elif flag in ("--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c", "--info", "-i"):
            skip = not value and not (flag in ("--info", "-i") and "=" in "".join(argv[index + 1 : index + 2]))
        elif not word.startswith("-"):
            words.append(word)
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError("--config-dir is not a folder", got=config_dir, fix="give a folder that holds group folders")
    return words, config_dir


def _parse(words: Sequence[str]) -> tuple[list[Any], list[ConfigError]]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed, problems = [], []
    for word in words:
        try:
            parsed.append(parser.parse_override(word))
        except HydraException as error:
            fix = "quote special characters: 'key=\"value\"'" if "=" in word else "write key=value"
            problems.append(ConfigError(f"not an override: {str(error).splitlines()[0]}", got=word, fix=fix))
    return parsed, problems


def _check(override: Any, groups: dict[str, list[str]]) -> ConfigError | None:
    from hydra.core.override_parser.types import Glob

    key, written = override.key_or_group, override.input_line
    if key.split(".")[0].split("/")[0] == "hydra":
        return None
    if key in groups and override.package is None:
        if override.is_delete():
            fix = f"choose another option: {key}=..."
            return ConfigError("a group of the configuration cannot be removed", got=written, fix=fix)
        value = override.value()
        if isinstance(value, Glob):
            return None
        for choice in [str(item) for item in getattr(value, "list", [value])]:
            # Only this group may be left empty.
            if choice not in groups[key] and not (key == "experiment" and choice in ("None", "null")):
                return ConfigError(
                    f"there is no {key} '{choice}'",
                    got=written,
                    allowed=", ".join(groups[key]),
                    fix=_hint(choice, groups[key]),
                )
        return None
    known = _schema_keys(RunConfig)
    if key in known or any(key.startswith(f"{parent}.") for parent, free in known.items() if free):
        if override.is_delete():
            return ConfigError(
                "a key of the configuration cannot be removed", got=written, fix=f"give it a value: {key}=..."
            )
        return None
    parent = key.rpartition(".")[0]
    beside = [name for name in known if name.rpartition(".")[0] == (parent if parent in known else "")]
    what, allowed = f"there is no key '{key}'", ", ".join(beside)
    return ConfigError(what, got=written, allowed=allowed, fix=_hint(key, [*known, *groups]))


def _schema_keys(cls: type[Any], prefix: str = "") -> dict[str, bool]:
    """Dotted keys of the schema -> whether any key may follow below (a free mapping)."""
    keys: dict[str, bool] = {}
    for name, hint in typing.get_type_hints(cls).items():
        keys[prefix + name] = typing.get_origin(hint) is dict
        if dataclasses.is_dataclass(hint):
            keys |= _schema_keys(typing.cast(type, hint), f"{prefix}{name}.")
    return keys


def _hint(word: str, known: Sequence[str]) -> str:
    # The right name in the wrong place, else a wrong name.
    close = [key for key in known if "." in key and key.split(".")[-1] == word.split(".")[-1]][:1]
    close = close or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "see python -m orchestrator train --cfg job"
