"""Who is missing: a rank that has gone, one that does not come, one that has failed and says why."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist

from orchestrator import stopping
from orchestrator.distributed import standing
from orchestrator.distributed.coordinator import ProcessCoordinator
from orchestrator.distributed.world import World
from orchestrator.errors import FAILED, DataError, LostPeerError
from orchestrator.launch import missing_ranks
from orchestrator.launch.missing_ranks import RankMonitor, is_lost_peer
from tests.lab.ranks import run_ranks


@dataclass
class _Parallel:
    """What `RankMonitor` needs of a strategy."""

    coordinator: ProcessCoordinator
    world: World

    def __getattr__(self, name: str) -> Any:
        if name in ("put", "get_now", "count", "beat", "beat_of"):
            return getattr(self.coordinator, name)
        return self._of(name)

    def _of(self, name: str) -> int:
        return {"rank": self.world.rank, "size": self.world.size}[name]


def _lose(world: World, what: str) -> str:
    missing_ranks.BEAT_SECONDS, missing_ranks._ROLL_CALL_SECONDS = 0.1, 1.5
    coordinator = ProcessCoordinator(world, timeout_seconds=3 if what == "hangs" else 30)
    coordinator.meet("gloo")
    watched = RankMonitor(_Parallel(coordinator, world))
    try:
        with watched.watched():
            standing.here.step = 40 + world.rank
            coordinator.barrier()
            time.sleep(0.3)
            if world.rank == 2:
                if what == "fails":
                    raise DataError("the file has gone")
                time.sleep(7 if what == "hangs" else 0)
                return "not there"
            dist.barrier()
    except LostPeerError as error:
        return f"{error}\nexit code {error.exit_code}"
    except DataError as error:
        return f"itself: {error}"
    raise AssertionError("a barrier was passed that rank 2 never came to")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("goes", "which gives no sign of life, last seen after step 42"),
        ("hangs", "which runs, but did not come, last seen after step 42"),
        ("fails", "which ended with: the file has gone"),
    ],
)
def test_the_process_that_is_missing_is_named(what, said):
    *others, own = run_ranks(3, _lose, what)
    speakers = [text for text in others if text.startswith("the job has lost process 2 (host ")]
    assert len(speakers) == 1, others
    assert said in speakers[0]
    assert all(text.endswith(f"exit code {FAILED}") for text in others)
    assert "process 0" not in speakers[0].splitlines()[0]
    assert "process 1" not in speakers[0].splitlines()[0]
    (other,) = [text for text in others if text not in speakers]
    assert "lost the others: " in other
    assert said in other
    assert not own.startswith("the job has lost")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]"), 1),
        (RuntimeError("[x/unbound_buffer.cc:81] Timed out waiting 15000ms for recv operation to complete"), 1),
        (dist.DistNetworkError("The client socket has timed out after 600000ms while trying to connect to (n1, 1)"), 1),
        (dist.DistStoreError("wait timeout after 20000ms, keys: /attempt0/agree1"), 1),
        (RuntimeError("[enforce fail at ...] op.preamble.length <= op.nbytes. 8 vs 4"), 0),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 0),
        (DataError("Connection closed by peer"), 0),
    ],
)
def test_errors_of_a_connection_are_told_from_defects(error, lost):
    assert is_lost_peer(error) is bool(lost)


def _stopped_in_the_roll_call(world: World) -> int:
    coordinator = ProcessCoordinator(world, timeout_seconds=30)
    coordinator.meet("gloo")
    try:
        with (
            stopping.listening(announce=False),
            stopping.deferred(),
            RankMonitor(_Parallel(coordinator, world)).watched(),
        ):
            coordinator.barrier()
            if world.rank == 1:
                return 0
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
            dist.barrier()
    except stopping.Stopped as stop:
        return stop.exit_code
    raise AssertionError("a barrier was passed that rank 1 never came to")


def test_who_is_ended_while_looking_for_others_has_failed_and_saved_nothing():
    assert run_ranks(2, _stopped_in_the_roll_call) == [FAILED, 0]
