"""TPU machines of every generation, on made-up hosts: what is counted, and what is said to be in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from orchestrator.config.schema import HardwareConfig, RunConfig
from orchestrator.config.validate import validate
from orchestrator.errors import HardwareError
from orchestrator.hardware import torch_tpu, tpu_host
from orchestrator.hardware.target_table import RUNTIMES, device_count, get_target, resolve
from tests.hardware.conftest import Machine

V4, V5P, V5E, V6E, V7X = 0x005E, 0x0062, 0x0063, 0x006F, 0x0076
XLA_PACKAGES = {"torch": "2.9.0", "torch_xla": "2.9.0", "libtpu": "0.0.21"}
NATIVE_PACKAGES = {"torch": "2.13.0+cpu", "torch_tpu": "0.2.0", "libtpu": "0.0.52"}
NATIVE = HardwareConfig(target="tpu", runtime="torch_tpu")


def problems(runtime: str = "auto") -> str:
    return "\n".join(f"{problem.what} | {problem.fix}" for problem in get_target("tpu", runtime).probe().problems)


@pytest.fixture
def v5e(machine: Machine) -> Machine:
    """A complete host with four chips, for either runtime but for torch."""
    machine.tpu(V5E, 4)
    machine.packages |= XLA_PACKAGES
    return machine


@pytest.mark.parametrize(
    ("device", "chips", "functions", "files", "chip", "count"),
    [
        (V4, 4, 1, "/dev/accel{}", "tpu-v4", 4),
        (V4, 4, 1, "/dev/vfio/{}", "tpu-v4", 4),
        (V5E, 8, 1, "/dev/vfio/{}", "tpu-v5e", 8),
        (V5P, 4, 1, "/dev/vfio/{}", "tpu-v5p", 4),
        (V6E, 1, 1, "/dev/vfio/{}", "tpu-v6e", 1),
        (V7X, 4, 2, "/dev/vfio/{}", "tpu-v7x", 8),
        (V7X, 4, 1, "/dev/vfio/{}", "tpu-v7x", 8),
        (0x0027, 4, 1, "/dev/accel{}", None, 8),
    ],
)
@pytest.mark.parametrize("runtime", ["auto", "torch_tpu"])
def test_devices_are_those_that_the_runtime_counts(
    machine: Machine, device: int, chips: int, functions: int, files: str, chip: str | None, count: int, runtime: str
):
    machine.tpu(device, chips, functions=functions, files=files)
    machine.packages |= NATIVE_PACKAGES if runtime == "torch_tpu" else XLA_PACKAGES
    probe = get_target("tpu", runtime).probe()
    assert (probe.chip, probe.devices, len(probe.device_names)) == (chip, count, count)
    assert probe.available == (runtime == "auto" or files == "/dev/vfio/{}"), problems(runtime)


def test_chips_that_a_container_does_not_get_do_not_count(machine: Machine):
    machine.tpu(V7X, 4, functions=2)
    for number in range(2, 8):
        (machine.root / f"dev/vfio/{number}").unlink()
    assert tpu_host.look().names == ("TPU7x", "TPU7x")


class TestAccess:
    def test_files_are_missing(self, v5e: Machine):
        for file in (v5e.root / "dev/vfio").iterdir():
            file.unlink()
        assert "its device files are missing" in problems()

    def test_files_of_another_user(self, v5e: Machine, monkeypatch: pytest.MonkeyPatch):
        allowed = os.access
        monkeypatch.setattr(tpu_host.os, "access", lambda file, mode: Path(file).name != "2" and allowed(file, mode))
        assert "this user may not open the TPU's device files" in problems()
        assert "/dev/vfio/2 |" in problems()

    def test_lock_of_another_user(self, v5e: Machine, monkeypatch: pytest.MonkeyPatch):
        v5e.file("/tmp/libtpu_lockfile")
        assert not problems()
        monkeypatch.setattr(tpu_host.os, "access", lambda file, mode: Path(file).name != "libtpu_lockfile")
        assert "libtpu_lockfile, which libtpu must lock, belongs to another user | when no process" in problems()

    def test_another_process_has_a_chip(self, v5e: Machine):
        (v5e.root / "proc/4711/fd").mkdir(parents=True)
        (v5e.root / "proc/4711/fd/3").symlink_to("/dev/vfio/1")
        (v5e.root / "proc/4712/fd").mkdir(parents=True)
        (v5e.root / "proc/4712/fd/3").symlink_to("/dev/null")
        assert "the TPU is held by process 4711 |" in problems()

    def test_another_process_has_the_lock(self, v5e: Machine):
        v5e.file("/tmp/libtpu_lockfile")
        inode = (v5e.root / "tmp/libtpu_lockfile").stat().st_ino
        v5e.file(
            "/proc/locks", f"1: POSIX  ADVISORY  WRITE 12 00:2f:1 0 EOF\n2: POSIX  ADVISORY  WRITE 77 08:01:{inode} 0 0"
        )
        assert "the TPU is held by process 77 |" in problems()

    def test_peers_of_a_job_are_no_strangers(self, v5e: Machine, monkeypatch: pytest.MonkeyPatch):
        (v5e.root / "proc/4711/fd").mkdir(parents=True)
        (v5e.root / "proc/4711/fd/3").symlink_to("/dev/vfio/1")
        for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "29500")
        assert not problems()

    def test_library_path(self, v5e: Machine, monkeypatch: pytest.MonkeyPatch):
        del v5e.packages["libtpu"]
        assert "libtpu, the TPU runtime, is not installed" in problems()
        monkeypatch.setenv("TPU_LIBRARY_PATH", "/lib/libtpu.so")
        assert "TPU_LIBRARY_PATH=/lib/libtpu.so is no file" in problems()
        v5e.file("/lib/libtpu.so")
        assert not problems()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, ""),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, ""),
        ({"TPU_WORKER_ID": "0"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "names 2 hosts, but TPU_WORKER_ID does not say which"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "2"}, "TPU_WORKER_ID=2 is host 3 of the slice, but"),
        ({"TPU_WORKER_ID": "1"}, "is host 2 of the slice, but TPU_WORKER_HOSTNAMES is not set"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "-1"}, "TPU_WORKER_ID='-1' is not a number"),
        ({"TPU_WORKER_HOSTNAMES": "a,a", "TPU_WORKER_ID": "1"}, "names a host twice"),
        ({"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a:1"}, ""),
        ({"MEGASCALE_NUM_SLICES": "2"}, "without MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_SLICE_ID"),
        (
            {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "a:1"},
            "MEGASCALE_SLICE_ID=2 of MEGASCALE_NUM_SLICES=2 is no slice",
        ),
    ],
)
def test_hosts_and_slices(v5e: Machine, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = problems()
    assert words in found
    assert bool(found) == bool(words), found


class TestTorchTpu:
    @pytest.fixture
    def native(self, v5e: Machine) -> Machine:
        v5e.packages |= NATIVE_PACKAGES
        return v5e

    def test_says_all_that_is_missing_in_one_message(self, machine: Machine):
        with pytest.raises(HardwareError) as caught:
            resolve(NATIVE)
        text = str(caught.value)
        for words in ("hardware.runtime=torch_tpu cannot be used", "no TPU found", "torch_tpu is not installed"):
            assert words in text
        assert "scripts/setup tpu-native" in text

    def test_runs_torch_native_with_a_process_per_device(self, native: Machine):
        target = resolve(NATIVE)
        assert (target.name, target.strategy, target.device_type) == ("tpu", "dtensor", "tpu")
        assert target.collective_backend == "tpu_dist"
        assert target.experimental
        assert "never run on a chip" in target.state
        assert dict(target.compile_options) == {"backend": "tpu"}
        assert target.rounds_fp32_products
        assert target.processes(device_count(NATIVE, target, target.probe())) == 4
        assert target.default_precision(target.probe()) == "bf16"
        assert resolve(HardwareConfig(target="tpu", runtime="torch_tpu", devices=1)).probe().available
        native.packages |= XLA_PACKAGES
        assert resolve(HardwareConfig(target="tpu", runtime="torch_xla")).strategy == "xla"

    def test_every_runtime_is_one_of_its_target(self, machine: Machine):
        for name, runtime in RUNTIMES:
            target = get_target(name, runtime)
            assert (target.name, target.runtime) == (name, runtime)

    @pytest.mark.parametrize(
        ("packages", "words"),
        [
            ({"torch": "2.9.0"}, "torch_tpu 0.2.0 needs torch 2.11 to 2.15 (here: 2.9.0)"),
            ({"torch_tpu": "0.3.0"}, "torch_tpu 0.3.0 is not the release"),
            ({"libtpu": ""}, "libtpu, the TPU runtime, is not installed"),
        ],
    )
    def test_packages(self, native: Machine, packages: dict[str, str], words: str):
        native.packages |= packages
        assert words in problems("torch_tpu")

    def test_processes_must_be_a_mesh(self, native: Machine):
        with pytest.raises(HardwareError, match=r"3 processes are no part of a TPU v5e host .* \(1, 4, 8\)"):
            resolve(HardwareConfig(target="tpu", runtime="torch_tpu", devices=3))
        with pytest.raises(HardwareError, match="allowed: 1 to 4"):
            resolve(HardwareConfig(target="tpu", runtime="torch_tpu", devices=5))

    def test_several_hosts_need_the_librarys_variables(self, native: Machine, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
        monkeypatch.setenv("TPU_WORKER_ID", "0")
        assert "python -m torch.tpu.distributed" in problems("torch_tpu")
        monkeypatch.setenv("TORCH_TPU_TOPOLOGY", "4,2,1")
        monkeypatch.setenv("TORCH_TPU_SLICEBUILDER_ADDRESSES", "a:1,a:2,a:3,a:4,b:1,b:2,b:3,b:4")
        assert not problems("torch_tpu")
        assert get_target("tpu", "torch_tpu").environment(NATIVE, 0, 4)["TORCH_TPU_TOPOLOGY"] == "4,2,1"

    def test_environment_of_own_processes(self, native: Machine):
        target = resolve(NATIVE)
        ranks = [target.environment(NATIVE, rank, 4) for rank in range(4)]
        assert [(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) for env in ranks] == [
            (str(rank), str(rank), "4") for rank in range(4)
        ]
        assert {env["TORCH_TPU_TOPOLOGY"] for env in ranks} == {"2,2,1"}
        assert {env["TORCH_DEVICE_BACKEND_AUTOLOAD"] for env in ranks} == {"1"}
        # All ranks must agree on the addresses, and no two of them have one.
        (addresses,) = {env["TORCH_TPU_SLICEBUILDER_ADDRESSES"] for env in ranks}
        ports = [address.removeprefix("localhost:") for address in addresses.split(",")]
        assert len({*ports, ranks[0]["MASTER_PORT"]}) == 5

    def test_environment_under_torchrun(self, native: Machine, monkeypatch: pytest.MonkeyPatch):
        outer = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
        for name, value in {**outer, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
            monkeypatch.setenv(name, value)
        # Each process works it out by itself, and must come to the same.
        environments = [get_target("tpu", "torch_tpu").environment(NATIVE, rank, 4) for rank in (2, 3)]
        assert environments[0]["TORCH_TPU_SLICEBUILDER_ADDRESSES"] == ",".join(
            f"localhost:{port}" for port in (8070, 8071, 8072, 8073)
        )
        assert len({env["TORCH_TPU_SLICEBUILDER_ADDRESSES"] for env in environments}) == 1
        with pytest.raises(HardwareError, match="allowed: 1, 4, 8"):
            get_target("tpu", "torch_tpu").environment(NATIVE, 0, 3)

    def test_topologies_cover_a_whole_host_of_each_chip(self, machine: Machine):
        for chip, known in torch_tpu._TOPOLOGIES.items():
            for processes, mesh in known.items():
                assert processes == torch.tensor([int(side) for side in mesh.split(",")]).prod(), chip

    def test_device_and_memory(self, monkeypatch: pytest.MonkeyPatch):
        made: list[tuple[str, int]] = []

        class Device:
            def __init__(self, kind: str, index: int):
                made.append((kind, index))
                self.type = kind

        monkeypatch.setattr(torch, "device", Device)
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 7)
        monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 0)
        target = get_target("tpu", "torch_tpu")
        device = target.device(3)
        assert made == [("tpu", 0)], "a process sees one device, whatever its rank"
        assert target.memory_bytes(device) == 7
        assert target.peak_memory_bytes(device) is None


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        (HardwareConfig(target="tpu", runtime="torch_tpu"), []),
        (HardwareConfig(target="tpu", runtime="torch_xla", simulate=4), []),
        (HardwareConfig(target="tpu", runtime="torch_tpu", simulate=4, instance="v6e-16"), []),
        (HardwareConfig(target="trainium", runtime="torch_xla", simulate=4), []),
        (HardwareConfig(target="cpu", runtime="torch"), []),
        (HardwareConfig(target="cuda", runtime="torch_tpu"), ["set it to torch, or leave it out"]),
        (HardwareConfig(target="trainium", runtime="torch_tpu"), ["set it to torchneuron or torch_xla"]),
        (HardwareConfig(runtime="torch_xla"), ["name the target, or leave it out"]),
        (HardwareConfig(target="tpu", instance="v6e-16"), ["without hardware.simulate"]),
    ],
)
def test_a_runtime_is_one_of_its_target(hardware: HardwareConfig, words: list[str]):
    found = [str(problem) for problem in validate(RunConfig(hardware=hardware))]
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


def test_the_librarys_runtime_is_the_usual_one_beside_a_chip(machine: Machine):
    """Where torch_tpu is installed and a chip is there; a rehearsal does not depend on what is installed."""
    assert get_target("tpu").runtime == "torch_xla"
    machine.packages |= NATIVE_PACKAGES
    assert get_target("tpu").runtime == "torch_xla", "no chip"
    machine.tpu(V5E, 4)
    assert resolve(HardwareConfig(target="tpu")).runtime == "torch_tpu"
    assert get_target("tpu", rehearses=True).runtime == "torch_xla"
    machine.packages["torch_tpu"] = ""
    del machine.packages["torch_tpu"]
    assert get_target("tpu").runtime == "torch_xla"
