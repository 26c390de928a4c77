"""Choosing the target and the number of devices."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import pytest
import yaml

from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import HardwareConfig
from orchestrator.errors import ConfigError, HardwareError
from orchestrator.hardware import host
from orchestrator.hardware.target_table import TARGETS, device_count, get_target, probe_all, resolve
from tests.hardware.conftest import CUDA_TORCH, ROCM_TORCH, Machine

H100 = "NVIDIA H100 80GB HBM3"
CONF = Path(__file__).parents[2] / "conf" / "hardware"


def test_a_target_is_a_module_a_line_and_a_yaml():
    for name, place in TARGETS.items():
        module, _, attribute = place.partition(":")
        assert getattr(importlib.import_module(module), attribute).name == name
        assert yaml.safe_load((CONF / f"{name}.yaml").read_text())["target"] == name
    assert {path.stem for path in CONF.glob("*.yaml")} == {*TARGETS, "auto", "base"}


def test_base_yaml_has_every_key_and_the_defaults():
    given = yaml.safe_load((CONF / "base.yaml").read_text())
    assert given.keys() == to_dict(HardwareConfig()).keys()
    assert from_dict(HardwareConfig, given) == HardwareConfig()


def test_unknown_target():
    with pytest.raises(HardwareError, match="allowed: auto, cpu, cuda, rocm, tpu, trainium"):
        get_target("gpu")


def test_auto_takes_the_processor_where_there_is_nothing_else(machine: Machine):
    assert resolve(HardwareConfig()).name == "cpu"


@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_auto_prefers_an_accelerator(machine: Machine, name: str):
    if name == "cuda":
        machine.nvidia(H100)
        machine.torch(CUDA_TORCH)
    else:
        machine.amd("AMD Instinct MI300X")
        machine.torch(ROCM_TORCH)
    assert resolve(HardwareConfig()).name == name
    assert resolve(HardwareConfig(target="cpu")).name == "cpu"


def test_auto_warns_of_an_unusable_gpu(machine: Machine, caplog: pytest.LogCaptureFixture):
    machine.nvidia(H100)
    with caplog.at_level(logging.WARNING):
        assert resolve(HardwareConfig()).name == "cpu"
    assert "built without CUDA" in caplog.text


@pytest.mark.parametrize("name", ["cuda", "rocm", "tpu", "trainium"])
def test_a_missing_target_is_one_clear_error(machine: Machine, name: str):
    with pytest.raises(HardwareError) as caught:
        resolve(HardwareConfig(target=name))  # type: ignore[arg-type]
    text = str(caught.value)
    assert text.startswith(f"hardware.target={name} ")
    assert "cannot be used on this machine" in text
    assert "usable here: cpu" in text
    assert "do: " in text


def test_a_simulated_tpu_needs_only_torch_xla(machine: Machine):
    config = HardwareConfig(target="tpu", simulate=4)
    with pytest.raises(HardwareError, match=r"torch_xla is not installed"):
        resolve(config)
    machine.packages |= {"torch": "2.9.0", "torch_xla": "2.9.0"}
    target = resolve(config)
    assert device_count(config, target, target.probe()) == 4
    assert target.processes(4) == 1
    environment = target.environment(config, 0, 1)
    assert (environment["PJRT_DEVICE"], environment["CPU_NUM_DEVICES"]) == ("CPU", "4")


def test_only_chips_are_rehearsed(machine: Machine):
    with pytest.raises(HardwareError, match=r"hardware\.simulate(.|\n)*several processes on cpu are hardware\.devices"):
        resolve(HardwareConfig(target="cpu", simulate=4))


def test_nothing_usable(machine: Machine):
    machine.torch(None)
    with pytest.raises(HardwareError, match="torch is not installed"):
        resolve(HardwareConfig())


def test_unknown_chip_is_refused(machine: Machine):
    with pytest.raises(ConfigError, match="did you mean 'h100-sxm'"):
        resolve(HardwareConfig(chip="h100-smx"))


def test_cpu_processes(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "logical_cores", lambda: 2)
    target = get_target("cpu")
    assert device_count(HardwareConfig(), target, target.probe()) == 1
    assert device_count(HardwareConfig(devices=16), target, target.probe()) == 16
    with pytest.raises(HardwareError, match=r"at most 8 per core × 2 cores = 16, and at most 64"):
        device_count(HardwareConfig(devices=17), target, target.probe())
    monkeypatch.setattr(host, "logical_cores", lambda: 128)
    with pytest.raises(HardwareError, match="1 to 64"):
        resolve(HardwareConfig(devices=65))
    with pytest.raises(HardwareError, match="at least 1"):
        resolve(HardwareConfig(devices=0))


def test_gpus(machine: Machine):
    machine.nvidia(H100, H100)
    machine.torch(CUDA_TORCH)
    target = resolve(HardwareConfig(target="cuda"))
    assert device_count(HardwareConfig(), target, target.probe()) == 2
    assert device_count(HardwareConfig(devices=1), target, target.probe()) == 1
    with pytest.raises(HardwareError, match="allowed: 1 to 2"):
        resolve(HardwareConfig(target="cuda", devices=3))


def test_probe_all_names_every_target(machine: Machine):
    assert list(probe_all()) == list(TARGETS)
