"""When the processes of a job hang: none of them has got on for as long as is allowed. No clock, no process: told both.

What counts as getting on:

- a step, a batch, a file or another piece of work is begun or completed (`distributed.standing`);
- in a phase that is one long piece (importing, restoring, compiling), where nothing of that kind happens for an hour,
  processor time. A compiler that works is never taken for hung, and one that waits for ever is. What waits for another
  process there is ended by the collective's own time-out.

A process whose signs of life cease, or that is suspended, hangs alone. The others then wait for it, so it is enough
that one of these is true for the time that is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.distributed.heartbeat import Beat
from orchestrator.distributed.standing import LONG_PHASES, STARTING

_BUSY = 0.02  # of a processor: what beats and waiting take is less
_SLOW_SECONDS, _SLOW_FACTOR = 10.0, 20.0


@dataclass
class _Seen:
    """What is known of one process: its last beat, when that and what it says of the work changed; whether it ended."""

    beat: Beat | None
    beat_at: float
    moved_at: float
    busy: float = 0.0
    over: bool = False


class HangWatch:
    """Watches the beats of the processes of a job.

    Args:
        size: number of processes.
        timeout_seconds: after which a job that does not get on hangs.
        now: the time, of whatever clock.
    """

    def __init__(self, size: int, timeout_seconds: float, now: float):
        self._timeout, self._size = timeout_seconds, size
        self._seen = [_Seen(None, now, now) for _ in range(size)]
        self._step, self._step_seconds, self._step_at, self._warned = 0, 0.0, now, False
        self.moved_at = now

    def see(self, rank: int, beat: Beat | None, busy: float | None, now: float) -> None:
        """Take note of a process.

        Args:
            rank: of the process.
            beat: its last sign of life; None: none could be read.
            busy: seconds of processor time that it has used; None: not looked at.
            now: the time.
        """
        seen = self._seen[rank]
        last, beat = seen.beat, beat or seen.beat
        if beat is not None and (last is None or beat.count != last.count):
            seen.beat_at = now
        moved = beat is not None and (last is None or _work(beat) != _work(last))
        if beat is not None and beat.step > self._step:  # of the first process that has completed it
            self._step_seconds = (now - self._step_at) / max(1, beat.step - self._step)
            self._step, self._step_at = beat.step, now
        if self.is_long(rank) and busy is not None:
            moved = moved or busy - seen.busy > _BUSY * max(1.0, now - seen.moved_at)
        if moved:
            seen.moved_at, self.moved_at = now, max(now, self.moved_at)
            seen.busy, self._warned = seen.busy if busy is None else busy, False
        seen.beat = beat

    def over(self, rank: int) -> None:
        """Take note that a process has ended: nobody waits for it.

        Args:
            rank: of the process.
        """
        self._seen[rank].over = True

    def is_long(self, rank: int) -> bool:
        """Whether processor time counts for a process.

        Args:
            rank: of the process.
        """
        beat = self._seen[rank].beat
        return (STARTING if beat is None else beat.phase) in LONG_PHASES

    def hung(self, now: float) -> list[int]:
        """Return the processes that the job waits for, if it hangs; else nothing.

        Args:
            now: the time.
        """
        silent = [
            rank for rank in self._there() if (seen := self._seen[rank]).beat and now - seen.beat_at > self._timeout
        ]
        if silent:
            return silent
        return self.behind(now) if now - self.moved_at > self._timeout else []

    def slow(self, now: float) -> list[int]:
        """Return the processes that the job has waited for unusually long: once, until it gets on again.

        Args:
            now: the time.
        """
        usual = max(_SLOW_SECONDS, _SLOW_FACTOR * self._step_seconds)
        training = all(seen.beat and seen.beat.step and not self.is_long(rank) for rank, seen in enumerate(self._seen))
        if self._warned or not training or self._size == 1 or now - self.moved_at < min(usual, self._timeout / 2):
            return []
        self._warned = True
        found = self.behind(now)
        return found if len(found) < self._size else []

    def behind(self, now: float) -> list[int]:
        """Return the processes that give no sign of life, else those that have done least; all where these are equal.

        Args:
            now: the time.
        """
        patience = min(5.0, self._timeout / 2)
        ranks = self._there()
        if silent := [rank for rank in ranks if now - self._seen[rank].beat_at > patience]:
            return silent
        least = min((_done(self._seen[rank].beat) for rank in ranks), default=(-1, -1))
        return [rank for rank in ranks if _done(self._seen[rank].beat) == least]

    def _there(self) -> list[int]:
        return [rank for rank, seen in enumerate(self._seen) if not seen.over]

    def waited(self, now: float) -> float:
        """Return for how long the job has not got on.

        Args:
            now: the time.
        """
        beats = (self._seen[rank].beat_at for rank in self._there() if self._seen[rank].beat)
        return now - min(self.moved_at, *beats, now)


def _work(beat: Beat) -> tuple[str, int, int]:
    return beat.phase, beat.step, beat.marks


def _done(beat: Beat | None) -> tuple[int, int]:
    return (beat.step, beat.marks) if beat is not None else (-1, -1)


def describe_place(beats: Sequence[Beat | None], rank: int) -> str:
    """Return where a process stood: `after step 7, in training`.

    Args:
        beats: of all processes.
        rank: of the process.
    """
    beat = beats[rank]
    if beat is None:
        return "before it had joined the others"
    return f"after step {beat.step}, in {beat.phase}" if beat.phase else f"after step {beat.step}"
