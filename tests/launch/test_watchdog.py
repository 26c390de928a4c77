"""Jobs of an engine: what one process finds out ends all of them, whatever their main threads wait for."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.distributed import standing
from orchestrator.distributed.coordinator import ProcessCoordinator
from orchestrator.distributed.world import World
from orchestrator.errors import DataError
from orchestrator.launch import missing_ranks, watchdog
from orchestrator.launch.missing_ranks import RankMonitor
from tests.lab.ranks import preload
from tests.launch.test_missing_ranks import _Parallel

SIZE, TIMEOUT = 3, 3.0
IN_ORDER = 17  # an exit code that the watchdog never gives


def _rank(world: World, what: str, folder: Path) -> None:
    missing_ranks.BEAT_SECONDS = watchdog.ROUND_SECONDS = 0.1
    watchdog._OWN_WAY_SECONDS, watchdog._LAST_SECONDS = 0.5, 0.5
    coordinator = ProcessCoordinator(world, timeout_seconds=60)
    coordinator.meet("gloo")
    monitor = RankMonitor(_Parallel(coordinator, world), TIMEOUT)
    try:
        with monitor.watched():
            monitor.keep_stacks_in(folder)
            standing.here.step = 40
            standing.reached(41)
            coordinator.barrier()
            time.sleep(0.5)
            if world.rank != 2:
                standing.mark()  # the next step has begun
                time.sleep(60)  # a collective that never returns
            _fail(what)
    except DataError:
        os._exit(2)
    time.sleep(1.0)  # rank 0, who keeps the store, is the last to go
    os._exit(IN_ORDER)


def _fail(what: str) -> None:
    if what == "fails":
        raise DataError("the file has gone")
    if what == "hangs":
        time.sleep(60)
    os.kill(os.getpid(), getattr(signal, what))


def _job(what: str, folder: Path) -> tuple[list[int | None], float]:
    """Exit codes, and how long it took from the fault to the last end."""
    preload()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        store = f"tcp:localhost:{free.getsockname()[1]}"
    context = multiprocessing.get_context("fork")
    worlds = [World(rank, SIZE, rank, SIZE, store, engine="test") for rank in range(SIZE)]
    processes = [context.Process(target=_rank, args=(world, what, folder)) for world in worlds]
    for process in processes:
        process.start()
    begin = time.monotonic()
    try:
        for process in processes:
            process.join(40)
        return [process.exitcode for process in processes], time.monotonic() - begin
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("what", "codes", "ending", "said"),
    [
        ("fails", [1, 1, 2], "failed", "ended with: DataError: the file has gone"),
        ("SIGKILL", [1, 1, -9], "killed", "after step 41, in training: is gone: it was killed"),
        ("SIGSTOP", [1, 1, -9], "suspended", "is suspended (SIGSTOP), after step 41, in training"),
        ("hangs", [1, 1, 1], "hung", "after step 41, in training: the job has not got on for"),
    ],
)
def test_all_processes_of_a_job_end_and_know_why(tmp_path, what, codes, ending, said):
    found, seconds = _job(what, tmp_path / "hang")
    assert found == codes
    assert seconds < TIMEOUT + 10
    ended = json.loads((tmp_path / "hang" / "ended.json").read_text())
    assert (ended["ending"], ended["rank"], ended["step"], ended["phase"]) == (ending, 2, 41, "training")
    assert said.replace("DataError: ", "") in ended["cause"].replace("DataError: ", "")
    assert not psutil.pid_exists(ended["pid"])
    stacks = (tmp_path / "hang" / "rank-1.txt").read_text()
    assert ended["cause"] in stacks
    assert "test_watchdog.py" in stacks, "where its main thread was"
