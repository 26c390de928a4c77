"""Configurations from Python, also in a program that is an application of Hydra itself."""

from __future__ import annotations

from dataclasses import replace

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from orchestrator.api.configs import compose, to_composed
from orchestrator.config.compose import conf_dir
from orchestrator.errors import ConfigError, ConfigErrors, UserError


def test_overrides_become_a_configuration():
    composed = compose(["model=tiny", "optim.lr=0.5"])
    assert (composed.config.model.name, composed.config.optim.lr) == ("tiny", 0.5)
    assert to_composed(["optim.lr=0.5"]).config == to_composed(compose(["optim.lr=0.5"])).config
    assert composed.words == ("model=tiny", "optim.lr=0.5")


def test_options_of_ones_own(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [base]\nname: mine\nlayers: 3\n")
    assert compose(["model=mine"], config_dir=tmp_path).config.model.layers == 3


def test_a_run_config_is_checked_as_a_whole():
    config = compose(["model=tiny"]).config
    assert to_composed(config).config is config
    wrong = replace(config, optim=replace(config.optim, lr=-1.0), train=replace(config.train, max_steps=0))
    with pytest.raises(ConfigErrors) as caught:
        to_composed(wrong)
    assert len(caught.value.problems) == 2


def test_a_text_is_no_list_of_overrides():
    with pytest.raises(ConfigError, match="overrides are a list"):
        compose("model=tiny")


def test_an_application_of_hydra_keeps_its_own():
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        mine = hydra.compose("train", overrides=["seed=7"], return_hydra_config=True)
        HydraConfig.instance().set_config(mine)
        running, settings = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
        assert compose(["seed=8"]).config.seed == 8
        assert GlobalHydra.instance().hydra is running
        assert HydraConfig.instance().cfg is settings
        with pytest.raises(ConfigErrors):
            compose(["no.such.key=1"])
        assert GlobalHydra.instance().hydra is running


def test_a_topology_that_is_none_is_refused_before_anything_is_staged():
    import orchestrator

    with pytest.raises(UserError, match="v9:2x2"):
        orchestrator.rehearse(["model=tiny"], "v9:2x2")
