"""Train from Python."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from orchestrator import stopping
from orchestrator.api.configs import Configuration, to_composed
from orchestrator.api.runs import Run
from orchestrator.config.compose import Composed
from orchestrator.errors import DIVERGED, DONE, INTERRUPTED, STOPPED, CheckpointError, RunFailedError
from orchestrator.hardware.target_table import find_world
from orchestrator.launch.start import Outcome, launch
from orchestrator.output import is_printed, printing
from orchestrator.runs import run_directory


def train(config: Configuration = (), *, config_dir: str | Path | None = None, verbose: bool = False) -> Run:
    """Train a model, and return when the run has ended.

    One process is started for each device of this machine, with this Python; nothing of a run stays in the calling
    process, and torch is not imported there. In a process that torchrun, Slurm or another engine has started, the run
    goes on in that process, together with the others, which call this function, too.

    SIGINT (Ctrl-C, or a notebook's stop button) and SIGTERM are taken over while the processes run, if this is the main
    thread: they save, and the run can be resumed. The handlers that were there before are put back.

    Args:
        config: of the run: overrides, what `compose` returned, or a `RunConfig`.
        config_dir: as for `compose`, where `config` is overrides.
        verbose: print what the command line prints; else it goes to the logger `orchestrator`.

    Returns:
        The run. Its `status` is `finished`; `interrupted`, if a signal stopped and saved it; or `diverged`, if its
        numbers were no longer finite.

    Raises:
        ConfigErrors: everything that is wrong with the configuration, before anything is started.
        UserError: what else is wrong with data, hardware, layout or checkpoint.
        RunFailedError: a process of the run was lost, or met a defect; its last lines are in the message.
        KeyboardInterrupt: SIGINT came before the first step: there is no run.
    """
    composed = to_composed(config, config_dir)
    with printing(verbose):
        return _conclude(_launch(composed))


def _launch(composed: Composed) -> Outcome:
    if find_world(composed.config.hardware, os.environ) is None:
        return launch(composed, captured=True)
    try:
        # The run is in this process: what it sets is put back.
        with stopping.listening(announce=is_printed()), warnings.catch_warnings():
            return launch(composed, captured=True)
    except stopping.Stopped as stop:
        return Outcome(stop.exit_code)


def _conclude(outcome: Outcome) -> Run:
    """Return the run, or raise what kept it from being one."""
    there = outcome.run_dir is not None and (outcome.run_dir / run_directory.CONFIG).is_file()
    if outcome.run_dir is not None and there and outcome.code in (DONE, DIVERGED, *STOPPED):
        return Run(outcome.run_dir.absolute())
    if outcome.code == DONE:
        raise CheckpointError(str(outcome.finished), fix="its run directory is not here: read its checkpoint")
    if outcome.code == INTERRUPTED:
        raise KeyboardInterrupt
    if outcome.code in STOPPED:
        raise RunFailedError("the run was stopped by SIGTERM before its first step", fix="start it again")
    if outcome.error is not None:
        raise outcome.error
    said = "\n".join(outcome.last_lines)
    raise RunFailedError(
        "; ".join(outcome.problems) or f"the processes of the run ended with exit code {outcome.code}",
        got=f"its last lines were\n{said}" if said else None,
        fix=f"resume={outcome.run_dir} goes on from its newest checkpoint" if there else "start it again",
    )
