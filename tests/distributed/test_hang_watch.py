"""When a job hangs, and who is to blame: beats that never were, at times that never passed."""

from __future__ import annotations

from orchestrator.distributed.hang_watch import HangWatch
from orchestrator.distributed.heartbeat import Beat


class _Job:
    """Two processes and a watch over them, told of every second."""

    def __init__(self, timeout: float = 60.0, size: int = 2):
        self.watch, self.now, self.size = HangWatch(size, timeout, 0.0), 0.0, size
        self.beats: list[Beat | None] = [None] * size
        self.busy = [0.0] * size

    def second(self, *ranks: int, step: int | None = None, phase: str = "training", marks: int | None = None, busy=0.0):
        """A second passes in which the processes `ranks` give a sign of life."""
        self.now += 1.0
        for rank in range(self.size):
            last = self.beats[rank]
            if rank in ranks:
                count, before = (last.count + 1, last) if last else (1, Beat(0, "h", rank, 0))
                self.beats[rank] = Beat(
                    before.step if step is None else step,
                    "h",
                    rank,
                    count,
                    phase,
                    before.marks if marks is None else marks,
                )
                self.busy[rank] += busy
            looked = self.busy[rank] if self.watch.is_long(rank) else None
            self.watch.see(rank, self.beats[rank], looked, self.now)
        return self.watch.hung(self.now)


def test_steps_and_batches_keep_a_job_alive():
    job = _Job()
    for step in range(200):
        assert not job.second(0, 1, step=step)
    for marks in range(200):
        assert not job.second(0, 1, phase="evaluating", marks=marks)


def test_a_job_that_does_not_get_on_hangs_after_the_time_out_and_who_has_done_least_is_named():
    job = _Job()
    job.second(0, 1, step=8, marks=16)
    job.second(0, step=8, marks=17)  # it has begun the next step, and waits there
    seconds = 0
    while not (hung := job.second(0, 1)):
        seconds += 1
    assert hung == [1]
    assert 59 <= seconds <= 61


def test_where_all_have_done_the_same_all_are_named():
    job = _Job()
    job.second(0, 1, step=8, marks=16)
    while not (hung := job.second(0, 1)):
        pass
    assert hung == [0, 1]


def test_a_process_without_signs_of_life_is_named_whatever_it_has_done():
    job = _Job()
    job.second(0, 1, step=8, marks=16)
    job.second(1, step=9, marks=18)
    while not (hung := job.second(0)):
        pass
    assert hung == [1]


def test_a_compiler_at_work_is_never_hung():
    job = _Job()
    for _ in range(3600):
        assert not job.second(0, 1, phase="compiling", busy=0.5)


def test_a_compilation_that_waits_for_ever_is():
    """The signs of life and the watch take some processor time, too."""
    job = _Job()
    job.second(0, 1, phase="compiling", busy=5.0)
    seconds = 0
    while not job.second(0, 1, phase="compiling", busy=0.005):
        seconds += 1
    assert seconds <= 62


def test_processor_time_is_no_progress_where_steps_are():
    """What waits for a device or for another process may spin."""
    job = _Job()
    job.second(0, 1, step=8)
    seconds = 0
    while not job.second(0, 1, busy=1.0):
        seconds += 1
    assert seconds <= 61


def test_a_process_that_is_stopped_while_the_other_compiles_is_found():
    job = _Job()
    job.second(0, 1, phase="compiling", busy=1.0)
    seconds = 0
    while not (hung := job.second(0, phase="compiling", busy=1.0)):
        seconds += 1
    assert hung == [1]
    assert seconds <= 61


def test_imports_count_before_there_is_a_sign_of_life():
    job = _Job(timeout=5.0)
    for _ in range(30):
        job.busy = [busy + 0.9 for busy in job.busy]
        assert not job.second()
    seconds = 0
    while not job.second():
        seconds += 1
    assert seconds <= 6


def test_a_process_that_has_ended_is_waited_for_no_more():
    job = _Job(timeout=5.0)
    job.second(0, 1, step=8, phase="ending")
    job.watch.over(1)
    for marks in range(30):
        assert not job.second(0, phase="evaluating", marks=marks)


def test_a_slow_process_is_named_once_per_wait_and_not_ended():
    job = _Job(timeout=600.0)
    marks = 0
    for step in range(1, 20):
        marks += 1
        job.second(0, 1, step=step, marks=marks)
    job.second(0, step=19, marks=marks + 1)
    said = []
    for _ in range(100):
        assert not job.second(0, 1)
        said.append(job.watch.slow(job.now))
    assert [found for found in said if found] == [[1]]
    assert 15 <= said.index([1]) <= 25, "twenty times what a step takes"
    for rest in range(5):
        job.second(0, 1, step=20 + rest, marks=marks + 5 + rest)
        assert not job.watch.slow(job.now)
