"""Models of each family that transformers has too, their weights random, as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from orchestrator.config.convert import to_dict
from orchestrator.config.schema import MLAConfig, ModelConfig, MoEConfig, RopeScalingConfig
from orchestrator.data.tokenize import Tokenizer, train_bpe
from orchestrator.models.decoder import Decoder
from orchestrator.sharding.layout import Layout
from tests.lab.checkpoints import shards_of, write
from tests.models.conftest import randomise

VOCAB = 300
_BASE = {
    "name": "small",
    "vocab_size": VOCAB,
    "dim": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "mlp_dim": 48,
    "max_seq_len": 64,
}
_LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 32}
_YARN = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}
# name -> the class of transformers, and what differs from the smallest Llama.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama_tied": ("LlamaForCausalLM", {"tied_embeddings": True, "head_dim": 12}),
    "llama_biases": ("LlamaForCausalLM", {"attention_bias": True, "output_bias": True, "mlp_bias": True}),
    "llama_llama3": ("LlamaForCausalLM", {"rope_theta": 500.0, "rope_scaling": RopeScalingConfig(**_LLAMA3)}),
    "llama_linear": ("LlamaForCausalLM", {"rope_scaling": RopeScalingConfig(kind="linear", factor=4.0)}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", {"attention_bias": True, "norm_eps": 1e-6}),
    "qwen2_window": ("Qwen2ForCausalLM", {"attention_bias": True, "sliding_window": 8}),
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True, "head_dim": 24, "tied_embeddings": True, "rope_theta": 1e6}),
    "qwen3_yarn": ("Qwen3ForCausalLM", {"qk_norm": True, "rope_scaling": RopeScalingConfig(**_YARN)}),
    "qwen3_mixed": ("Qwen3ForCausalLM", {"qk_norm": True, "windows": (None, 8)}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "norm": "rms_offset",
            "norm_placement": "both",
            "activation": "geglu",
            "qk_norm": True,
            "windows": (8, None),
            "rope_local_theta": 500.0,
            "attention_scale": 0.25,
            "embedding_scale": 32**0.5,
        },
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {
            "norm": "layer",
            "residual": "parallel",
            "activation": "gelu_erf",
            "rope_share": 0.5,
            "kv_heads": 4,
            **dict.fromkeys(("attention_bias", "output_bias", "mlp_bias"), True),
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "norm": "layer",
            "activation": "gelu",
            "positions": "learned",
            "attention_bias": True,
            "output_bias": True,
            "mlp_bias": True,
            "tied_embeddings": True,
            "kv_heads": 4,
            "dropout": 0.1,
        },
    ),
    "mixtral": ("MixtralForCausalLM", {"moe": MoEConfig(experts=4), "rope_theta": 1e6}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"qk_norm": True, "head_dim": 12, "moe": MoEConfig(experts=4, mlp_dim=20, normalize=False, dense_layers=1)},
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        {"qk_norm": True, "qk_norm_over": "width", "moe": MoEConfig(experts=4, normalize=False)},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "mla": MLAConfig(kv_lora_rank=16, q_lora_rank=24, nope_head_dim=12, rope_head_dim=8, v_head_dim=10),
            "moe": MoEConfig(
                experts=4,
                mlp_dim=20,
                shared_mlp_dim=40,
                dense_layers=1,
                score="sigmoid",
                scale=2.5,
                groups=2,
                top_groups=1,
                balance_bias=True,
            ),
            "rope_layout": "interleaved",
            "kv_heads": 4,
            "rope_scaling": RopeScalingConfig(**_YARN, attention_factor=1.0, mscale_all_dim=1.0),
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            "activation": "swiglu_clamped",
            "attention_sinks": True,
            "attention_bias": True,
            "output_bias": True,
            "windows": (8, None),
            "head_dim": 12,
            "rope_theta": 150000.0,
            "rope_scaling": RopeScalingConfig(**_YARN, truncate=False),
            "moe": MoEConfig(experts=4, score="softmax_chosen", router_bias=True, expert_bias=True),
        },
    ),
}


def model_config(kind: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**{**_BASE, **MODELS[kind][1], **changes})


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(config)
    randomise(model)
    return model.to(dtype).eval()


def small_tokenizer() -> Tokenizer:
    return train_bpe(iter(["def f(x):\n    return x + 1\n" * 20, "the quick brown fox " * 20]), 280)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    small_tokenizer().save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_model(
    parent: Path, model: Decoder, layout: Layout | None = None, extra: dict[str, bytes] | None = None, step: int = 1
) -> Path:
    """A checkpoint with the weights, as the ranks of a layout write it: dims that tensor parallelism cuts alternate."""
    layout = layout or Layout()
    whole = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    dims = {name: number % tensor.dim() for number, (name, tensor) in enumerate(whole.items())}
    found = write(
        parent,
        lambda rank: shards_of(whole, layout, rank, dims),
        layout.devices,
        step=step,
        extra=extra,
        config={"name": "small", "model": to_dict(model.config)},
    )
    assert isinstance(found[0], Path), found
    return found[0]
