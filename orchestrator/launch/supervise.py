"""Keep a run of this machine going: start its processes again from the newest checkpoint, as long as that helps.

One start of the processes is an attempt, and a leg of the run. All attempts are in the same run directory, under the
same lock. Between two of them everything is looked at anew that may have changed: the devices, and with them the
layout; the data has been prepared, and is not.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator import stopping
from orchestrator.checkpoint.memory_folder import snapshots_here
from orchestrator.checkpoint.run_checkpoints import committed, remove_uncommitted, step_of
from orchestrator.checkpoint.storage import AnyPath
from orchestrator.distributed.heartbeat import Beat
from orchestrator.distributed.local_processes import Ended, Supervision
from orchestrator.distributed.standing import COMPILING, LOADING, STARTING
from orchestrator.errors import (
    DIVERGED,
    DONE,
    FAILED,
    INTERRUPTED,
    STOPPED,
    TERMINATED,
    CheckpointError,
    RunDirectoryError,
    SaveError,
    UserError,
)
from orchestrator.hardware.target_table import device_count
from orchestrator.launch.failure_notes import Note
from orchestrator.launch.plan import Plan, newest_of, refreshed
from orchestrator.launch.restarts import GivenUp, Restart, decide
from orchestrator.output import tell
from orchestrator.runs import run_directory, time_book
from orchestrator.runs.attempts import HANGS, Attempt, Ending, read_attempts, write_attempts
from orchestrator.runs.messages import say, warn
from orchestrator.training.resolved import Resolved, write_resolved

_GRACE_SECONDS = 2.0  # of those that have lost another one, and will be started again
_POLL_SECONDS = 0.05
_ENDINGS: dict[int, Ending] = {
    DONE: "finished",
    DIVERGED: "diverged",
    INTERRUPTED: "interrupted",
    TERMINATED: "interrupted",
}


@dataclass(frozen=True)
class Finished:
    """How the processes of an attempt have ended.

    Attributes:
        ended: of the processes.
        notes: what they have left.
        last_lines: of what they have printed on standard error, if that was captured.
    """

    ended: Ended
    notes: Sequence[Note] = ()
    last_lines: tuple[str, ...] = ()


class Supervisor:
    """Starts a run until it has ended, or is not worth another start.

    Args:
        plan: the run.
        resolved: the same, decided, with its directory open and locked by the caller.
        start: starts the processes and waits for their end.
        resolve: decides anew, where the number of devices is another one.
    """

    def __init__(
        self,
        plan: Plan,
        resolved: Resolved,
        start: Callable[[Resolved, Supervision], Finished],
        resolve: Callable[[Plan, int], Resolved],
    ):
        self._plan, self._resolved, self._start, self._resolve = plan, resolved, start, resolve
        self._settings = plan.config.launch
        self._before = read_attempts(run_directory.read_run(self._run_dir))
        self._attempts: list[Attempt] = []
        self._noticed_at = 0.0

    @property
    def _run_dir(self) -> Path:
        return self._resolved.place.run_dir

    def run(self, announce: bool = True) -> Finished:
        """Start, and start again, until there is nothing more to be done. Says what has become of the run.

        Args:
            announce: acknowledge a request to stop on standard error.

        Raises:
            UserError: the run cannot go on: what there is now does not fit it.
        """
        with stopping.listening(announce=announce), stopping.deferred(watched=True):
            while True:
                finished = self._attempt()
                decision = GivenUp() if stopping.requested() else decide(self._attempts, self._settings)
                if isinstance(decision, GivenUp):
                    self._conclude(finished, decision)
                    return finished
                self._record("restarting", goes_on=True)
                self._announce(finished, decision)
                try:
                    if not self._back_off(decision.delay_seconds) or not self._go_on():
                        return self._stopped()
                except UserError:
                    self._record("failed", goes_on=False)
                    raise

    def _attempt(self) -> Finished:
        if self._attempts:
            time_book.note_start(self._run_dir)
        number, begun, start_step = len(self._before) + len(self._attempts), time.time(), self._start_step()
        recovery = _Recovery(self._attempts[-1] if self._attempts else None, self._noticed_at, start_step)
        supervision = Supervision(
            self._resolved.config.hardware.timeout_seconds,
            self._run_dir / HANGS / f"attempt-{number}",
            recovery.see,
            warn,
            number,
            _GRACE_SECONDS if self._settings.max_restarts else Supervision.grace_seconds,
        )
        finished = self._start(self._resolved, supervision)
        failure = finished.ended.failure
        self._noticed_at = failure.noticed_at if failure else time.monotonic()
        if self._attempts:
            self._attempts[-1] = recovery.filled_in(self._noticed_at)
        attempt = Attempt(number, begun, time.time(), finished.ended.code, "lost", start_step=recovery.start_step)
        self._attempts.append(self._described(attempt, finished))
        return finished

    def _start_step(self) -> int:
        resume_from = self._resolved.place.resume_from
        with contextlib.suppress(AssertionError):  # a checkpoint of the user's whose directory has a name of its own
            stored = step_of(resume_from) if resume_from is not None else 0
            memory = self._in_memory() if resume_from is None or self._resolved.takes_older else []
            return max([stored, *(step_of(path) for path in memory)])
        return self._plan.checkpoint.step if self._plan.checkpoint else 0

    def _described(self, attempt: Attempt, finished: Finished) -> Attempt:
        ended, failure, note = finished.ended, finished.ended.failure, next(iter(finished.notes), None)
        attempt = replace(attempt, ending=_ENDINGS.get(ended.code, "refused"), step=ended.step, saved=self._saved())
        if failure is None:
            return attempt
        attempt = replace(
            attempt,
            ending=failure.kind,
            cause="; ".join(ended.problems),
            rank=failure.rank,
            host=failure.host,
            pid=failure.pid,
            phase=failure.phase,
            outside=failure.outside,
            error=failure.signal or f"{failure.kind} in {failure.phase}",
            noticed_seconds=round(failure.noticed_seconds, 3),
            stacks=str(failure.stacks) if failure.stacks else None,
        )
        if failure.kind == "failed" and note is not None:
            rank = failure.rank if note.lost_peer else note.rank
            attempt = replace(
                attempt, cause=f"process {rank}: {note.kind}: {note.said}", error=note.identity, rank=rank
            )
            # Room comes back, and a store too, which no error of the run's own does.
            outside = note.lost_peer or isinstance(note.user_error(), (SaveError, RunDirectoryError))
            attempt = replace(attempt, outside=outside, stacks=self._keep_stack(attempt, note))
        return attempt

    def _keep_stack(self, attempt: Attempt, note: Note) -> str | None:
        folder = self._run_dir / HANGS / f"attempt-{attempt.attempt}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank-{note.rank}.txt").write_text(f"{attempt.cause}\n\n{note.stack}")
        except OSError:
            return None
        return str(folder)

    def _saved(self) -> int | None:
        """Return the step from which the run goes on: of storage, or of the memory of this host."""
        found = [step_of(path) for path in self._in_memory()]
        with contextlib.suppress(CheckpointError):
            found += [step_of(path) for path in committed(self._resolved.place.checkpoints)[:1]]
        return max(found, default=None)

    def _in_memory(self) -> list[AnyPath]:
        settings = self._resolved.config.checkpoint.memory
        run = run_directory.read_run(self._run_dir).get("id")
        return snapshots_here(settings.place, run)[:1] if settings.enabled else []

    def _record(self, status: str, goes_on: bool) -> None:
        run_directory.mark_ended(self._run_dir, "failed", self._attempts[-1].step)
        write_attempts(self._run_dir, [*self._before, *self._attempts], goes_on, status)

    def _announce(self, finished: Finished, restart: Restart) -> None:
        attempt = self._attempts[-1]
        for problem in finished.ended.problems if attempt.ending != "failed" else (attempt.cause,):
            warn(problem)
        saved = "from its beginning" if attempt.saved is None else f"from step {attempt.saved}"
        count = f"{restart.in_a_row} of {self._settings.max_restarts}"
        tell(f"restart    {count} in {restart.delay_seconds:g} s, {saved}; it had reached step {attempt.reached}")

    def _back_off(self, seconds: float) -> bool:
        """Wait. Returns whether nobody has asked to stop meanwhile."""
        self._attempts[-1] = replace(self._attempts[-1], backoff_seconds=seconds)
        deadline = time.monotonic() + seconds
        while not stopping.requested() and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(_POLL_SECONDS, left))
        return not stopping.requested()

    def _go_on(self) -> bool:
        """Find where the run goes on, and decide on what. Returns whether nobody has asked to stop meanwhile."""
        place = self._resolved.place
        while True:
            try:
                remove_uncommitted(place.checkpoints)
                newest = newest_of(self._plan, place)
                break
            except CheckpointError as error:  # a store that does not answer
                if isinstance(decision := self._failed_between(error), GivenUp):
                    raise
                tell(f"restart    in {decision.delay_seconds:g} s: {error.what}")
                if not self._back_off(decision.delay_seconds):
                    return False
        self._plan = plan = refreshed(self._plan, newest, self._resolved)
        devices = device_count(plan.config.hardware, plan.target, plan.target.probe())
        resolved = self._resolved
        if devices != resolved.devices:
            warn(f"there are {devices} devices now, and were {resolved.devices}: the layout is decided anew")
            resolved = self._resolve(plan, devices)
        paths = replace(place, resume_from=plan.resume_from)
        self._resolved = replace(resolved, paths=paths, takes_older=newest is not None or resolved.takes_older)
        with run_directory.writing(place.run_dir):
            write_resolved(place.run_dir, self._resolved)
        return not stopping.requested()

    def _failed_between(self, error: CheckpointError) -> Restart | GivenUp:
        now, number = time.time(), len(self._before) + len(self._attempts)
        about = Attempt(number, now, now, FAILED, "failed", error.what, type(error).__name__, True)
        last = self._attempts[-1]
        self._attempts.append(replace(about, start_step=last.reached, saved=last.saved))
        self._record("restarting", goes_on=True)
        return decide(self._attempts, self._settings)

    def _stopped(self) -> Finished:
        """Say that the run was asked to stop while none of its processes was there."""
        code = stopping.exit_code(stopping.requested())
        step = self._attempts[-1].step
        self._record("interrupted", goes_on=False)
        tell("stopped    while it waited for its restart: what is saved is its newest checkpoint")
        self._say_how_it_goes_on(step)
        return Finished(Ended(code, step=step))

    def _conclude(self, finished: Finished, decision: GivenUp) -> None:
        """Say for processes that were killed what has become of the run, and how it goes on."""
        ended = finished.ended
        if ended.code in STOPPED and "status" not in run_directory.read_run(self._run_dir):
            tell("stopped    before the first step: there is nothing to save")
        elif ended.code == FAILED or ended.problems:
            for problem in ended.problems:
                if ended.code in STOPPED:
                    tell(f"stopped    {problem}")
                else:
                    tell(problem, level=logging.ERROR)
            if decision.why:
                tell(self._diagnosis(finished, decision), level=logging.ERROR)
            self._say_how_it_goes_on(ended.step)
        if ended.code:
            run_directory.mark_ended(self._run_dir, "interrupted" if ended.code in STOPPED else "failed", ended.step)
        attempts = [*self._before, *self._attempts]
        if len(attempts) > 1 or ended.code == FAILED:
            write_attempts(self._run_dir, attempts, False, "failed" if ended.code == FAILED else None)
        if len(self._attempts) > 1:
            lost = sum(attempt.lost_seconds or 0.0 for attempt in self._attempts)
            where = self._run_dir / run_directory.RUN
            say(f"restarts   {len(self._attempts) - 1}, {lost:.0f} s lost in all; {where} says of what")

    def _say_how_it_goes_on(self, step: int | None) -> None:
        try:
            newest = committed(self._resolved.place.checkpoints)
        except CheckpointError as error:  # a store that has gone; the exit code is that of the run
            tell(f"checkpoint unknown: {error.what}")
            return
        tell(f"checkpoint {newest[0] if newest else 'none was saved: the run begins again'}")
        if newest:
            tell(f"continue   python -m orchestrator train resume={self._run_dir}")

    def _diagnosis(self, finished: Finished, decision: GivenUp) -> str:
        """Return why the run is not started again, and where to look."""
        last, train = self._attempts[-1], self._resolved.config.train
        note = next(iter(finished.notes), None)
        sequences = train.global_batch_tokens // train.seq_len
        first = last.reached * sequences
        lines = [f"the run is not started again: {decision.why}", f"  what:    {last.cause or last.error}"]
        if note is not None and note.place:
            lines.append(f"  where:   {note.place}")
        lines.append(
            f"  step:    {last.reached + 1}, on sequences {first} to {first + sequences - 1} in the order of the data"
        )
        if decision.repeats is not None:
            starts = sorted({decision.repeats.start_step, last.start_step})
            lines.append(f"  began:   after step {' and after step '.join(map(str, starts))}")
        if last.stacks:
            lines.append(f"  stacks:  {last.stacks}")
        advice = "look at that code and that data" if decision.repeats else "look at the lines above"
        lines.append(f"  do:      {advice}, and go on with resume=; launch.max_restarts=0 ends at the first failure")
        return "\n".join(lines)


class _Recovery:
    """When a run has made good what it lost in an attempt that failed."""

    def __init__(self, failed: Attempt | None, noticed_at: float, start_step: int):
        self._failed, self._noticed_at, self.start_step = failed, noticed_at, start_step
        self._down: float | None = None
        self._lost: float | None = None

    def see(self, beats: Sequence[Beat | None]) -> None:
        """Take note of what the processes say of themselves."""
        there = [beat for beat in beats if beat]
        if restored := [beat.step for beat in there if beat.phase == COMPILING]:
            self.start_step = restored[0]  # where the memory of the hosts has held a later one than storage
        step = max((beat.step for beat in there), default=0)
        if self._failed is None or step <= self.start_step or any(beat.phase in (STARTING, LOADING) for beat in there):
            return
        passed = time.monotonic() - self._noticed_at
        self._down = passed if self._down is None else self._down
        if self._lost is None and step >= self._failed.reached:
            self._lost = passed

    def filled_in(self, now: float) -> Attempt:
        """Return the failed attempt, with what it has cost."""
        assert self._failed is not None
        passed = now - self._noticed_at
        down = passed if self._down is None else self._down
        lost = passed if self._lost is None else self._lost
        return replace(self._failed, down_seconds=round(down, 3), lost_seconds=round(lost, 3))
