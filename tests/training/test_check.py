"""What is found wrong before anything is started."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.config.schema import LayoutConfig, ModelConfig, RunConfig, TrainConfig
from orchestrator.errors import ConfigError, ConfigErrors
from orchestrator.training.check import check_run, resolve_model


def _config(**parts) -> RunConfig:
    return replace(RunConfig(), **parts)


def _problems(config: RunConfig, devices: int, vocab_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        check_run(config, devices, vocab_size)
    return [problem.what for problem in caught.value.problems]


def test_a_run_that_fits():
    check_run(RunConfig(), 1)
    check_run(RunConfig(), 4, 4096)


def test_a_layout_that_does_not_fit_the_devices():
    assert _problems(_config(layout=LayoutConfig(fsdp=3)), 2) == ["the layout does not fit the devices"]


def test_every_slice_has_whole_copies_of_the_model():
    check_run(_config(layout=LayoutConfig(replicate=4)), 8, slices=2)
    with pytest.raises(ConfigErrors, match=r"layout.replicate=3 on 2 slices(.|\n)*set layout.replicate=2"):
        check_run(_config(layout=LayoutConfig(replicate=3), train=TrainConfig(global_batch_tokens=1536)), 6, slices=2)


def test_a_layout_that_does_not_fit_the_model_and_the_batch():
    found = _problems(_config(layout=LayoutConfig(tensor=3, fsdp=3)), 9)
    assert "model.heads does not divide by layout.tensor" in found
    assert "the global batch does not divide over the data-parallel groups" in found


def test_the_vocabulary_is_checked_as_soon_as_it_is_known():
    config = _config(layout=LayoutConfig(tensor=3), model=ModelConfig(vocab_size=1000, heads=3, kv_heads=3, dim=96))
    config = replace(config, train=replace(config.train, seq_len=192, global_batch_tokens=1920))
    assert _problems(config, 3) == ["model.vocab_size does not divide by layout.tensor"]
    assert _problems(config, 3, 4096) == [
        "the model's vocabulary is smaller than the tokenizer's",
        "model.vocab_size does not divide by layout.tensor",
    ]


def test_an_automatic_vocabulary_is_rounded_up_for_the_matrix_units():
    for tokens, rows in ((1, 128), (128, 128), (129, 256), (50257, 50304)):
        assert resolve_model(ModelConfig(), tokens).vocab_size == rows


def test_a_given_vocabulary_holds_the_tokenizers():
    assert resolve_model(ModelConfig(vocab_size=257), 257).vocab_size == 257
    with pytest.raises(ConfigError) as caught:
        resolve_model(ModelConfig(vocab_size=256), 257)
    assert "model.vocab_size=256, tokenizer 257" in str(caught.value)
    assert caught.value.allowed == "257 or more"


def test_a_ring_on_xla_is_refused():
    config = _config(layout=LayoutConfig(context=2, context_kind="ring"))
    check_run(config, 2)
    with pytest.raises(ConfigErrors, match="the compiler gathers keys and values"):
        check_run(config, 2, strategy="xla")


def test_a_pipeline_on_xla_is_refused():
    config = _config(layout=LayoutConfig(pipeline=2))
    check_run(config, 2)
    with pytest.raises(ConfigErrors, match="no pipelines on torch_xla"):
        check_run(config, 2, strategy="xla")
