"""What each target finds on made-up machines, and what it tells the user to do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from orchestrator.config.schema import HardwareConfig
from orchestrator.hardware import host
from orchestrator.hardware.host import TorchBuild
from orchestrator.hardware.target import Probe
from orchestrator.hardware.target_table import TARGETS, get_target
from tests.hardware.conftest import CPU_TORCH, CUDA_TORCH, ROCM_TORCH, Machine

H100 = "NVIDIA H100 80GB HBM3"
NVIDIA_PCI = (0x10DE, 0x2330, 0x030200)


def problems(probe: Probe) -> str:
    return "\n".join(f"{problem.what} | {problem.fix}" for problem in probe.problems)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_keeps_the_interface(machine: Machine, name: str):
    target = get_target(name)
    assert target.name == name
    assert target.strategy in ("dtensor", "xla")
    assert target.state
    probe = target.probe()
    assert probe.target == name
    assert probe.available == (not probe.problems)
    assert all(problem.what and problem.fix for problem in probe.problems)
    assert target.default_precision(probe) in ("fp32", "bf16")
    assert target.environment(HardwareConfig(environment={"A": "b"}), 0, 1)["A"] == "b"
    assert target.describe()["target"] == name
    assert target.probe() is probe, "the machine is looked at once"


def test_looking_does_not_import_torch():
    code = (
        "import sys; from orchestrator.hardware.target_table import probe_all; probe_all()\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_a_failing_look_is_a_problem(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    def broken() -> list[host.PciDevice]:
        raise OSError("bus on fire")

    monkeypatch.setattr(host, "pci_devices", broken)
    probe = get_target("cuda").probe()
    assert not probe.available
    assert "bus on fire" in problems(probe)


class TestCpu:
    def test_is_always_there(self, machine: Machine):
        probe = get_target("cpu").probe()
        assert probe.available
        assert probe.devices == 1
        assert probe.chip is None

    def test_without_torch(self, machine: Machine):
        machine.torch(None)
        assert "torch is not installed" in problems(get_target("cpu").probe())

    def test_threads_share_the_cores(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(host, "physical_cores", lambda: 8)
        target, config = get_target("cpu"), HardwareConfig()
        assert target.environment(config, 0, 2)["OMP_NUM_THREADS"] == "4"
        assert target.environment(config, 0, 16)["OMP_NUM_THREADS"] == "1"
        assert target.environment(HardwareConfig(threads=3), 0, 2)["OMP_NUM_THREADS"] == "3"
        assert target.environment(HardwareConfig(environment={"OMP_NUM_THREADS": "7"}), 0, 2)["OMP_NUM_THREADS"] == "7"

    def test_memory_and_device(self):
        target = get_target("cpu")
        device = target.device(3)
        assert device == torch.device("cpu")
        used, peak = target.memory_bytes(device), target.peak_memory_bytes(device)
        assert used is not None
        assert peak is not None
        assert 2**20 < used <= peak * 1.1
        target.synchronize(device)


class TestCuda:
    def test_no_device(self, machine: Machine):
        probe = get_target("cuda").probe()
        assert (probe.available, probe.devices) == (False, 0)
        assert "no NVIDIA GPU found" in problems(probe)

    def test_usable(self, machine: Machine):
        machine.nvidia(H100, H100)
        machine.torch(CUDA_TORCH)
        probe = get_target("cuda").probe()
        assert probe.available
        assert probe.device_names == (H100, H100)
        assert probe.chip == "h100-sxm"
        assert probe.device_memory_bytes == 81559 * 2**20
        assert probe.runtime["driver"] == "580.65.06"
        assert get_target("cuda").default_precision(probe) == "bf16"

    def test_old_gpu_takes_fp32(self, machine: Machine):
        machine.nvidia("Tesla V100-SXM2-16GB", capability="7.0")
        machine.torch(TorchBuild("2.13.0+cu128", "12.8", None))
        probe = get_target("cuda").probe()
        assert probe.available
        assert probe.chip is None
        assert get_target("cuda").default_precision(probe) == "fp32"

    @pytest.mark.parametrize(
        ("build", "words"),
        [
            (CPU_TORCH, "is built without CUDA"),
            (ROCM_TORCH, "is built for AMD"),
            (None, "torch is not installed"),
            (TorchBuild("2.13.0+cu140", "14.0", None), ""),
        ],
    )
    def test_torch_of_another_build(self, machine: Machine, build: TorchBuild | None, words: str):
        machine.nvidia(H100)
        machine.torch(build)
        probe = get_target("cuda").probe()
        assert probe.devices == 1
        assert probe.available == (not words)
        assert words in problems(probe)

    def test_driver_too_old(self, machine: Machine):
        machine.nvidia(H100, driver="535.129.03")
        machine.torch(CUDA_TORCH)
        assert "driver 535.129.03 is too old for torch's CUDA 13.0" in problems(get_target("cuda").probe())

    def test_gpu_without_driver(self, machine: Machine):
        machine.pci(*NVIDIA_PCI)
        machine.pci(0x10DE, 0x1AEF, 0x040300)  # the card's sound device is no GPU
        probe = get_target("cuda").probe()
        assert probe.devices == 1
        assert "driver is not loaded" in problems(probe)

    def test_silent_nvidia_smi(self, machine: Machine):
        machine.file("/dev/nvidiactl")
        assert "nvidia-smi does not answer" in problems(get_target("cuda").probe())

    def test_driver_files_without_nvidia_smi(self, machine: Machine):
        machine.file("/dev/nvidiactl")
        machine.file("/proc/driver/nvidia/gpus/0000:01:00.0/information", f"Model: \t\t {H100}\nIRQ: 1\n")
        machine.file("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun\n")
        machine.torch(CUDA_TORCH)
        probe = get_target("cuda").probe()
        assert probe.available
        assert probe.chip == "h100-sxm"
        assert probe.device_memory_bytes is None
        assert get_target("cuda").default_precision(probe) == "bf16"

    @pytest.mark.parametrize(
        ("visible", "count"), [("0", 1), ("1,0", 2), ("GPU-1f", 1), ("0,7,1", 1), ("", 0), ("-1", 0)]
    )
    def test_visible_devices(self, machine: Machine, monkeypatch: pytest.MonkeyPatch, visible: str, count: int):
        machine.nvidia(H100, H100)
        machine.torch(CUDA_TORCH)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        probe = get_target("cuda").probe()
        assert len(probe.device_names) == count
        if not count:
            assert "leaves no GPU visible" in problems(probe)

    def test_a_slice_of_a_gpu_is_not_the_chip(self, machine: Machine):
        machine.nvidia(H100, mig="Enabled")
        machine.torch(CUDA_TORCH)
        assert get_target("cuda").probe().chip is None

    def test_mixed_gpus_are_no_chip(self, machine: Machine):
        machine.nvidia(H100, "NVIDIA H200")
        machine.torch(CUDA_TORCH)
        assert get_target("cuda").probe().chip is None

    def test_environment(self):
        environment = get_target("cuda").environment(HardwareConfig(), 0, 8)
        assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" in environment


class TestRocm:
    def test_no_device(self, machine: Machine):
        assert "no AMD GPU found" in problems(get_target("rocm").probe())

    def test_usable(self, machine: Machine):
        machine.amd("AMD Instinct MI300X OAM", "AMD Instinct MI300X OAM")
        machine.torch(ROCM_TORCH)
        probe = get_target("rocm").probe()
        assert probe.available
        assert (probe.devices, probe.chip) == (2, "mi300x")
        assert probe.runtime["architecture"] == "gfx942"
        assert probe.device_memory_bytes == 192 * 2**30
        assert get_target("rocm").default_precision(probe) == "bf16"
        assert "CUBLAS_WORKSPACE_CONFIG" not in get_target("rocm").environment(HardwareConfig(), 0, 1)

    @pytest.mark.parametrize(("build", "words"), [(CPU_TORCH, "built without ROCm"), (CUDA_TORCH, "built for NVIDIA")])
    def test_torch_of_another_build(self, machine: Machine, build: TorchBuild, words: str):
        machine.amd("AMD Instinct MI300X")
        machine.torch(build)
        assert words in problems(get_target("rocm").probe())

    def test_gpu_without_driver(self, machine: Machine):
        machine.pci(0x1002, 0x74A1, 0x120000)
        assert "no /dev/kfd" in problems(get_target("rocm").probe())

    def test_hidden_devices(self, machine: Machine, monkeypatch: pytest.MonkeyPatch):
        machine.amd("AMD Instinct MI300X", "AMD Instinct MI300X")
        machine.torch(ROCM_TORCH)
        monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
        assert get_target("rocm").probe().devices == 1
        monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
        assert "HIP_VISIBLE_DEVICES is set" in problems(get_target("rocm").probe())


class TestXla:
    def test_tpu_says_all_that_is_missing(self, machine: Machine):
        text = problems(get_target("tpu").probe())
        for words in ("no TPU found", "torch_xla is not installed", "torch 2.9", "libtpu"):
            assert words in text

    def test_a_complete_tpu_machine_is_usable(self, machine: Machine):
        machine.pci(0x1AE0, 0x0063, 0x120000)
        machine.pci(0x1AE0, 0x0042, 0x020000)  # the network card of the same vendor
        machine.file("/dev/vfio/0")
        machine.packages |= {"torch": "2.9.0", "torch_xla": "2.9.0", "libtpu": "0.0.21"}
        probe = get_target("tpu").probe()
        assert (probe.devices, probe.chip, len(probe.problems)) == (1, "tpu-v5e", 0)
        assert probe.available
        assert get_target("tpu").environment(HardwareConfig(target="tpu"), 0, 1)["PJRT_DEVICE"] == "TPU"

    def test_vfio_alone_is_no_tpu(self, machine: Machine):
        machine.file("/dev/vfio/0")
        assert get_target("tpu").probe().devices == 0

    def test_torch_xla_beside_another_torch(self, machine: Machine):
        machine.packages |= {"torch": "2.13.0+cpu", "torch_xla": "2.9.0"}
        assert "torch_xla 2.9.0 needs torch 2.9 (here: 2.13.0+cpu)" in problems(get_target("tpu").probe())

    def test_trainium(self, machine: Machine):
        machine.pci(0x1D0F, 0x7364, 0x118000)
        assert "driver is not loaded" in problems(get_target("trainium").probe())
        machine.file("/dev/neuron0")
        probe = get_target("trainium").probe()
        assert (probe.devices, probe.chip) == (4, "trn2")
        assert "torch-neuronx is not installed" in problems(probe)

    @pytest.mark.parametrize(("pci", "chip", "cores"), [(0x7164, "trn1", 2), (0x7364, "trn2", 4), (0x7564, "trn3", 4)])
    def test_a_trainium_device_is_a_core_as_the_runtime_counts(self, machine: Machine, pci: int, chip: str, cores: int):
        machine.packages |= {"torch": "2.9.0", "torch-neuronx": "2.9.0"}
        for number in range(3):
            machine.pci(0x1D0F, pci, 0x118000)
            if number < 2:  # a container that has two of the three chips
                machine.file(f"/dev/neuron{number}")
        probe = get_target("trainium", "torch_xla").probe()
        assert (probe.devices, probe.chip, probe.problems) == (2 * cores, chip, ())

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("NEURON_RT_VISIBLE_CORES", "0-2,5", (4, "trn2")),
            ("NEURON_RT_VISIBLE_CORES", "6-11", (2, "trn2")),
            ("NEURON_RT_NUM_CORES", "3", (3, "trn2")),
            ("NEURON_RT_NUM_CORES", "0", (8, "trn2")),
            # Half of the device whose peak rate the catalogue has: which one it is, is not said.
            ("NEURON_LOGICAL_NC_CONFIG", "1", (16, None)),
        ],
    )
    @pytest.mark.parametrize("place", ["shell", "configuration"])
    def test_variables_of_the_runtime_count(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: object, place: str
    ):
        for number in range(2):
            machine.pci(0x1D0F, 0x7364, 0x118000)
            machine.file(f"/dev/neuron{number}")
        target = get_target("trainium")
        if place == "shell":
            monkeypatch.setenv(name, value)
        else:
            target.use(HardwareConfig(target="trainium", environment={name: value}))
        probe = target.probe()
        assert (probe.devices, probe.chip) == expected

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("NEURON_RT_VISIBLE_CORES", "some"),
            ("NEURON_RT_NUM_CORES", "-1"),
            ("NEURON_LOGICAL_NC_CONFIG", "4"),
        ],
    )
    def test_a_wrong_variable_is_named(self, machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, value: str):
        machine.pci(0x1D0F, 0x7364, 0x118000)
        machine.file("/dev/neuron0")
        monkeypatch.setenv(name, value)
        assert f"{name}={value}" in problems(get_target("trainium").probe())

    def test_cores_of_an_unknown_neuron_chip_are_asked_for(self, machine: Machine):
        machine.file("/dev/neuron0")
        assert "NEURON_RT_NUM_CORES" in problems(get_target("trainium").probe())
        target = get_target("trainium")
        target.use(HardwareConfig(target="trainium", environment={"NEURON_RT_NUM_CORES": "2"}))
        assert (target.probe().devices, target.probe().chip) == (2, None)


class TestHost:
    def test_torch_build_is_that_of_torch(self):
        build = host.torch_build()
        assert build is not None
        assert (build.version, build.cuda, build.hip) == (torch.__version__, torch.version.cuda, torch.version.hip)

    @pytest.mark.parametrize(
        ("file", "text", "cores"),
        [
            ("/sys/fs/cgroup/cpu.max", "max 100000", 16),
            ("/sys/fs/cgroup/cpu.max", "250000 100000", 2),
            ("/sys/fs/cgroup/cpu.max", "50000 100000", 1),
            ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "400000", 4),
            ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1", 16),
        ],
    )
    def test_quota(self, machine: Machine, monkeypatch: pytest.MonkeyPatch, file: str, text: str, cores: int):
        monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
        machine.file(file, text)
        assert host.logical_cores() == cores

    def test_threads_of_a_core_count_once(self, machine: Machine, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
        for cpu in range(4):
            machine.file(f"/sys/devices/system/cpu/cpu{cpu}/topology/core_id", str(cpu // 2))
            machine.file(f"/sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id", "0")
        assert host.physical_cores() == 2

    def test_memory_limit(self, machine: Machine):
        machine.file("/sys/fs/cgroup/memory.max", str(2**30))
        assert host.ram_bytes() == 2**30
