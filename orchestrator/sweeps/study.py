"""The study of a sweep, kept in its folder: a killed sweep goes on from it, and several processes share it."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from filelock import FileLock, Timeout

from orchestrator.errors import ConfigError
from orchestrator.sweeps.pruners import PrunerSettings
from orchestrator.sweeps.space import Choices, Domain, domain_data
from orchestrator.sweeps.study_journal import STUDY, open_journal
from orchestrator.sweeps.sweep_record import JobStatus, SweepJob

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

SamplerName = Literal["tpe", "random", "grid"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
_MOST_OF_A_GRID = 10_000  # combinations
_STATUS, _RUN_DIR = "status", "run_dir"  # attributes of a trial


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep is. It is stored with the study, and a command that continues it must say the same.

    Attributes:
        space: what may be chosen of each key.
        fixed: the other words, sorted.
        objective: name of what is to become small or large.
        lower_is_better: small or large.
        sampler: how values are chosen: `tpe` learns from the trials so far, `random` does not, `grid` takes all.
        pruner: which runs are ended early.
        startup_trials: trials at first whose values are random also with `tpe`.
        seed: of the choice of values.
    """

    space: Mapping[str, Domain]
    fixed: tuple[str, ...]
    objective: str
    lower_is_better: bool
    sampler: str
    pruner: PrunerSettings
    startup_trials: int = 10
    seed: int = 0

    def data(self) -> dict[str, Any]:
        """Return what two commands of one sweep have in common, as JSON data."""
        space = {key: domain_data(domain) for key, domain in self.space.items()}
        return {"space": space, "fixed": list(self.fixed), "objective": self.objective}

    def sampler_for(self, number: int) -> BaseSampler:
        """Return the sampler of a trial: what it chooses is a function of the seed, the number and the trials before.

        Args:
            number: of the trial.
        """
        from optuna import samplers

        seed = zlib.crc32(f"{self.seed} {number}".encode())
        if self.sampler == "tpe":
            return samplers.TPESampler(n_startup_trials=self.startup_trials, seed=seed, constant_liar=True)
        return samplers.RandomSampler(seed=seed)


@dataclass(frozen=True)
class SweepTrial:
    """A trial that this process is to run.

    Attributes:
        number: of the trial, from 0.
        values: of the keys, as overrides have them.
        goes_on: it was begun before, by a process that is gone.
    """

    number: int
    values: Mapping[str, str] = field(default_factory=dict)
    goes_on: bool = False


class StoredStudy:
    """The study in a sweep's folder.

    Args:
        folder: of the sweep; it is made where there is none.
        plan: what the sweep is.

    Raises:
        MissingExtraError: Optuna is not installed.
        ConfigError: the folder holds another sweep, or cannot be written.
    """

    def __init__(self, folder: Path, plan: SweepPlan):
        from optuna import create_study

        self._folder, self._plan = folder, plan
        self._storage = open_journal(folder)
        (folder / "locks").mkdir(exist_ok=True)
        with self._alone():
            self._study = create_study(
                study_name=STUDY,
                storage=self._storage,
                direction="minimize" if plan.lower_is_better else "maximize",
                load_if_exists=True,
            )
            self._check()
            self._study.set_user_attr("pruner", vars(plan.pruner))
            if plan.sampler == "grid" and not self._study.trials:
                self._enqueue_all()
        self._id = self._storage.get_study_id_from_name(STUDY)

    @contextlib.contextmanager
    def claimed(self, most: int) -> Iterator[SweepTrial | None]:
        """Within it this process has the next trial, and no other one: one that nobody runs any more, or a new one.

        Args:
            most: trials of the sweep.

        Returns:
            None where there is none left.
        """
        with contextlib.ExitStack() as held:
            with self._alone():
                trial = self._abandoned(held) or self._next(most, held)
            yield trial

    def running_elsewhere(self) -> int:
        """Return how many trials other processes have."""
        with self._alone():
            count = 0
            for trial in self._running():
                with contextlib.ExitStack() as held:
                    count += not self._take(trial.number, held)
            return count

    def tell(self, trial: SweepTrial, status: JobStatus, objective: float | None, run_dir: str | None) -> None:
        """Store how a trial has ended.

        Args:
            trial: of this process.
            status: how it has ended.
            objective: that it has reached; None: none, it has failed. A pruned one has the last value it reported.
            run_dir: of its run.
        """
        from optuna.trial import TrialState

        number = self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
        self._storage.set_trial_user_attr(number, _RUN_DIR, run_dir)
        if status == "pruned":
            self._storage.set_trial_user_attr(number, _STATUS, status)
            self._study.tell(trial.number, state=TrialState.PRUNED)
        elif objective is None:
            self._storage.set_trial_user_attr(number, _STATUS, "failed")
            self._study.tell(trial.number, state=TrialState.FAIL)
        else:
            self._storage.set_trial_user_attr(number, _STATUS, status)
            self._study.tell(trial.number, objective)

    def jobs(self) -> list[SweepJob]:
        """Return all trials so far, those of other processes too."""
        from optuna.trial import TrialState

        found = []
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state is TrialState.WAITING:
                continue
            running = trial.state is TrialState.RUNNING
            status = "running" if running else str(trial.user_attrs.get(_STATUS, "failed"))
            known = status if status in get_args(JobStatus) else "failed"
            objective = None if running else trial.value
            run_dir = trial.user_attrs.get(_RUN_DIR)
            values = self._texts(trial)
            found.append(SweepJob(trial.number, values, known, objective, run_dir and str(run_dir)))  # type: ignore[arg-type]
        return found

    def _check(self) -> None:
        stored, wanted = self._study.user_attrs.get("plan"), self._plan.data()
        if stored is None and not self._study.get_trials(deepcopy=False):
            self._study.set_user_attr("plan", wanted)
        elif stored != wanted:
            stored = stored if isinstance(stored, dict) else {}
            differs = [f"{key}: {stored.get(key)} there, {value} here" for key, value in wanted.items()]
            differs = [text for key, text in zip(wanted, differs, strict=True) if stored.get(key) != wanted[key]]
            raise ConfigError(
                "the folder holds the study of another sweep",
                got=f"{self._folder}; {'; '.join(differs)}",
                fix="give the command that began it, or another hydra.sweeper.name",
            )

    def _enqueue_all(self) -> None:
        lists = [domain.values if isinstance(domain, Choices) else () for domain in self._plan.space.values()]
        for combination in itertools.product(*lists):
            self._study.enqueue_trial(dict(zip(self._plan.space, combination, strict=True)))

    @staticmethod
    def combinations(space: Mapping[str, Domain]) -> int:
        """Return how many trials a grid has.

        Args:
            space: what may be chosen of each key.

        Raises:
            ConfigError: it has no end, or too many.
        """
        count = 1
        for key, domain in space.items():
            if not isinstance(domain, Choices):
                raise ConfigError("a grid needs values to choose from", got=f"{key}: {domain}", fix=f"{key}=A,B,C")
            count *= len(domain.values)
        if count > _MOST_OF_A_GRID:
            raise ConfigError("the grid has too many combinations", got=f"{count:,}", allowed=f"{_MOST_OF_A_GRID:,}")
        return count

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time looks for a trial."""
        with FileLock(self._folder / "locks" / "claim.lock"):
            yield

    def _running(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _take(self, number: int, held: contextlib.ExitStack) -> bool:
        """Hold a trial for this process, as long as it lives; False where another one does."""
        lock = FileLock(self._folder / "locks" / f"{number}.lock")
        try:
            held.enter_context(lock.acquire(timeout=0))
        except Timeout:
            return False
        return True

    def _abandoned(self, held: contextlib.ExitStack) -> SweepTrial | None:
        for trial in self._running():
            if self._take(trial.number, held):
                return SweepTrial(trial.number, self._texts(trial), goes_on=True)
        return None

    def _next(self, most: int, held: contextlib.ExitStack) -> SweepTrial | None:
        from optuna.trial import TrialState

        trials = self._study.get_trials(deepcopy=False)
        begun = sum(trial.state is not TrialState.WAITING for trial in trials)
        if begun >= most:
            return None
        self._study.sampler = self._plan.sampler_for(begun)
        distributions = {key: domain.distribution() for key, domain in self._plan.space.items()}
        asked = self._study.ask(distributions)
        taken = self._take(asked.number, held)
        assert taken, "nobody else knows of the trial"
        return SweepTrial(asked.number, self._texts(self._study.get_trials(deepcopy=False)[asked.number]))

    def _texts(self, trial: FrozenTrial) -> dict[str, str]:
        return {
            key: self._plan.space[key].text(value) for key, value in trial.params.items() if key in self._plan.space
        }
