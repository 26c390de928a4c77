"""Hydra's sweeper `optuna`: values chosen by what earlier runs reached, on Optuna as it is today.

The one that Hydra offers needs an Optuna before 3, ends no run early and forgets the run that a kill interrupts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, TaskFunction

from orchestrator.config.sweep import StoredSweep, Sweep
from orchestrator.config.words import parse_words
from orchestrator.errors import ConfigError, ConfigErrors
from orchestrator.sweeps.pruners import PRUNERS, PrunerSettings
from orchestrator.sweeps.running_trial import VARIABLE
from orchestrator.sweeps.space import Between, Choices, Domain, domain_data
from orchestrator.sweeps.study import SAMPLERS, StoredStudy, SweepPlan, SweepTrial
from orchestrator.sweeps.sweep_record import FOLDER

_LARGER_IS_BETTER = ("tokens_per_second",)
_BY_VALIDATION = ("val_loss", "best_val_loss")  # objectives that the evaluations of a run tell of
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
_OF_THE_SWEEP = ("run_id", "resume")  # that each run gets from here


@dataclass(frozen=True)
class SweeperSettings:
    """Keys of `hydra.sweeper`; conf/hydra/sweeper/optuna.yaml says what they mean."""

    n_trials: int = 20
    sampler: str = "tpe"
    pruner: str = "median"
    startup_trials: int = 5
    warmup_steps: int = 0
    max_failures: int = 3
    seed: int = 0
    name: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> SweeperSettings:
        """Check what the user has set.

        Args:
            data: keys of `hydra.sweeper`.

        Raises:
            ConfigErrors: values that do not fit.
        """
        problems: list[ConfigError] = []
        least = {"n_trials": 1, "startup_trials": 0, "warmup_steps": 0, "max_failures": 1, "seed": 0}
        for key, lowest in least.items():
            value = data.get(key, lowest)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                allowed = f"a whole number from {lowest} on"
                problems.append(ConfigError(f"hydra.sweeper.{key} is out of range", got=value, allowed=allowed))
        for key, names in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if data.get(key, names[0]) not in names:
                got, allowed = data[key], ", ".join(names)
                problems.append(ConfigError(f"there is no hydra.sweeper.{key} of this name", got=got, allowed=allowed))
        if not isinstance(data.get("params") or {}, Mapping):
            what = "hydra.sweeper.params is no mapping"
            problems.append(ConfigError(what, got=data["params"], allowed="KEY: 'interval(LOW, HIGH)' and the like"))
        name = data.get("name")
        if name is not None and not _NAME.fullmatch(str(name)):
            what = "hydra.sweeper.name does not fit a folder"
            problems.append(ConfigError(what, got=ascii(name)[:100], allowed="letters, digits, and . _ - between them"))
        if problems:
            raise ConfigErrors(problems)
        return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})


class TrialSweeper:
    """Runs trial after trial. One that was interrupted goes on from its checkpoint, before a new one is begun.

    Args:
        settings: keys of `hydra.sweeper`.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self._given = settings

    def setup(self, hydra_context: HydraContext, task_function: TaskFunction, config: Any) -> None:
        """Take what Hydra gives a sweeper.

        Args:
            hydra_context: of its launcher.
            task_function: runs a job.
            config: the configuration without what is swept.
        """
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        HydraConfig.instance().set_config(config)  # that the configuration's name may be read from its choices
        self._config = config
        self._sweep: Sweep = task_function.sweep  # type: ignore[attr-defined]

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that are left of the sweep.

        Args:
            arguments: overrides, some of which leave a choice.

        Raises:
            ConfigErrors: what is wrong with them, or with the settings.
            ConfigError: too many runs have failed one after the other.
        """
        settings = SweeperSettings.of(self._given)
        given = [word.partition("=")[0].lstrip("+") for word in arguments]
        more = [f"{key}={value}" for key, value in settings.params.items() if key not in given]
        space, fixed = _space_of([*more, *arguments])
        plan = self._plan(settings, space, fixed)
        most = StoredStudy.combinations(space) if settings.sampler == "grid" else settings.n_trials
        name = settings.name or _name_of(str(self._config.name), plan)
        folder = Path(str(self._config.runs_dir)) / FOLDER / name
        study = StoredStudy(folder, plan)
        self._sweep.stored = StoredSweep(folder, plan.data()["space"], most, study.jobs)
        self._sweep.refresh()
        failures = 0
        while failures < settings.max_failures:
            with study.claimed(most) as trial:
                if trial is None:
                    break
                failures = 0 if self._run(study, trial, name, folder, plan) else failures + 1
        else:
            raise ConfigError(
                f"{failures} runs of the sweep have failed one after the other",
                got=folder,
                fix="see above why; the same command goes on with others, and hydra.sweeper.max_failures allows more",
            )
        if others := study.running_elsewhere():
            print(f"sweep      {others} of its runs are still running in other processes", flush=True)

    def _plan(self, settings: SweeperSettings, space: Mapping[str, Domain], fixed: Sequence[str]) -> SweepPlan:
        train, objective = self._config.train, str(self._config.train.objective)
        if settings.pruner != "none" and objective not in _BY_VALIDATION:
            raise ConfigError(
                "runs are ended early by their validation loss, which is not the objective",
                got=f"hydra.sweeper.pruner={settings.pruner} with train.objective={objective}",
                fix=f"hydra.sweeper.pruner=none, or train.objective={' or '.join(_BY_VALIDATION)}",
            )
        if settings.pruner != "none" and train.eval_every is None:
            raise ConfigError(
                "runs are ended early by their validation loss, of which there is none before the end",
                got="train.eval_every=null",
                fix="set train.eval_every, or hydra.sweeper.pruner=none",
            )
        pruner = PrunerSettings(
            settings.pruner,
            settings.startup_trials,
            settings.warmup_steps,
            int(train.eval_every or 0),
            int(train.max_steps),
        )
        lower = objective not in _LARGER_IS_BETTER
        return SweepPlan(
            space, tuple(fixed), objective, lower, settings.sampler, pruner, settings.startup_trials, settings.seed
        )

    def _run(self, study: StoredStudy, trial: SweepTrial, name: str, folder: Path, plan: SweepPlan) -> bool:
        """Run a trial and store how it ended; a stop leaves it to be gone on with. Returns whether it has a result."""
        values = [f"{key}={value}" for key, value in trial.values.items()]
        words = [*plan.fixed, *values, f"run_id={name}", "resume=auto"]
        if plan.pruner.name != "none":
            os.environ[VARIABLE] = f"{folder.absolute()}:{trial.number}"
        try:
            self._launcher.launch([words], initial_job_idx=trial.number)
        finally:
            os.environ.pop(VARIABLE, None)
        ended = self._sweep.last
        study.tell(trial, ended.status, ended.objective, None if ended.run_dir is None else str(ended.run_dir))
        self._sweep.refresh()
        return ended.status in ("finished", "pruned", "diverged")


def _space_of(arguments: Sequence[str]) -> tuple[dict[str, Domain], list[str]]:
    """Return what the overrides leave open, by key, and the other overrides, sorted."""
    parsed, problems = parse_words(list(arguments))
    space: dict[str, Domain] = {}
    fixed = []
    for word, override in parsed:
        key = override.get_key_element()
        if key in _OF_THE_SWEEP:
            fix = "leave it out: the same command goes on with a sweep; hydra.sweeper.name names it"
            problems.append(ConfigError(f"a sweep gives each run its own {key}", got=word, fix=fix))
        elif not override.is_sweep_override():
            fixed.append(word)
        elif override.is_discrete_sweep():
            space[key] = Choices(tuple(override.sweep_string_iterator()))
        elif isinstance(interval := override.value(), IntervalSweep):
            try:
                space[key] = _interval(word, interval)
            except ConfigError as error:
                problems.append(error)
        else:
            problems.append(ConfigError("the sweeper does not know this kind of choice", got=word))
    if not space and not problems:
        fix = "KEY='interval(LOW,HIGH)', KEY='tag(log, interval(LOW,HIGH))' or KEY=A,B,C"
        problems.append(ConfigError("the sweep leaves nothing to choose", got=" ".join(arguments), fix=fix))
    if problems:
        raise ConfigErrors(problems)
    return space, sorted(fixed)


def _interval(word: str, interval: IntervalSweep) -> Between:
    low, high = interval.start, interval.end
    log, whole = "log" in interval.tags, isinstance(low, int) and isinstance(high, int)
    if low is None or high is None or not low < high or (log and low <= 0):
        allowed = "0 < LOW < HIGH" if log else "LOW < HIGH"
        raise ConfigError("the interval is none", got=word, allowed=allowed)
    return Between(float(low), float(high), log, whole)


def _name_of(config_name: str, plan: SweepPlan) -> str:
    space = {key: domain_data(domain) for key, domain in sorted(plan.space.items())}
    said = repr((space, plan.fixed, plan.objective, plan.sampler, plan.seed))
    return f"{config_name}-{hashlib.sha256(said.encode()).hexdigest()[:6]}"
