"""Where XLA targets keep compiled graphs, said by the environment of their processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.schema import HardwareConfig
from orchestrator.hardware.target_table import get_target

XLA = ["hardware=trainium", "hardware.runtime=torch_xla"]
VARIABLES = {"tpu": "XLA_PERSISTENT_CACHE_PATH", "trainium": "NEURON_COMPILE_CACHE_URL"}


def _environment(config: HardwareConfig) -> dict[str, str]:
    target = get_target(config.target, "torch_xla")
    target.use(config)
    return target.environment(config, 0, 1)


@pytest.mark.parametrize("name", VARIABLES)
def test_by_default_it_is_the_users(name, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _environment(HardwareConfig(target=name))[VARIABLES[name]] == str(tmp_path / "orchestrator" / "xla")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _environment(HardwareConfig(target=name))[VARIABLES[name]] == str(tmp_path / ".cache/orchestrator/xla")


@pytest.mark.parametrize("name", VARIABLES)
def test_a_rehearsal_keeps_none_unless_asked(name):
    assert VARIABLES[name] not in _environment(HardwareConfig(target=name, simulate=2))
    asked = _environment(HardwareConfig(target=name, simulate=2, compilation_cache="kept"))
    assert asked[VARIABLES[name]] == str(Path.cwd() / "kept")
    assert VARIABLES[name] not in _environment(HardwareConfig(target=name, compilation_cache=None))


def test_trainium_is_told_to_leave_precision_alone():
    config = compose([*XLA, "hardware.simulate=2"]).config.hardware
    flags = _environment(config)["NEURON_CC_FLAGS"].split()
    assert {"--auto-cast=none", "--model-type=transformer"} <= set(flags)
    assert _environment(config)["NEURON_RT_STOCHASTIC_ROUNDING_EN"] == "0"
    other = compose([*XLA, "hardware.simulate=2", "hardware.environment.NEURON_CC_FLAGS=-O1"])
    assert _environment(other.config.hardware)["NEURON_CC_FLAGS"] == "-O1"


def test_trainium_is_told_to_keep_nothing():
    assert "--no_cache" not in _environment(compose(XLA).config.hardware)["NEURON_CC_FLAGS"]
    config = compose([*XLA, "hardware.compilation_cache=null"]).config.hardware
    assert _environment(config)["NEURON_CC_FLAGS"].endswith("--auto-cast=none --no_cache")


def test_a_bucket_stays_what_it_is():
    config = HardwareConfig(target="trainium", compilation_cache="s3://bucket/graphs")
    assert _environment(config)["NEURON_COMPILE_CACHE_URL"] == "s3://bucket/graphs"
