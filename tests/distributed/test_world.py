"""Which process of a job this is, from the variables that each engine really sets."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.distributed.world import World, detect, first_host
from orchestrator.errors import HardwareError

TORCHRUN = {
    "LOCAL_RANK": "1",
    "RANK": "5",
    "GROUP_RANK": "1",
    "ROLE_RANK": "5",
    "ROLE_NAME": "default",
    "LOCAL_WORLD_SIZE": "4",
    "WORLD_SIZE": "8",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_WORLD_SIZE": "8",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29511",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_ERROR_FILE": "/tmp/torchelastic/error.json",
}
BATCH = {  # of a job script: the job's shape, and no step
    "SLURM_JOB_ID": "4711042",
    "SLURM_JOBID": "4711042",
    "SLURM_JOB_NODELIST": "gpu[03-05]",
    "SLURM_NODELIST": "gpu[03-05]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_NNODES": "3",
    "SLURM_NTASKS": "11",
    "SLURM_NPROCS": "11",
    "SLURM_TASKS_PER_NODE": "4(x2),3",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_CLUSTER_NAME": "hpc",
}
STEP = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_RESTART_COUNT": "1",
}
INTERACTIVE = {  # salloc with use_interactive_step: one process of a job of eleven tasks
    **STEP,
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEPID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NODELIST": "gpu03",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
OWN = World(3, 4, 3, 4, "file:/tmp/x/store", 1).environment()


def test_nobody_started_anything():
    assert detect({}) is None
    assert detect({"PATH": "/usr/bin", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "0"}) is None


worlds = st.integers(1, 64).flatmap(
    lambda size: st.builds(
        World,
        rank=st.integers(0, size - 1),
        size=st.just(size),
        local_rank=st.just(0),
        local_size=st.integers(1, size),
        store=st.sampled_from(["", "file:/tmp/a b/store", "tcp:10.0.0.1:29500"]),
        attempt=st.integers(0, 5),
        engine=st.just("orchestrator"),
    )
)


@given(worlds)
def test_our_own_environment_says_the_same_again(world):
    assert detect(world.environment()) == world


def test_torchrun():
    assert detect(TORCHRUN) == World(5, 8, 1, 4, "tcp:node-0:29511", 0, "torchrun", store_is_kept=True)
    assert detect(TORCHRUN).hosts == 2


def test_agents_that_have_counted_other_numbers_of_restarts_are_of_one_job():
    assert detect({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "0"}) == detect(TORCHRUN)


def test_without_a_store_of_the_agents_the_first_process_opens_one():
    for said in ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, {}):
        env = {key: value for key, value in TORCHRUN.items() if key != "TORCHELASTIC_USE_AGENT_STORE"}
        assert not detect({**env, **said}).store_is_kept


VARIABLES = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_the_variables_of_torch_distributed_without_torchrun():
    world = detect(VARIABLES)
    assert world == World(1, 2, 0, 1, "tcp:10.0.0.1:29500", 0, "the variables RANK, WORLD_SIZE and MASTER_ADDR")
    with pytest.raises(HardwareError, match=r"the environment of the variables RANK, .*\n.*MASTER_PORT is not set"):
        detect({key: value for key, value in VARIABLES.items() if key != "MASTER_PORT"})


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
INTEL_MPI = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


@pytest.mark.parametrize("env", [OPEN_MPI, INTEL_MPI], ids=["Open MPI", "Intel MPI"])
def test_mpirun(env):
    assert detect(env) == World(1, 4, 1, 4, "tcp:localhost:29500", 0, "mpirun")
    elsewhere = {"MASTER_ADDR": "n1", "MASTER_PORT": "3000"}
    assert detect({**env, **elsewhere}).store == "tcp:n1:3000"
    several_hosts = {key: "2" if value == "4" and "LOCAL" in key else value for key, value in env.items()}
    with pytest.raises(HardwareError, match="MASTER_ADDR is not set"):
        detect(several_hosts)
    assert detect({**several_hosts, **elsewhere}).hosts == 2


def test_a_slurm_step():
    world = detect(STEP)
    assert world == World(9, 11, 1, 3, f"tcp:gpu03:{20000 + 4711042 % 20000}", 1, "slurm")
    assert detect({**STEP, "SLURM_NODEID": "1", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"}).local_size == 4


def test_all_tasks_of_a_slurm_step_meet_at_one_place():
    tasks = [(0, 0, 4), (1, 4, 4), (2, 8, 3)]
    stores = {
        detect({**STEP, "SLURM_NODEID": str(n), "SLURM_PROCID": str(first + i), "SLURM_LOCALID": str(i)}).store
        for n, first, count in tasks
        for i in range(count)
    }
    assert len(stores) == 1


@pytest.mark.parametrize(
    "env",
    [
        BATCH,
        INTERACTIVE,
        {**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {k: v for k, v in BATCH.items() if k != "SLURM_NTASKS"},
    ],
    ids=["batch", "salloc", "one-task", "batch-without-ntasks"],
)
def test_where_slurm_has_started_one_process_we_start_our_own(env):
    assert detect(env) is None


def test_a_step_smaller_than_its_job():
    env = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    assert detect({**env, "SLURM_PROCID": "1"}).size == 2


def test_the_innermost_engine_counts():
    """Our launcher below torchrun, torchrun below srun."""
    assert detect({**STEP, **TORCHRUN, **OWN}).engine == "orchestrator"
    assert detect({**STEP, **TORCHRUN}).engine == "torchrun"
    assert detect({**STEP, **INTEL_MPI}).engine == "slurm"


@pytest.mark.parametrize("env", [OWN, TORCHRUN, STEP], ids=["own", "torchrun", "slurm"])
def test_what_is_missing_or_no_number_is_named(env):
    engine = detect(env).engine
    needed = {
        "orchestrator": [key for key in OWN if key != "ORCHESTRATOR_RANK"],
        "torchrun": ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"],
        "slurm": [
            "SLURM_JOB_ID",
            "SLURM_PROCID",
            "SLURM_LOCALID",
            "SLURM_NODEID",
            "SLURM_STEP_TASKS_PER_NODE",
        ],
    }[engine]
    for key in needed:
        with pytest.raises(HardwareError, match=f"the environment of {engine} is incomplete") as caught:
            detect({name: value for name, value in env.items() if name != key})
        assert key in str(caught.value)
        if not key.endswith(("ADDR", "STORE", "PORT")):
            with pytest.raises(HardwareError, match="do: "):
                detect({**env, key: "many"})


@pytest.mark.parametrize(
    "env",
    [
        {**TORCHRUN, "RANK": "8"},
        {**TORCHRUN, "RANK": "-1"},
        {**TORCHRUN, "WORLD_SIZE": "0"},
        {**TORCHRUN, "LOCAL_RANK": "4"},
        {**TORCHRUN, "LOCAL_WORLD_SIZE": "9"},
        {**OWN, "ORCHESTRATOR_RANK": "4"},
        {**STEP, "SLURM_PROCID": "11"},
        {**STEP, "SLURM_LOCALID": "3"},
        {**STEP, "SLURM_NODEID": "3"},
        {**STEP, "SLURM_STEP_NODELIST": ""},
        {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2"},
    ],
)
def test_numbers_that_contradict_each_other(env):
    with pytest.raises(HardwareError, match="contradicts itself"):
        detect(env)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu[03-07,9],x1", "gpu03"),
        ("gpu[3,5-6]", "gpu3"),
        ("login,gpu[1-2]", "login"),
        ("node[1-2]-ib", "node1-ib"),
        ("rack[0-1]node[00-15]", "rack0node00"),
        ("ip-10-0-0-[12,13]", "ip-10-0-0-12"),
        ("a100-[001-128].cluster.example", "a100-001.cluster.example"),
    ],
)
def test_the_first_host_of_a_list(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ",a", "gpu[", "gpu[]", "gpu[03-07", "[,]"])
def test_a_list_that_is_none(nodelist):
    with pytest.raises(ValueError, match=f"^{re.escape(nodelist)}$"):
        first_host(nodelist)
