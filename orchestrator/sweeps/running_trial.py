"""What a run knows of the sweep that it belongs to: it reports its values, and asks whether to go on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from orchestrator.sweeps.pruners import PrunerSettings
from orchestrator.sweeps.study_journal import STUDY, open_journal

VARIABLE = "ORCHESTRATOR_TRIAL"
"""FOLDER:NUMBER of the trial that the processes of a run are; set by the sweeper alone."""


def is_trial(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process's run belongs to a sweep that ends runs early.

    Args:
        environ: environment of the process.
    """
    return VARIABLE in environ


class RunningTrial:
    """The trial of a run.

    Args:
        folder: of the sweep.
        number: of the trial.
    """

    def __init__(self, folder: Path, number: int):
        from optuna.study import load_study

        self._storage = open_journal(folder)
        self._study = load_study(study_name=STUDY, storage=self._storage)
        self._pruner = PrunerSettings.of(self._study.user_attrs.get("pruner")).make()
        study_id = self._storage.get_study_id_from_name(STUDY)
        self._id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> RunningTrial:
        """Return the trial of this process's run.

        Args:
            environ: environment of the process.
        """
        folder, _, number = environ[VARIABLE].rpartition(":")
        return cls(Path(folder), int(number))

    def report(self, step: int, value: float) -> bool:
        """Store a value, and return whether the run is to end here.

        Args:
            step: optimizer steps completed.
            value: of the objective, there. A step that comes again, after a resume, keeps its first one.
        """
        if step not in self._storage.get_trial(self._id).intermediate_values:
            self._storage.set_trial_intermediate_value(self._id, step, value)
        return bool(self._pruner.prune(self._study, self._storage.get_trial(self._id)))
