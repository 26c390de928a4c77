"""How long a run still lives that was asked to stop, as engine or cloud say, and what its last save makes of it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from orchestrator import stopping
from orchestrator.checkpoint.store_timeouts import wait_for_stores
from orchestrator.config.schema import LaunchConfig
from orchestrator.distributed.world import World
from orchestrator.hardware.preemption_notice import noticing
from orchestrator.runs.record import Record

if TYPE_CHECKING:
    from orchestrator.strategies.parallel_strategy import ParallelStrategy
    from orchestrator.training.job import Job

_NOTICE = "notice"  # key under which a process publishes that its host will be taken away
_STORE_SHARE = 0.4  # of the time that is left, for one operation of a store; the rest is for saving elsewhere


def noticed(launch: LaunchConfig, parallel: ParallelStrategy, world: World) -> contextlib.AbstractContextManager[None]:
    """Return a context within which one process of each host hears of it when the host will be taken away.

    Args:
        launch: of the configuration.
        parallel: the strategy, joined.
        world: this process among the job's.
    """
    stopping.allow(launch.grace_seconds)
    asked = launch.notices if world.local_rank == 0 else "none"
    # The process that keeps the record is told; the other hosts' deadline is the same, as all stop together.
    return noticing(asked, lambda notice: parallel.put(_NOTICE, f"{notice}, to process {parallel.rank}"))


def prepare_last_save(job: Job, record: Record) -> None:
    """Record a notice, and let the last save give up on a store while there is time to write to another place.

    Args:
        job: the job of this process.
        record: of the run.
    """
    if notice := job.parallel.get_now(_NOTICE):
        record.note(notice=notice)
    if (left := stopping.seconds_left()) is not None:
        limit = job.resolved.config.checkpoint.store_timeout_seconds
        wait_for_stores(max(1.0, min(limit, _STORE_SHARE * left)))


def note_time_left(job: Job, record: Record) -> None:
    """Record how much of the time that an engine leaves was left when the run was saved.

    Args:
        job: the job of this process.
        record: of the run.
    """
    if (left := stopping.seconds_left()) is None:
        return
    record.note(seconds_left=round(left, 3))
    if left < 0:
        job.say(f"warning: it was saved {-left:.0f} s later than allowed: launch.grace_seconds is too short for a save")
