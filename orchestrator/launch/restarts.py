"""Whether a run that has failed is started again, when, and why not: a function of how its attempts have ended.

The count of `launch.max_restarts` begins anew only with a checkpoint of a later step than any before. So a run that
fails for ever is restarted at most `max_restarts` times for each checkpoint that it may ever write, and a run that
makes progress is never given up, however often it is killed: no further limit is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.schema import LaunchConfig
from orchestrator.errors import FAILED
from orchestrator.runs.attempts import Attempt

MAX_BACKOFF_SECONDS = 60.0


@dataclass(frozen=True)
class Restart:
    """The run is started again.

    Attributes:
        delay_seconds: from now.
        in_a_row: failures without a new checkpoint between them, this one included.
    """

    delay_seconds: float
    in_a_row: int


@dataclass(frozen=True)
class GivenUp:
    """The run is not started again.

    Attributes:
        why: in a line; empty where nothing was to be tried.
        repeats: an earlier attempt that ended in the same way.
    """

    why: str = ""
    repeats: Attempt | None = None


def decide(attempts: Sequence[Attempt], settings: LaunchConfig) -> Restart | GivenUp:
    """Decide on a run whose last attempt has ended.

    Args:
        attempts: of this start of the launcher, the last one last.
        settings: `launch` of the configuration.
    """
    last = attempts[-1]
    if last.code != FAILED or not settings.max_restarts:
        return GivenUp()
    if earlier := _like(attempts):
        return GivenUp(f"it has failed twice with the same error after step {last.reached}", earlier)
    if len(attempts) > 1 and not any(one.began or one.outside for one in attempts[-2:]):
        return GivenUp("twice in a row it has failed before its first step", attempts[-2])
    count = failures_in_a_row(attempts)
    if count > settings.max_restarts:
        limit = f"launch.max_restarts={settings.max_restarts}"
        return GivenUp(f"it has failed {count} times in a row without a new checkpoint ({limit})")
    return Restart(min(MAX_BACKOFF_SECONDS, settings.backoff_seconds * 2.0 ** min(count - 1, 30)), count)


def failures_in_a_row(attempts: Sequence[Attempt]) -> int:
    """Return how many of the last attempts have ended without a new checkpoint between them.

    Args:
        attempts: all failed but the last one, which may have.
    """
    best, count = -1, 0
    for attempt in attempts:
        saved = -1 if attempt.saved is None else attempt.saved
        # What the first one found when it began is not its own.
        count = 1 if saved > max(best, attempt.start_step) else count + 1
        best = max(best, saved)
    return count


def _like(attempts: Sequence[Attempt]) -> Attempt | None:
    """Return an earlier attempt that has ended as the last one did, by a cause of the run's own."""
    last = attempts[-1]
    if last.error is None or last.outside:
        return None
    for earlier in attempts[:-1]:
        if not earlier.outside and (earlier.error, earlier.reached) == (last.error, last.reached):
            return earlier
    return None
