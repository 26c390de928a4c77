"""Dense families that are more than Llama: read, computed and written as transformers does it, byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.config.convert import from_dict
from orchestrator.config.schema import ModelConfig
from orchestrator.errors import CheckpointError
from orchestrator.interop.hf_config import family_of, from_hf_config
from orchestrator.interop.hf_config_write import to_hf_config
from orchestrator.interop.hf_dense import FAMILIES
from orchestrator.interop.hf_weights import from_hf, to_hf
from orchestrator.models.decoder import Decoder
from tests.lab.hf_directories import fill
from tests.lab.slow import cases

transformers = pytest.importorskip("transformers")

V, T = 97, 48
SIZES = {
    "vocab_size": V,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0156}
# name -> family, and what differs from the defaults of its class.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {"head_dim": 24}),
    "gemma2": ("gemma2", {"head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 20}),
    "gemma3": ("gemma3_text", {"head_dim": 24, "sliding_window": 8, "layer_types": _MIXED}),
    "gemma3_linear": (
        "gemma3_text",
        {"sliding_window": 8, "final_logit_softcapping": 20.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 8, "rope_scaling": _YARN}),
    "smollm3": ("smollm3", {}),
    "smollm3_window": ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "attention_bias": True}),
    "granite": ("granite", {**_GRANITE, "logits_scaling": 8.0}),
    "phi3": ("phi3", {"sliding_window": 8, "partial_rotary_factor": 0.75}),
    "glm4": ("glm4", {"head_dim": 24}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None}),
    "gpt_neox_sequential": (
        "gpt_neox",
        {"num_key_value_heads": None, "use_parallel_residual": False, "rotary_pct": 0.5, "attention_bias": False},
    ),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm_parallel": ("stablelm", {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"sliding_window": 8}),
    "qwen3_mixed": ("qwen3", {"head_dim": 24, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen2_mixed": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": _MIXED}),
    "yarn": ("llama", {"rope_scaling": {**_YARN, "truncate": False, "attention_factor": 1.3}}),
}
FURTHER = ("gemma", "gemma3_linear", "smollm3_window", "gpt_neox_sequential", "stablelm_parallel", "qwen2_mixed")


def config_of(name: str) -> Any:
    family, changes = CASES[name]
    given = {key: value for key, value in {**SIZES, **changes}.items() if value is not None}
    return transformers.AutoConfig.for_model(family, **json.loads(json.dumps(given)))


def theirs(config: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def read(config: dict[str, Any]) -> ModelConfig:
    return from_dict(ModelConfig, {"name": "small", **from_hf_config(config).fields})


@pytest.mark.parametrize("name", cases(CASES, quick=[name for name in CASES if name not in FURTHER]))
def test_there_and_back(tmp_path, name):
    """As transformers saves it: equal logits, equal bytes, the same configuration, and one written anew as good."""
    family, _ = CASES[name]
    source = theirs(config_of(name))
    fill(source, name)
    source.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    given = json.loads((tmp_path / "config.json").read_text())
    config = read(given)
    ours = Decoder(config).eval()
    ours.load_state_dict(from_hf(stored, family, config), strict=False)
    ours.tie_weights()
    expected = logits(source)
    assert expected.std() > 0.1
    assert apart(logits(ours), expected) < 1e-5

    back = to_hf(dict(ours.named_parameters()), family, config)
    assert back.keys() == stored.keys()
    assert [key for key in stored if not torch.equal(back[key], stored[key])] == []
    assert family_of(config, family) == family
    kept = to_hf_config(config, family, None, "float32", given)
    assert {key: kept[key] for key in given if key != "dtype"} == {k: v for k, v in given.items() if k != "dtype"}

    written = to_hf_config(config, family, None, "float32")
    again = replace(read(written), head_dim=config.head_dim)
    assert again == config
    rest = {key: value for key, value in written.items() if key not in ("model_type", "torch_dtype")}
    second = theirs(transformers.AutoConfig.for_model(family, **json.loads(json.dumps(rest))))
    second.load_state_dict(source.state_dict())
    assert apart(logits(second), expected) < 1e-6


def test_every_family_of_the_table_is_tried():
    # Those of mixtures are in test_experts.
    mixtures = {"olmoe", "deepseek_v3", "gpt_oss"}
    assert set(FAMILIES) - mixtures <= {family for family, _ in CASES.values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_names_keys_that_there_are(family):
    entry = FAMILIES[family]
    assert set(entry.fixed) | entry.free <= set(vars(ModelConfig()))
    assert not set(entry.fixed) & entry.free


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "default"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "rope"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type=linear"),
        ("gpt_neox", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("gpt_neox", {"hidden_act": "silu"}, "hidden_act"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("stablelm", {"head_dim": 24}, "head_dim"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("cohere2", {"use_parallel_block": False}, "use_parallel_block"),
        ("cohere2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen3_mixed", {"sliding_window": None}, "layer_types"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name, change, word):
    with pytest.raises(CheckpointError) as caught:
        from_hf_config({**config_of(name).to_dict(), **change})
    assert word in str(caught.value)


def test_fused_weights_come_apart_head_by_head():
    """NeoX has query, key and value of one head, then those of the next: with other sizes the shapes still fit."""
    config = read(config_of("gpt_neox").to_dict())
    fused = torch.arange(4 * 3 * 16, dtype=torch.float32).unsqueeze(1).expand(-1, 64).contiguous()
    source = dict(theirs(config_of("gpt_neox")).state_dict())
    source["embed_out.weight"] = source.pop("lm_head.weight")  # as files have it
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    ours = from_hf({**source, name: fused}, "gpt_neox", config)
    rows = ours["layers.0.attn.k.weight"][:, 0]
    assert rows.tolist() == [head * 48 + 16 + row for head in range(4) for row in range(16)]
