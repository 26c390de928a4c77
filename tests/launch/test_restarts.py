"""Whether a run is started again: rules, on attempts that never were."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.launch_schema import LocalLaunch
from orchestrator.errors import DIVERGED, FAILED, INTERRUPTED, MISTAKE, TERMINATED
from orchestrator.launch.restarts import MAX_BACKOFF_SECONDS, GivenUp, Restart, decide, failures_in_a_row
from orchestrator.runs.attempts import Attempt

SETTINGS = LocalLaunch(max_restarts=3, backoff_seconds=1.0)
KILLED = Attempt(0, 0.0, 1.0, FAILED, "killed", "it was killed", "SIGKILL", outside=True)
RAISED = Attempt(0, 0.0, 1.0, FAILED, "failed", "KeyError: 7", "KeyError at mine.py:3")


def _with(attempt: Attempt, start: int, step: int | None, saved: int | None) -> Attempt:
    return replace(attempt, start_step=start, step=step, saved=saved)


@pytest.mark.parametrize("code", [0, MISTAKE, DIVERGED, INTERRUPTED, TERMINATED])
def test_only_what_may_be_tried_again_is(code):
    assert decide([replace(KILLED, code=code)], SETTINGS) == GivenUp()


def test_no_restart_where_none_is_wanted():
    assert decide([KILLED], LocalLaunch(max_restarts=0)) == GivenUp()


def test_the_wait_is_doubled_up_to_a_minute_and_failures_without_a_checkpoint_are_counted():
    attempts = [_with(KILLED, 10, 12, 10)]
    delays = []
    for _ in range(9):
        decision = decide(attempts, LocalLaunch(max_restarts=9, backoff_seconds=1.0))
        assert isinstance(decision, Restart)
        delays.append(decision.delay_seconds)
        attempts.append(_with(KILLED, 10, 13, 10))
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert max(delays) == MAX_BACKOFF_SECONDS
    given_up = decide(attempts, LocalLaunch(max_restarts=9))
    assert isinstance(given_up, GivenUp)
    assert "failed 10 times in a row without a new checkpoint (launch.max_restarts=9)" in given_up.why


def test_a_checkpoint_of_a_later_step_begins_the_count_anew():
    attempts = [
        _with(KILLED, 0, 12, 10),
        _with(KILLED, 10, 11, 10),
        _with(KILLED, 10, 25, 20),
        _with(KILLED, 20, 21, 20),
    ]
    assert [failures_in_a_row(attempts[:end]) for end in range(1, 5)] == [1, 2, 1, 2]


def test_a_checkpoint_that_was_there_before_is_no_progress():
    assert failures_in_a_row([_with(KILLED, 10, 12, 10), _with(KILLED, 10, 12, 10)]) == 2
    # A damaged checkpoint was passed over, and its step is reached again: nothing new.
    assert failures_in_a_row([_with(KILLED, 0, 25, 20), _with(KILLED, 10, 25, 20)]) == 2


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=200), st.integers(1, 5))
def test_a_run_that_is_killed_for_ever_is_restarted_a_bounded_number_of_times_for_each_checkpoint(history, limit):
    attempts, best, since, restarts = [], 0, 0, 0
    for gained, saves in history:
        saved = best + gained if saves else best
        attempts.append(_with(KILLED, best, best + gained, saved or None))
        since = 0 if saved > best else since
        best = saved
        if not isinstance(decide(attempts, LocalLaunch(max_restarts=limit)), Restart):
            break
        since, restarts = since + 1, restarts + 1
        assert since <= limit


@pytest.mark.parametrize("start", [5, 0], ids=["from the same checkpoint", "from another one"])
def test_an_error_that_repeats_after_the_same_step_is_not_tried_a_third_time(start):
    first, second = _with(RAISED, 5, 7, 5), _with(RAISED, start, 7, 5)
    assert isinstance(decide([first], SETTINGS), Restart)
    given_up = decide([first, second], SETTINGS)
    assert isinstance(given_up, GivenUp)
    assert given_up.repeats == first
    assert "twice with the same error after step 7" in given_up.why


@pytest.mark.parametrize(
    "second",
    [
        _with(RAISED, 5, 8, 5),
        _with(replace(RAISED, error="KeyError at mine.py:4"), 5, 7, 5),
        _with(KILLED, 5, 7, 5),
    ],
    ids=["at another step", "another error", "killed"],
)
def test_another_failure_is_tried_again(second):
    assert isinstance(decide([_with(RAISED, 5, 7, 5), second], SETTINGS), Restart)


def test_a_kill_between_hides_no_error_that_repeats():
    attempts = [_with(RAISED, 5, 7, 5), _with(KILLED, 5, 6, 5), _with(RAISED, 5, 7, 5)]
    assert isinstance(decide(attempts, SETTINGS), GivenUp)


def test_kills_from_outside_at_the_same_step_are_no_error_of_the_run():
    attempts = [_with(KILLED, 5, 7, 5)] * 3
    assert isinstance(decide(attempts, SETTINGS), Restart)


def test_the_same_crash_at_the_same_step_is_one():
    crash = replace(KILLED, error="SIGSEGV", outside=False)
    assert isinstance(decide([_with(crash, 5, 7, 5)] * 2, SETTINGS), GivenUp)


@pytest.mark.parametrize(("errors", "goes_on"), [(("a", "b"), False), (("a",), True)])
def test_two_attempts_that_never_reach_their_first_step_are_enough(errors, goes_on):
    attempts = [_with(replace(RAISED, error=error), 5, 5, 5) for error in errors]
    decision = decide(attempts, SETTINGS)
    assert isinstance(decision, Restart) is goes_on
    assert goes_on or "before its first step" in getattr(decision, "why", "")


def test_kills_in_the_start_up_are_tried_again_as_others_are():
    attempts = [_with(KILLED, 5, step, 5) for step in (7, None, None)]
    assert isinstance(decide(attempts, SETTINGS), Restart)
    assert isinstance(decide([*attempts, _with(KILLED, 5, None, 5)], SETTINGS), GivenUp)


def test_every_sequence_of_failures_without_progress_ends():
    kinds = [_with(KILLED, 5, 7, 5), _with(RAISED, 5, 7, 5), _with(RAISED, 5, None, 5)]
    for sequence in itertools.product(kinds, repeat=4):
        assert not all(isinstance(decide(sequence[: end + 1], SETTINGS), Restart) for end in range(4))
