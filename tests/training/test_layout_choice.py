"""layout=auto: planned where the chip is known and there is a choice, the plain rule everywhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.schema import LayoutConfig
from orchestrator.hardware.target import Probe
from orchestrator.hardware.target_table import get_target
from orchestrator.sharding.axes import MESH_AXES
from orchestrator.sharding.layout import Layout, check_layout, resolve_layout
from orchestrator.training.layout_choice import schedules_for, settle_layout


class _Target:
    """A target that has found a chip, in so many slices."""

    def __init__(self, chip: str | None, name: str = "cuda", slices: int = 1):
        self.name, self._chip, self._slices = name, chip, slices
        self.strategy = "xla" if name == "tpu" else "dtensor"

    def slices(self) -> int:
        return self._slices

    def probe(self) -> Probe:
        return Probe(self.name, True, 8, chip=self._chip)


def _config(*words: str):
    return compose(["model=llama3_8b", "train.seq_len=4096", "train.global_batch_tokens=1048576", *words]).config


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 64, 256])
@pytest.mark.parametrize("chip", ["h200", "mi300x", "tpu-v5p"])
def test_a_planned_layout_is_one_that_the_run_accepts(chip, devices):
    config = _config("train.remat=full")
    settled = settle_layout(config, _Target(chip), devices)
    layout = resolve_layout(settled.layout, devices)
    assert layout.devices == devices
    assert check_layout(layout, config.model, config.train.seq_len, config.train.global_batch_tokens) == []
    if settled.micro_batch != "auto":
        assert f"planned for {devices} x {chip}" in settled.why
        assert (
            not (config.train.global_batch_tokens // config.train.seq_len // layout.data_parallel) % settled.micro_batch
        )
    assert settled == settle_layout(config, _Target(chip), devices), "every process comes to the same"


def test_a_model_too_large_for_data_parallelism_alone_is_cut_further():
    config = _config("model=llama3_70b", "train.remat=full", "train.global_batch_tokens=65536")
    layout = resolve_layout(settle_layout(config, _Target("h200"), 64).layout, 64)
    assert layout.tensor * layout.context > 1, "16 sequences do not go over 64 devices"


@pytest.mark.slow
def test_the_smallest_batch_of_a_warm_up_is_divided_too():
    words = ["model=llama3_8b", "train.remat=full", "train.global_batch_tokens=1048576"]
    whole = settle_layout(_config(*words), _Target("h200"), 64)
    assert resolve_layout(whole.layout, 64).data_parallel > 4
    warm = settle_layout(_config(*words, "train.batch_warmup=[{steps: 9, tokens: 16384}]"), _Target("h200"), 64)
    assert warm.why
    assert resolve_layout(warm.layout, 64).data_parallel <= 4, "there are 4 sequences"


def test_remat_is_planned_too_where_it_is_open():
    planned = settle_layout(_config("train.remat=auto", "train.seq_len=8192"), _Target("h200"), 8)
    assert planned.why
    assert planned.remat in ("none", "selective", "full")
    long = _config("train.remat=auto", "train.seq_len=65536", "layout.tensor=1", "layout.context=1")
    tight = settle_layout(long, _Target("h200"), 8)
    assert tight.remat != "none"
    assert settle_layout(_config("train.remat=auto"), _Target(None), 8).remat == "none"


def test_passes_that_draw_the_same_dropout_have_one_stage_a_rank():
    words = ["train.preference.loss=sigmoid", "data.messages=preference", "layout.schedule=auto"]
    assert set(schedules_for(_config(*words, "model.dropout=0.1"))) == {"1f1b", "zero_bubble"}
    assert {"interleaved", "dualpipe_v"} <= set(schedules_for(_config(*words)))


@pytest.mark.parametrize("slices", [2, 4])
def test_each_slice_has_whole_copies(slices):
    config = _config("train.remat=full")
    settled = settle_layout(config, _Target("tpu-v5p", "tpu", slices), 64)
    assert settled.why
    assert not settled.layout.replicate % slices


def test_what_is_set_stays():
    config = _config("train.remat=full", "layout.tensor=2", "train.micro_batch_size=4")
    settled = settle_layout(config, _Target("h200"), 8)
    assert settled.layout.tensor == 2
    assert settled.micro_batch == 4
    assert settled.why


def test_whole_gradients_are_planned_for():
    """Of 70B on 64 devices they do not fit beside the rest, unless a tensor axis cuts them."""
    words = ["model=llama3_70b", "train.remat=full", "train.micro_batch_size=1", "layout.tensor=1", "layout.context=1"]
    words += ["layout.pipeline=1"]
    assert "planned" in settle_layout(_config(*words), _Target("h200"), 64).why
    late = settle_layout(_config(*words, "train.reduce_gradients=last"), _Target("h200"), 64).why
    assert "no layout is predicted to fit" in late


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (_Target(None), ()),
        (_Target("h200", name="cpu"), ()),
        (get_target("cpu"), ()),
        (_Target("h200"), ("layout=replicate",)),
        (_Target("h200"), ("layout=tensor",)),
        (_Target("h200"), [f"layout.{axis}=1" for axis in MESH_AXES if axis != "fsdp"]),
        (_Target("tpu-v5p", name="tpu"), ("hardware=tpu", "hardware.simulate=8")),
    ],
    ids=["unknown chip", "cpu", "this cpu", "replicate", "tensor", "one open degree", "rehearsal"],
)
def test_the_plain_rule_elsewhere(target, words):
    config = _config(*words)
    settled = settle_layout(config, target, 8)
    assert settled.layout == config.layout
    assert settled.micro_batch == config.train.micro_batch_size
    assert settled.why == ""


def test_the_plain_rule_is_what_it_was():
    """conf/layout/auto.yaml leaves all degrees open; fsdp still takes all devices."""
    assert resolve_layout(_config().layout, 8) == resolve_layout(LayoutConfig(), 8) == Layout(fsdp=8)
    assert resolve_layout(_config("layout.tensor=2").layout, 8) == Layout(fsdp=4, tensor=2)


def test_a_chip_that_the_user_names():
    config = _config("train.remat=full")
    named = replace(config, hardware=replace(config.hardware, chip="h200"))
    assert "h200" in settle_layout(named, _Target(None), 8).why


def test_where_nothing_is_predicted_to_fit_the_rule_goes_on():
    config = _config("model=llama3_405b")
    settled = settle_layout(config, _Target("h200"), 8)
    assert settled.layout == config.layout
    assert "no layout is predicted to fit" in settled.why
