"""A replica group that was lost comes back into a run that others have gone on with."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.distributed.replica_group import in_group, rejoins
from orchestrator.observe.history import History
from orchestrator.runs.record import Record
from orchestrator.training.resolved import Resolved

if TYPE_CHECKING:
    from orchestrator.training.job import Job

_DIES_WITH_PARENT = 1  # Linux: prctl(PR_SET_PDEATHSIG)


def end_with_supervisor() -> None:
    """Let the kernel kill a group's rank with the group's supervisor: asked to stop, it would stop all groups."""
    if in_group(os.environ) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)


def from_newest(resolved: Resolved) -> Resolved:
    """Return the record with the run's newest checkpoint to begin from, if this process comes back into the run.

    The others give it their weights and optimizer state. From the checkpoint is what travels beside them.

    Args:
        resolved: the run.
    """
    place = resolved.place
    if not rejoins(os.environ) or not (found := committed(place.checkpoints)):
        return resolved
    return replace(resolved, paths=replace(place, resume_from=found[0]), takes_older=True)


def leg_under_way(facts: dict[str, Any]) -> dict[str, Any]:
    """Take the leg that others are in from `facts["legs"]` and return it; nothing where this process comes with all.

    Args:
        facts: of run.json.
    """
    if not rejoins(os.environ) or not facts["legs"]:
        return {}
    found: dict[str, Any] = facts["legs"].pop()
    return found


def catch_up(job: Job) -> bool:
    """Go on where the other copies of the model are. Returns False where they are concluding the run.

    Args:
        job: in front of its first step.
    """
    module = job.module
    step = job.parallel.catch_up(module.model, module.optimizer, module.step, _History(job.watchers.history))
    if step is None:
        module.step = module.config.train.max_steps
        return False
    if step != module.step:
        module.step = step
        job.loader.go_on_at(step)
    return True


def end(job: Job, record: Record, status: str, left_out: list[str]) -> None:
    """Record how the run has ended; where it has failed in this process alone others go on.

    Args:
        job: of this process.
        record: of the run.
        status: of the run, as this process sees it.
        left_out: what a resume may still do.
    """
    if status != "failed" or not job.parallel.replaceable:  # else others go on, or the launcher says that none does
        record.note(sources=job.watchers.sources.record(job.module.step))
        record.end(status, job.module.step, left_out)


class _History:
    """The rows of metrics that travel in checkpoints, for a group that may be the one that saves next."""

    def __init__(self, history: History):
        self._history = history

    def save(self) -> dict[str, Any]:
        return {"rows": self._history.rows()}

    def load(self, data: dict[str, Any]) -> None:
        self._history.replace(data["rows"])
