"""Mixtures of experts as published: descriptions, files of both forms, and what is refused or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.config.compose import compose
from orchestrator.config.convert import from_dict
from orchestrator.config.schema import ModelConfig
from orchestrator.errors import CheckpointError
from orchestrator.interop.exporting import export_hf
from orchestrator.interop.hf_config import family_of, from_hf_config
from orchestrator.interop.hf_config_write import to_hf_config
from orchestrator.interop.importing import import_weights
from tests.lab.models import model_config

transformers = pytest.importorskip("transformers")

_SHARED = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "attention_dropout": 0.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# config.json of huggingface.co, where it is quantised without that.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral_8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "olmoe_1b_7b": {
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "vocab_size": 50304,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "gpt_oss_20b": {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
    },
}


def read(config: dict[str, Any]) -> ModelConfig:
    return from_dict(ModelConfig, {"name": "read", **from_hf_config(config).fields})


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_what_is_published(name: str) -> None:
    preset = compose([f"model={name}"]).config.model
    described = {**_SHARED, **PUBLISHED[name]}
    # Written from the preset, the same is read again; and the published file still describes it, so it is kept.
    assert family_of(preset) == described["model_type"]
    written = to_hf_config(preset, family_of(preset), 2, "bfloat16")
    kept = to_hf_config(preset, family_of(preset), 2, "bfloat16", described)
    assert {key: kept[key] for key in described} == described
    again = to_hf_config(read(written), family_of(preset), 2, "bfloat16", described)
    assert {key: again[key] for key in described} == described


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("qwen3_30b_a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_30b_a3b", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_30b_a3b", {"num_local_experts": 64}, "num_experts=128"),
        ("olmoe_1b_7b", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmoe_1b_7b", {"head_dim": 64}, "head_dim"),
        ("mixtral_8x7b", {"num_local_experts": None}, "num_local_experts"),
        ("mixtral_8x7b", {"hidden_act": "gelu"}, "hidden_act"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"n_shared_experts": None}, "n_shared_experts"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads"),
        ("deepseek_v3", {"qk_head_dim": 128}, "qk_head_dim"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8)"),
        ("gpt_oss_20b", {"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ("mixtral_8x7b", {"quantization_config": {"quant_method": "mxfp4"}}, "quantised (mxfp4)"),
        ("gpt_oss_20b", {"swiglu_limit": 5.0}, "swiglu_limit"),
        ("gpt_oss_20b", {"experts_per_token": 2}, "experts_per_token"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name: str, change: dict[str, Any], word: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_hf_config({**_SHARED, **PUBLISHED[name], **change})
    assert word in str(caught.value)


def test_losses_of_their_training_are_said() -> None:
    found = from_hf_config({**PUBLISHED["mixtral_8x7b"], "router_jitter_noise": 0.1})
    assert "model.moe.balance_loss" in found.fates["router_aux_loss_coef"]
    assert found.notes == ("router_jitter_noise=0.1 is not applied in training here",)
    assert found.fates["num_local_experts"] == "model.moe.experts=8"


def _saved(folder: Path, name: str, changes: dict[str, Any] | None = None, **how: Any) -> Path:
    """Of transformers itself, with weights that are large and random."""
    config = model_config(name, **(changes or {}))
    theirs = transformers.AutoConfig.for_model(**to_hf_config(config, family_of(config), 2, "float32"))
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator) + (1.0 if "norm" in key else 0.0))
    model.save_pretrained(folder, **how)
    return folder


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("fused", [False, True])
def test_both_forms_come_back_byte_for_byte_with_the_logits_of_transformers(
    tmp_path: Path, name: str, fused: bool
) -> None:
    given = _saved(tmp_path / "given", name, save_original_format=not fused)
    imported = import_weights(given, str(tmp_path / "imported"), "hf", logits="true")
    assert imported.left_out == 0
    assert imported.report.difference is not None
    assert imported.report.difference < 1e-5
    export_hf(Checkpoint(tmp_path / "imported"), str(tmp_path / "again"), "stored", 1 << 30, lambda done: None)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (given / file).read_bytes(), file


def test_layers_of_multi_token_prediction_are_left_out_and_said(tmp_path: Path) -> None:
    file = _saved(tmp_path / "given", "deepseek_v3") / "model.safetensors"
    weights = load_file(file)
    further = {f"model.layers.2.{name}.weight": torch.ones(4, 4) for name in ("eh_proj", "enorm", "self_attn.o_proj")}
    save_file({**weights, **further}, file, metadata={"format": "pt"})
    imported = import_weights(tmp_path / "given", str(tmp_path / "imported"), "hf", logits="false")
    assert imported.left_out == len(further)
    assert any("multi-token prediction" in note for note in imported.report.notes)
    save_file({**weights, "model.layers.2.enorm.weight": torch.ones(4)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"left over: model\.layers\.2"):
        import_weights(tmp_path / "given", str(tmp_path / "other"), "hf", logits="false")


def test_gpt_oss_is_read_from_mxfp4_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    given = _saved(tmp_path / "given", "gpt_oss", {"mlp_dim": 64})
    file, config_file = given / "model.safetensors", given / "config.json"
    weights, wanted = load_file(file), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = weights.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 126, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wanted[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    imported = import_weights(given, str(tmp_path / "imported"), "hf")
    assert imported.left_out == 0
    assert imported.report.keys["quantization_config"][1].startswith("MXFP4")
    assert any("MXFP4" in note for note in imported.report.notes)
    export_hf(Checkpoint(tmp_path / "imported"), str(tmp_path / "again"), "stored", 1 << 30, lambda done: None)
    exported = load_file(tmp_path / "again" / "model.safetensors")
    back = import_weights(tmp_path / "again", str(tmp_path / "back"), "hf", logits="true")
    assert back.report.difference is not None
    assert back.report.difference < 1e-5
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    for name, tensor in wanted.items():
        assert exported[name].dtype == torch.bfloat16
        assert torch.equal(exported[name], tensor), name
    save_file({**weights, f"{name}_scales": weights[f"{name}_scales"][:1]}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="MXFP4 is none"):
        import_weights(given, str(tmp_path / "other"), "hf")
