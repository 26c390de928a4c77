"""Which host of a job this is, as `launch` says it to Kubernetes, SkyPilot and Ray."""

from __future__ import annotations

import pytest

from orchestrator.distributed.job_host import job_host
from orchestrator.distributed.world import detect
from orchestrator.errors import HardwareError

GIVEN = {"ORCHESTRATOR_HOST": "1", "ORCHESTRATOR_HOSTS": "4", "ORCHESTRATOR_STORE": "tcp:job-host-0-0.job:29500"}


def test_every_process_of_the_job_has_a_place_of_its_own():
    worlds = []
    for number in range(4):
        host = job_host({**GIVEN, "ORCHESTRATOR_HOST": str(number), "ORCHESTRATOR_ATTEMPT": "2"})
        assert host is not None
        worlds += [detect(host.world(rank, 8).environment()) for rank in range(8)]
    assert [world.rank for world in worlds] == list(range(32))
    assert {(world.size, world.local_size, world.hosts, world.attempt, world.store) for world in worlds} == {
        (32, 8, 4, 2, "tcp:job-host-0-0.job:29500")
    }


def test_hosts_of_slices_are_counted_one_slice_after_the_other():
    sliced = {**GIVEN, "ORCHESTRATOR_SLICE": "1", "ORCHESTRATOR_SLICE_HOSTS": "2"}
    assert job_host(sliced).number == 3
    assert job_host({**sliced, "ORCHESTRATOR_SLICE": "0"}).number == 1


def test_a_job_of_one_host_is_started_as_any_other():
    assert job_host({}) is None
    assert job_host({"ORCHESTRATOR_HOST": "0", "ORCHESTRATOR_HOSTS": "1", "ORCHESTRATOR_STORE": ""}) is None
    assert job_host(dict.fromkeys(GIVEN, "")) is None, "a process that a host has started"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ORCHESTRATOR_HOST": "4"}, "host 4 of 4"),
        ({"ORCHESTRATOR_HOST": "x"}, "invalid literal"),
        ({"ORCHESTRATOR_STORE": "job-host-0-0.job"}, "ORCHESTRATOR_STORE="),
        ({"ORCHESTRATOR_ATTEMPT": "-1"}, "attempt -1"),
        ({"ORCHESTRATOR_SLICE": "1"}, "ORCHESTRATOR_SLICE_HOSTS is not set"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(wrong, said):
    with pytest.raises(HardwareError, match=said):
        job_host({**GIVEN, **wrong})
    incomplete = {name: value for name, value in GIVEN.items() if name != "ORCHESTRATOR_HOST"}
    with pytest.raises(HardwareError, match="ORCHESTRATOR_HOST is not set"):
        job_host(incomplete)
