"""Jobs over several hosts: who is who by a TPU machine's variables and metadata, and what a target makes of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from orchestrator.config.schema import HardwareConfig
from orchestrator.distributed.world import DEFAULT_PORT, World, tpu_world
from orchestrator.errors import HardwareError
from orchestrator.hardware import tpu_host
from orchestrator.hardware.target_table import check_started, find_world, get_target, job_devices, resolve
from tests.distributed.test_world import STEP, TORCHRUN
from tests.hardware.conftest import Machine
from tests.hardware.test_tpu import V5E, XLA_PACKAGES

TPU = HardwareConfig(target="tpu")
# As GKE sets them: names of pods in a headless service.
SLICE = {"TPU_WORKER_HOSTNAMES": "job-0-0.job,job-0-1.job,job-0-2.job", "TPU_WORKER_ID": "1"}
SLICES = {**SLICE, "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
SLICES["MEGASCALE_COORDINATOR_ADDRESS"] = "job-0-0.job:8080"


class TestVariables:
    def test_hosts_of_a_slice(self):
        assert tpu_world(SLICE) == World(1, 3, 0, 1, f"tcp:job-0-0.job:{DEFAULT_PORT}", 0, "tpu")

    def test_slices_follow_each_other(self):
        assert tpu_world(SLICES) == World(4, 6, 0, 1, f"tcp:job-0-0.job:{DEFAULT_PORT}", 0, "tpu")
        worlds = [
            tpu_world({**SLICES, "MEGASCALE_SLICE_ID": str(index), "TPU_WORKER_ID": str(worker)})
            for index in range(2)
            for worker in range(3)
        ]
        assert [world.rank for world in worlds] == list(range(6))
        assert len({world.store for world in worlds}) == 1

    def test_slices_of_one_host(self):
        alone = {**SLICES, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
        assert (tpu_world(alone).rank, tpu_world(alone).size) == (1, 2)
        del alone["TPU_WORKER_HOSTNAMES"], alone["TPU_WORKER_ID"]
        assert (tpu_world(alone).rank, tpu_world(alone).hosts) == (1, 2)

    def test_the_port_can_be_another(self):
        assert tpu_world({**SLICE, "MASTER_PORT": "4711"}).store == "tcp:job-0-0.job:4711"

    @pytest.mark.parametrize(
        "env",
        [
            {},
            {"TPU_WORKER_ID": "0"},
            {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
            {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"},
        ],
    )
    def test_a_single_host_starts_its_own_process(self, env):
        assert tpu_world(env) is None

    @pytest.mark.parametrize(
        "change",
        [
            {"TPU_WORKER_ID": None},
            {"TPU_WORKER_ID": "3"},
            {"TPU_WORKER_ID": "-1"},
            {"TPU_WORKER_ID": "first"},
            {"MASTER_PORT": "http"},
            {"MEGASCALE_NUM_SLICES": "0"},
            {"MEGASCALE_NUM_SLICES": "two"},
            {"MEGASCALE_SLICE_ID": "2"},
            {"MEGASCALE_SLICE_ID": None},
            {"MEGASCALE_COORDINATOR_ADDRESS": None},
            {"MEGASCALE_COORDINATOR_ADDRESS": ":8080"},
        ],
    )
    def test_what_contradicts_itself(self, change):
        env = {name: value for name, value in {**SLICES, **change}.items() if value is not None}
        with pytest.raises(HardwareError, match=r"TPU slice(.|\n)*got: (.|\n)*do: "):
            tpu_world(env)


@pytest.fixture
def v5e(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A complete host with four chips, and no metadata server."""
    machine.tpu(V5E, 4)
    machine.packages |= XLA_PACKAGES
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    return machine


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Attributes that a server of this machine's metadata tells."""
    attributes: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            prefix, _, name = self.path.rpartition("/")
            known = prefix == "/computeMetadata/v1/instance/attributes" and name in attributes
            self.send_response(200 if known and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *unused: object) -> None:
            pass

    with HTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
        yield attributes
        server.shutdown()


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


class TestTheMachineKnows:
    @pytest.mark.parametrize("config", [TPU, HardwareConfig()], ids=["tpu", "auto"])
    def test_gke_sets_variables(self, v5e: Machine, monkeypatch: pytest.MonkeyPatch, config: HardwareConfig):
        set_all(monkeypatch, SLICES)
        world = find_world(config, {})
        assert world == tpu_world(SLICES)
        target = resolve(config)
        assert job_devices(config, target, world) == 24
        assert target.slices() == 2

    def test_a_cloud_tpu_vm_has_metadata(self, v5e: Machine, metadata: dict[str, str]):
        metadata["worker-network-endpoints"] = "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"
        metadata["tpu-env"] = "ACCELERATOR_TYPE: 'v5litepod-8'\nWORKER_ID: '1'\nZONE: 'us-west4-a'\n"
        assert find_world(TPU, {}) == World(1, 2, 0, 1, f"tcp:10.0.0.2:{DEFAULT_PORT}", 0, "tpu")
        assert resolve(TPU).slices() == 1
        metadata["tpu-env"] += "MEGASCALE_COORDINATOR_ADDRESS: '10.0.9.1'\nMEGASCALE_NUM_SLICES: '2'\n"
        metadata["tpu-env"] += "MEGASCALE_SLICE_ID: '1'\n"
        assert find_world(TPU, {}) == World(3, 4, 0, 1, f"tcp:10.0.9.1:{DEFAULT_PORT}", 0, "tpu")

    def test_variables_win_over_metadata(self, v5e: Machine, metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch):
        metadata["worker-network-endpoints"] = "a:b:10.0.0.2,a:b:10.0.0.3"
        metadata["tpu-env"] = "WORKER_ID: '1'"
        set_all(monkeypatch, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})
        assert find_world(TPU, {}) is None

    def test_no_metadata_is_a_single_host(self, v5e: Machine, metadata: dict[str, str]):
        assert find_world(TPU, {}) is None
        assert tpu_host.variables() == {}

    def test_nobody_listens(self, v5e: Machine, metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("GCE_METADATA_IP", "localhost:1")
        assert find_world(TPU, {}) is None

    @pytest.mark.parametrize(
        "config",
        [
            HardwareConfig(target="tpu", simulate=4),
            HardwareConfig(target="cpu"),
            HardwareConfig(target="tpu", runtime="torch_tpu"),
        ],
        ids=["simulated", "cpu", "torch_tpu"],
    )
    def test_who_does_not_drive_the_chips_is_not_disturbed(
        self, v5e: Machine, monkeypatch: pytest.MonkeyPatch, config: HardwareConfig
    ):
        set_all(monkeypatch, SLICES)
        assert find_world(config, {}) is None

    def test_without_chips_or_the_runtime(self, machine: Machine, monkeypatch: pytest.MonkeyPatch):
        set_all(monkeypatch, SLICES)
        assert find_world(TPU, {}) is None
        machine.tpu(V5E, 4)
        assert find_world(HardwareConfig(), {}) is None  # auto takes the CPU then, and says so

    def test_a_launcher_knows_better(self, v5e: Machine, monkeypatch: pytest.MonkeyPatch):
        set_all(monkeypatch, SLICES)
        assert find_world(TPU, TORCHRUN).engine == "torchrun"


class TestOneProcessPerHost:
    def test_all_devices_of_all_hosts(self, v5e: Machine):
        world = World(1, 3, 0, 1, "tcp:a:1", 0, "torchrun")
        assert job_devices(TPU, resolve(TPU), world) == 12
        few = HardwareConfig(target="tpu", devices=2)
        assert job_devices(few, resolve(few), world) == 6
        assert job_devices(HardwareConfig(), resolve(HardwareConfig(target="cpu")), world) == 3

    def test_several_on_a_host_are_refused(self, v5e: Machine):
        with pytest.raises(HardwareError) as caught:
            job_devices(TPU, resolve(TPU), World(5, 8, 1, 4, "tcp:a:1", 0, "torchrun"))
        text = str(caught.value)
        assert "on tpu one process drives all devices of a host" in text
        assert "4 processes on this host, started by torchrun" in text
        assert "--nproc-per-node=1" in text

    def test_one_per_device_is_what_the_devices_are_held_against(self):
        config, world = HardwareConfig(target="cpu", devices=1), World(1, 4, 1, 2, "tcp:a:1", 0, "torchrun")
        with pytest.raises(HardwareError) as caught:
            check_started(config, resolve(config), world)
        assert "got:     hardware.devices=1; processes on this host: 2, by torchrun" in str(caught.value)
        assert "leave hardware.devices out, or have torchrun start 1 on each host" in str(caught.value)
        check_started(replace(config, devices=2), resolve(config), world)

    def test_virtual_devices_have_one_process(self, machine: Machine):
        machine.packages |= XLA_PACKAGES
        config = HardwareConfig(target="tpu", simulate=4)
        assert job_devices(config, resolve(config), World()) == 4
        with pytest.raises(HardwareError, match=r"several hosts cannot be rehearsed(.|\n)*hardware.simulate=8"):
            job_devices(config, resolve(config), World(0, 2, 0, 1, "tcp:a:1", 0, "slurm"))


class TestTrainium:
    @pytest.fixture
    def trn1(self, machine: Machine) -> Machine:
        for chip in range(4):
            machine.pci(0x1D0F, 0x7164, 0x088000)
            machine.file(f"/dev/neuron{chip}")
        return machine

    @pytest.mark.parametrize("engine", ["torchrun", "slurm"])
    def test_the_runtime_is_told_of_the_other_hosts(self, trn1: Machine, monkeypatch: pytest.MonkeyPatch, engine: str):
        torchrun = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        tasks = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_NODEID": "1"}
        slurm = {**STEP, **tasks, "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
        set_all(monkeypatch, torchrun if engine == "torchrun" else slurm)
        config = HardwareConfig(target="trainium")
        environment = get_target("trainium", "torch_xla").environment(config, 0, 1)
        first = {"torchrun": "node-0", "slurm": "gpu03"}[engine]
        assert environment["NEURON_RT_ROOT_COMM_ID"] == f"{first}:62182"
        assert environment["NEURON_PJRT_PROCESSES_NUM_DEVICES"] == "8,8,8"
        assert (environment["NEURON_PJRT_PROCESS_INDEX"], environment["RANK"]) == ("1", "1")

    def test_a_single_host_is_told_nothing(self, trn1: Machine):
        environment = get_target("trainium", "torch_xla").environment(HardwareConfig(target="trainium"), 0, 1)
        assert not {name for name in environment if name.startswith(("NEURON_PJRT", "NEURON_RT_ROOT"))}

    def test_a_given_variable_stays(self, trn1: Machine, monkeypatch: pytest.MonkeyPatch):
        set_all(monkeypatch, {**TORCHRUN, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
        config = HardwareConfig(target="trainium", environment={"NEURON_RT_ROOT_COMM_ID": "10.0.0.1:5000"})
        assert (
            get_target("trainium", "torch_xla").environment(config, 0, 1)["NEURON_RT_ROOT_COMM_ID"] == "10.0.0.1:5000"
        )
