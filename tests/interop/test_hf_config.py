"""config.json there and back, as transformers reads and writes it; what cannot be computed here is refused."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config.convert import from_dict
from orchestrator.config.schema import ModelConfig
from orchestrator.errors import CheckpointError
from orchestrator.interop.hf_config import family_of, from_hf_config
from orchestrator.interop.hf_config_write import to_hf_config
from tests.lab.models import MODELS, model_config

transformers = pytest.importorskip("transformers")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
QWEN = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 16}
GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}


def read(config: dict[str, Any], name: str = "small") -> ModelConfig:
    return from_dict(ModelConfig, {"name": name, **from_hf_config(config).fields})


def theirs(config: dict[str, Any]) -> Any:
    """What transformers makes of a config.json."""
    rest = {key: value for key, value in config.items() if key != "model_type"}
    return transformers.AutoConfig.for_model(config["model_type"], **rest)


def expected(name: str) -> ModelConfig:
    """What survives: transformers has no switch for our dropout but in GPT-2, and writes head_dim out."""
    config = model_config(name)
    if name in ("olmoe", "deepseek_v3", "gpt_neox"):
        return config  # their classes have no key for the width of a head
    head_dim = config.head_dim if config.positions == "learned" else config.dim // config.heads
    return model_config(name, head_dim=head_dim if config.head_dim == "auto" else config.head_dim)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    written = to_hf_config(model_config(name), family_of(model_config(name)), 7, "float32")
    assert written["architectures"] == [MODELS[name][0]]
    assert written["eos_token_id"] == 7
    assert read(written) == expected(name)


@pytest.mark.parametrize("name", MODELS)
def test_through_transformers_own_configuration(name):
    """Version 5 writes rope_parameters, layer_types and more keys than we do."""
    written = to_hf_config(model_config(name), family_of(model_config(name)), 7, "float32")
    saved = theirs(written).to_dict()
    assert read(saved) == expected(name)
    assert from_hf_config(saved).family == family_of(model_config(name))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (LLAMA, {"kv_heads": 4, "norm_eps": 1e-6, "rope_theta": 10000.0, "tied_embeddings": False}),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, {"rope_theta": 7.0}),
        (LLAMA | {"model_type": "mistral", "num_key_value_heads": 2}, {"sliding_window": 4096}),
        (
            LLAMA | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
            {"sliding_window": None},
        ),
        (QWEN | {"max_window_layers": 0}, {"sliding_window": 16, "attention_bias": True, "output_bias": False}),
        (QWEN | {"max_window_layers": 2}, {"sliding_window": None}),
        (QWEN | {"use_sliding_window": False}, {"sliding_window": None}),
        (QWEN | {"max_window_layers": 1}, {"sliding_window": None, "windows": (None, 16)}),
        (QWEN | {"layer_types": ["sliding_attention", "full_attention"]}, {"windows": (16, None)}),
        (LLAMA | {"model_type": "qwen3", "num_key_value_heads": 2}, {"head_dim": 128, "qk_norm": True}),
        (GPT2, {"mlp_dim": 256, "tied_embeddings": True, "norm": "layer", "kv_heads": 4}),
        (GPT2 | {"n_inner": 100}, {"mlp_dim": 100}),
    ],
)
def test_defaults_are_those_of_their_classes(config, wanted):
    found = read(config)
    assert {key: getattr(found, key) for key in wanted} == wanted


@pytest.mark.parametrize("config", [LLAMA, QWEN | {"max_window_layers": 0}, GPT2])
def test_our_defaults_are_what_transformers_fills_in(config):
    assert read(config) == read(theirs(config).to_dict()) or read(config).head_dim == "auto"
    filled = read(theirs(config).to_dict())
    assert {**vars(read(config)), "head_dim": 0} == {**vars(filled), "head_dim": 0}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "t5"}, "model_type=t5"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type=longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks a key of rope_scaling"),
        ({"rope_scaling": 7}, "rope_scaling=7"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}}, "mscale"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (QWEN | {"layer_types": ["full_attention"]}, "layer_types"),
        (QWEN | {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types=chunked_attention"),
        (GPT2 | {"activation_function": "relu"}, "activation_function=relu"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_cannot_be_computed_here_is_refused(change, word):
    with pytest.raises(CheckpointError) as caught:
        from_hf_config({**LLAMA, **change})
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3", {"sliding_window": None, "mlp_bias": True}, ["Qwen3ForCausalLM", "mlp_bias=True, there False"]),
        ("llama", {"sliding_window": 8, "mlp_bias": True, "qk_norm": True}, ["mlp_bias=True"]),
        ("llama", {"output_bias": True}, ["one switch"]),
        ("gpt2", {"kv_heads": 2}, ["GPT2LMHeadModel", "kv_heads=2"]),
        ("gpt2", {"head_dim": 16}, ["head_dim=16"]),
        ("gpt2", {"positions": "rope", "qk_norm": True}, ["qk_norm=True, there False"]),
        ("llama", {"logit_softcap": 5.0}, ["logit_softcap=5.0, there None"]),
        ("llama", {"layer_heads": (4, 2)}, ["layer_heads=(4, 2), there ()"]),
        ("qwen3", {"sliding_window": None, "windows": (4, 8)}, ["windows of several sizes"]),
    ],
)
def test_a_model_that_no_class_computes_is_refused(name, changes, words):
    with pytest.raises(CheckpointError, match="no class of transformers") as caught:
        family_of(model_config(name, **changes))
    assert all(word in str(caught.value) for word in words), caught.value


def test_more_of_one_feature_is_another_family():
    assert family_of(model_config("llama", sliding_window=8)) == "mistral"
    assert family_of(model_config("llama", attention_bias=True)) == "qwen2"
    assert family_of(model_config("llama", qk_norm=True)) == "qwen3"


@pytest.mark.parametrize(
    "change",
    [
        {"is_causal": False},
        {"is_causal": 1},
        {"is_encoder_decoder": True},
        {"use_bidirectional_attention": True},
        {"rope_interleaved": True},
        {"transformers_weights": "other.safetensors"},
        {"sliding_window": 8},
        {"layer_types": ["sliding_attention", "sliding_attention"]},
        {"logits_scaling": 8.0},
        {"embedding_multiplier": 12},
    ],
)
def test_a_key_that_may_change_what_is_computed_is_refused(change):
    (key,) = change
    with pytest.raises(CheckpointError) as caught:
        from_hf_config({**LLAMA, **change})
    assert key in str(caught.value)


def test_what_became_of_every_key():
    given = {**LLAMA, "attention_dropout": 0.1, "auto_map": {"a": "b"}, "bos_token_id": 1, "new": None, "odd": 3}
    with pytest.raises(CheckpointError, match="not known what they change") as caught:
        from_hf_config(given)
    assert "ignore_keys=odd" in str(caught.value)
    found = from_hf_config(given, frozenset({"odd"}))
    assert set(found.fates) == set(given)
    assert found.fates["hidden_size"] == "model.dim=64"
    assert "command line" in found.fates["odd"]
    assert "never run" in found.fates["auto_map"]
    assert found.notes == ("attention_dropout=0.1 is not applied in training here; model.dropout=... is the own key",)


def test_rates_of_dropout_that_become_one_are_said():
    found = from_hf_config(GPT2 | {"attn_pdrop": 0.2, "resid_pdrop": 0.1})
    assert found.fields["dropout"] == 0.1
    assert len(found.notes) == 1
    assert "attn_pdrop=0.2" in found.notes[0]


def test_a_model_keeps_its_family_where_several_compute_it():
    assert family_of(model_config("mistral", sliding_window=None)) == "llama"
    assert family_of(model_config("mistral", sliding_window=None), "mistral") == "mistral"
    assert family_of(model_config("qwen3"), "mistral") == "qwen3"
