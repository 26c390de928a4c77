"""What processes decide together, on forked ranks that need no device: as every strategy has it."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from orchestrator.distributed.coordinator import ProcessCoordinator, coordinator_of
from orchestrator.distributed.world import World
from orchestrator.errors import HardwareError
from tests.lab.ranks import run_ranks


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def _met(world: World, store: str) -> ProcessCoordinator:
    coordinator = ProcessCoordinator(replace(world, store=store) if store else world, timeout_seconds=20)
    coordinator.meet("gloo")
    return coordinator


def _decide(world: World, store: str) -> dict:
    coordinator = _met(world, store)
    votes = [coordinator.start_vote(flag).result() for flag in (False, world.rank == 1, True)]
    agreed = [coordinator.broadcast(f"{word} of {world.rank}") for word in ("first", "second")]
    if world.rank == 0:
        threading.Thread(target=coordinator.put, args=("saved", "step 3")).start()
    deadline = time.monotonic() + 10
    while (seen := coordinator.get_now("saved")) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    absent = coordinator.get_now("never posted")
    coordinator.barrier()
    coordinator.leave()
    return {"votes": votes, "agreed": agreed, "seen": seen, "absent": absent}


@pytest.mark.parametrize("kind", ["file", "tcp"])
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_come_to_the_same_answers(kind, size):
    store = f"tcp:localhost:{_free_port()}" if kind == "tcp" else ""
    for answers in run_ranks(size, _decide, store):
        assert answers == {
            "votes": [False, True, True],
            "agreed": ["first of 0", "second of 0"],
            "seen": "step 3",
            "absent": None,
        }


def test_a_single_process_meets_nobody():
    coordinator = ProcessCoordinator(World(), timeout_seconds=1)
    assert [coordinator.start_vote(flag).result() for flag in (False, True)] == [False, True]
    assert coordinator.broadcast("mine") == "mine"
    coordinator.put("key", "text")
    assert (coordinator.get_now("key"), coordinator.get_now("other")) == ("text", None)
    coordinator.barrier()
    coordinator.leave()
    assert not dist.is_initialized()


def _again(world: World) -> list[bool]:
    """A strategy's coordinator, after somebody else has ended torch's process group."""
    first = coordinator_of(world, 60)
    first.meet("gloo")
    shared = coordinator_of(world, 60) is first
    dist.destroy_process_group()
    second = coordinator_of(world, 60)
    second.meet("gloo")
    return [shared, second is first, dist.is_initialized()]


def test_who_ended_the_process_group_is_not_taken_for_the_one_who_has_it():
    assert run_ranks(1, _again) == [[True, False, True]]


def _wait_for_the_vote(world: World) -> bool:
    coordinator = _met(world, "")
    vote = coordinator.start_vote(world.rank == 1) if world.rank == 0 else None
    coordinator.broadcast("")  # rank 0 has begun its vote and goes on
    answer = (vote or coordinator.start_vote(True)).result()
    coordinator.leave()
    return answer


def test_a_vote_waits_for_nobody_until_it_is_asked():
    assert run_ranks(2, _wait_for_the_vote) == [True, True]


def _see_ghost(world: World, store: str) -> str | None:
    coordinator = ProcessCoordinator(replace(world, attempt=1, store=store), timeout_seconds=20)
    if world.rank == 0:
        ghost = ProcessCoordinator(replace(world, rank=1, attempt=0, store=store), timeout_seconds=20)
        ghost.put("broadcast1", "of the last attempt")
    coordinator.meet("gloo")
    coordinator.barrier()
    seen = coordinator.get_now("broadcast1")
    coordinator.barrier()
    coordinator.leave()
    return seen


def test_a_restarted_job_does_not_meet_the_last_one():
    assert run_ranks(2, _see_ghost, f"tcp:localhost:{_free_port()}") == [None, None]


def _start(world: World, port: int, store_of_agents: bool) -> str:
    coordinator = ProcessCoordinator(
        replace(world, store=f"tcp:localhost:{port}", engine="torchrun", store_is_kept=store_of_agents), 20
    )
    if world.rank == 0:
        coordinator.put("said", f"by {id(coordinator)}")
    coordinator.meet("gloo")
    coordinator.barrier()
    seen = coordinator.get_now("said")
    coordinator.barrier()
    coordinator.leave()
    return seen


def test_starts_of_a_job_with_a_store_of_the_agents_do_not_meet_each_other():
    """The store has seen other starts, and no number that the agents have counted tells them apart."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store.set("start", "that of a job whose first process is gone")
    for _ in range(2):
        first, second = run_ranks(2, _start, store.port, True)
        assert first == second
        assert first.startswith("by ")


def test_where_the_engine_keeps_no_store_the_first_process_opens_it():
    first, second = run_ranks(2, _start, _free_port(), False)
    assert first == second is not None


def _miss(world: World, store: str) -> str:
    if world.rank == 1:
        return "stayed away"
    start = time.monotonic()
    with pytest.raises(HardwareError) as caught:
        ProcessCoordinator(replace(world, store=store), timeout_seconds=2).meet("gloo")
    assert time.monotonic() - start < 30
    return str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_does_not_come_is_waited_for_so_long(rank):
    """The first process holds the store; without it nobody answers at all."""
    port = _free_port()
    if rank == 0:
        said, _ = run_ranks(2, _miss, f"tcp:localhost:{port}")
    else:
        with pytest.raises(HardwareError) as caught:
            ProcessCoordinator(World(1, 2, store=f"tcp:localhost:{port}", engine="slurm"), timeout_seconds=2)
        said = str(caught.value)
    assert "the processes of the job did not meet" in said
    assert f"process {rank} of 2" in said
    assert f"at tcp:localhost:{port}" in said
    assert "within 2 s" in said
