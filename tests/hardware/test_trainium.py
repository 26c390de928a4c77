"""TorchNeuron on a made-up machine, the topology of instances, and rehearsals in processes."""

from __future__ import annotations

import pytest

from orchestrator.config.schema import HardwareConfig
from orchestrator.distributed.world import World
from orchestrator.errors import HardwareError
from orchestrator.hardware import host
from orchestrator.hardware.target_table import device_count, get_target, job_devices, resolve
from orchestrator.hardware.topology import named_instance
from tests.hardware.conftest import Machine

TRN1, TRN2, TRN3 = 0x7164, 0x7364, 0x7564
NEURON = HardwareConfig(target="trainium")
PACKAGES = {"torch": "2.13.0", "torch-neuronx": "2.13.3.0", "neuronx-cc": "2.27.1"}
AXES = ("replicate", "fsdp", "context", "tensor")


@pytest.fixture
def trn2(machine: Machine) -> Machine:
    machine.trainium(TRN2, 16)
    machine.packages |= PACKAGES
    return machine


def test_runs_torch_native_with_a_process_per_logical_core(trn2: Machine):
    target = resolve(NEURON)
    assert (target.runtime, target.strategy, target.device_type) == ("torchneuron", "dtensor", "neuron")
    assert (target.collective_backend, dict(target.compile_options)) == (
        "neuron",
        {"backend": "neuron", "dynamic": False},
    )
    assert target.processes(device_count(NEURON, target, target.probe())) == 64
    assert target.default_precision(target.probe()) == "bf16"
    assert "never run on the real chip" in target.state


@pytest.mark.parametrize(
    ("packages", "python", "words"),
    [
        ({"torch-neuronx": "2.14.3.0", "torch": "2.14.1"}, (3, 13), None),
        ({"torch-neuronx": "2.14.3.0"}, (3, 12), "torch-neuronx 2.14.3.0 needs torch 2.14 (here: 2.13.0)"),
        ({"torch": "2.15.0"}, (3, 12), "torch-neuronx 2.13.3.0 needs torch 2.13 (here: 2.15.0)"),
        ({"torch-neuronx": "2.9.0.2.11"}, (3, 12), "2.9.0.2.11 drives the chip through torch_xla"),
        ({"torch-neuronx": "2.15.0.0"}, (3, 12), "is newer than what this is written for"),
        ({"torch-neuronx": "1.0"}, (3, 12), "is the placeholder on PyPI"),
        ({}, (3, 11), "torch-neuronx needs Python 3.12 to 3.14 (here: 3.11)"),
    ],
)
def test_packages(trn2: Machine, packages: dict[str, str], python: tuple[int, int], words: str | None):
    trn2.packages |= packages
    trn2.python(*python)
    problems = get_target("trainium").probe().problems
    assert [problem.what for problem in problems if words and words in problem.what] or not (words or problems)


@pytest.mark.parametrize("target", ["trainium", "tpu"])
@pytest.mark.parametrize("python", [(3, 10), (3, 11), (3, 15)])
@pytest.mark.parametrize("chips", [False, True])
@pytest.mark.parametrize("torch", ["", "2.9.0", "2.13.0+cpu", "2.16.0"])
def test_each_of_the_four_runtimes_says_in_one_message_what_is_missing(
    machine: Machine, target: str, python: tuple[int, int], chips: bool, torch: str
):
    """Whatever is here of chip, Python and torch, without the vendor's packages: one error, and never a traceback."""
    machine.python(*python)
    machine.packages["torch"] = torch
    if not torch:
        machine.torch(None)
    if chips:
        machine.trainium(TRN1, 1) if target == "trainium" else machine.tpu(0x006F, 1)
    runtimes = ("torchneuron", "torch_xla") if target == "trainium" else ("torch_tpu", "torch_xla")
    missing = {"torchneuron": "torch-neuronx", "torch_tpu": "torch_tpu", "torch_xla": "torch"}
    for runtime in runtimes:
        with pytest.raises(HardwareError) as caught:
            resolve(HardwareConfig(target=target, runtime=runtime))
        text = str(caught.value)
        assert text.startswith(f"hardware.target={target} and hardware.runtime={runtime} cannot be used"), text
        assert f"{missing[runtime]}" in text
        assert "is not installed" in text
        assert ("no TPU found" in text or "no Trainium chip found" in text) != chips
        assert "do: " in text
        assert "http" not in text, "an index is named in words"
        if runtime in ("torchneuron", "torch_tpu") and torch and python < (3, 12):
            assert f"needs Python 3.12 or newer (here: 3.{python[1]})" in text or "needs Python 3.12 to 3.14" in text


def test_the_other_generation_is_not_driven(machine: Machine):
    machine.trainium(TRN1, 1)
    machine.packages |= PACKAGES
    with pytest.raises(HardwareError, match="TorchNeuron drives Trn2 and Trn3 only, and this is trn1"):
        resolve(NEURON)


def test_torch_xla_on_trainium_is_marked_as_ended(trn2: Machine):
    config = HardwareConfig(target="trainium", runtime="torch_xla")
    with pytest.raises(HardwareError, match=r"torch-neuronx 2\.13\.3\.0 has no torch_xla: 2\.9 was the last"):
        resolve(config)
    trn2.packages |= {"torch": "2.9.0", "torch_xla": "2.9.0", "torch-neuronx": "2.9.0.2.11"}
    target = resolve(config)
    assert target.strategy == "xla"
    assert "ended by AWS" in target.state


def test_environment_of_own_processes(trn2: Machine):
    target = resolve(NEURON)
    ranks = [target.environment(NEURON, rank, 64) for rank in (0, 63)]
    assert [env["LOCAL_RANK"] for env in ranks] == ["0", "63"]
    assert {(env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["MASTER_ADDR"]) for env in ranks} == {
        ("64", "64", "localhost")
    }
    assert {env["TORCH_DEVICE_BACKEND_AUTOLOAD"] for env in ranks} == {"1"}
    assert len({env["MASTER_PORT"] for env in ranks}) == 1
    assert not any("FI_PROVIDER" in env for env in ranks)


def test_several_instances_meet_over_efa(trn2: Machine, monkeypatch: pytest.MonkeyPatch):
    outer = {"RANK": "65", "WORLD_SIZE": "128", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "64", "GROUP_RANK": "1"}
    for name, value in {**outer, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HardwareError, match="one of 2 hosts, and it has no EFA device"):
        resolve(NEURON)
    trn2.file("/sys/class/infiniband/rdmap16s27/node_type")
    environment = resolve(NEURON).environment(NEURON, 1, 64)
    assert (environment["RANK"], environment["FI_PROVIDER"]) == ("65", "efa")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    ("instance", "target", "degrees", "expected"),
    [
        (
            "trn2.48xlarge",
            "trainium",
            (1, 16, 1, 4),
            ["tensor 4 within a chip", "fsdp 16 within an instance (NeuronLink)"],
        ),
        ("trn2.48xlarge", "trainium", (2, 16, 1, 4), ["replicate 2 over EFA"]),
        ("trn2.48xlarge", "trainium", (1, 8, 1, 8), ["tensor 8 within an instance (NeuronLink)"]),
        ("trn2u.48xlarge", "trainium", (1, 64, 1, 4), ["fsdp 64 within an UltraServer (NeuronLink)"]),
        (
            "trn2.48xlarge",
            "trainium",
            (1, 1, 1, 3),
            ["tensor 3 across the borders of an instance (NeuronLink), over EFA"],
        ),
        ("v6e-16", "tpu", (1, 4, 1, 4), ["tensor 4 within a host (ICI)", "fsdp 4 within a slice (ICI)"]),
        ("v6e-16", "tpu", (2, 16, 1, 1), ["replicate 2 over the data-centre network between slices"]),
        ("v7x-8", "tpu", (1, 8, 1, 2), ["tensor 2 within a chip", "fsdp 8 within a slice (ICI)"]),
    ],
)
def test_an_axis_lies_in_the_smallest_group_that_holds_it(
    instance: str, target: str, degrees: tuple[int, ...], expected: list[str]
):
    lines = named_instance(instance, target).lines(dict(zip(AXES, degrees, strict=True)))
    assert set(expected) <= set(lines), lines


@pytest.mark.parametrize(("name", "target"), [("v6e-17", "tpu"), ("trn9.huge", "trainium"), ("trn2.48xlarge", "tpu")])
def test_an_unknown_instance_is_named(machine: Machine, name: str, target: str):
    with pytest.raises(HardwareError, match=f"got: *{name}"):
        named_instance(name, target)
    runtime = "torch_tpu" if target == "tpu" else "torchneuron"
    with pytest.raises(HardwareError, match=f"no {target} instance"):
        resolve(HardwareConfig(target=target, runtime=runtime, simulate=4, instance=name))


@pytest.mark.parametrize("config", [NEURON, HardwareConfig(target="tpu", runtime="torch_tpu")])
def test_a_rehearsal_is_processes_of_the_cpu_and_needs_only_torch(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, config: HardwareConfig
):
    monkeypatch.setattr(host, "logical_cores", lambda: 2)
    machine.python(3, 11)
    config = HardwareConfig(target=config.target, runtime=config.runtime, simulate=4)
    target = resolve(config)
    assert (target.device_type, target.collective_backend, target.strategy) == ("cpu", "gloo", "dtensor")
    assert target.processes(device_count(config, target, target.probe())) == 4
    assert target.default_precision(target.probe()) == "fp32"
    assert target.environment(config, 0, 4)["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    assert str(target.device(3)) == "cpu"
    assert dict(target.compile_options) == {}
    assert job_devices(config, target, World(0, 4, 0, 4, "tcp:a:1", 0, "torchrun")) == 4
    with pytest.raises(HardwareError, match=r"hardware\.simulate=2, or start the command without torchrun"):
        job_devices(config, target, World(0, 2, 0, 2, "tcp:a:1", 0, "torchrun"))
    with pytest.raises(HardwareError, match=r"hardware\.simulate asks for more CPU processes"):
        resolve(HardwareConfig(target=config.target, runtime=config.runtime, simulate=17))


def test_virtual_devices_have_no_instance(machine: Machine):
    machine.packages |= {"torch": "2.9.0", "torch_xla": "2.9.0"}
    with pytest.raises(HardwareError, match=r"set hardware\.runtime=torch_tpu"):
        resolve(HardwareConfig(target="tpu", simulate=4, instance="v6e-16"))


def test_a_rehearsal_of_two_slices_counts_them(machine: Machine):
    target = get_target("tpu", "torch_tpu")
    target.use(HardwareConfig(target="tpu", simulate=8, instance="v6e-4"))
    assert target.slices() == 2
    assert target.placement({"replicate": 2, "fsdp": 4}).startswith("8 devices of v6e-4, 4 on each: ")
