"""Tiny model directories as people have them: several families, both generations of config.json, shards, links.

The weights are large and random (norms 1±0.3, matrices of std 1.5/sqrt(fan_in), embeddings of std 1): what is read
wrongly shows in the logits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.lab.models import VOCAB, small_tokenizer

_IDS = {"bos_token_id": 1, "eos_token_id": [0, 5, 7], "pad_token_id": 3}
_SHARED = {
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "use_cache": True,
    "transformers_version": "4.44.0",
    **_IDS,
}
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_PLAIN = {"rope_type": "default", "rope_theta": 1e6}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def _config(family: str, name: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [name], "model_type": family, **_SIZES, **_SHARED, **changes}


def _llama(**changes: Any) -> dict[str, Any]:
    more = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "_name_or_path": "a/b"}
    return _config("llama", "LlamaForCausalLM", **{**more, **changes})


def _qwen(family: str, **changes: Any) -> dict[str, Any]:
    more = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2, "use_mrope": False}
    return _config(family, f"{family.title()}ForCausalLM", **{**more, **changes})


def _gpt2(**changes: Any) -> dict[str, Any]:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "layer_norm_epsilon": 1e-5}
    more = {"activation_function": "gelu_new", "initializer_range": 0.02, "summary_type": "cls_index"}
    more |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    shared = {**_SHARED, "eos_token_id": 0, "tie_word_embeddings": True}
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes, **more, **shared, **changes}


def _neox(**changes: Any) -> dict[str, Any]:
    shared = {key: value for key, value in _SIZES.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    more = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000}
    more |= {"use_parallel_residual": True, "hidden_dropout": 0.0, "attention_bias": True, "rope_scaling": None}
    name = ["GPTNeoXForCausalLM"]
    return {"architectures": name, "model_type": "gpt_neox", **shared, **_SHARED, **more, **changes}


def _gemma3(**changes: Any) -> dict[str, Any]:
    more: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 12, "query_pre_attn_scalar": 12}
    more |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True}
    more |= {"final_logit_softcapping": None, "attn_logit_softcapping": None, "attention_bias": False}
    local, whole = ({"rope_type": "default", "rope_theta": theta} for theta in (1e4, 1e6))
    more |= {"rope_parameters": {"full_attention": whole, "sliding_attention": local}}
    given = _config("gemma3_text", "Gemma3ForCausalLM", **more, **changes)
    del given["hidden_act"]
    return given


@dataclass(frozen=True)
class Directory:
    """One of them.

    Attributes:
        config: its config.json, in the generation that it has.
        shards: bytes of a file of weights.
        linked: it lies in the hub's cache, where a snapshot is a folder of links.
        touch: what is done to it after transformers has written it.
    """

    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    shards: str = "1GB"
    linked: bool = False
    touch: Callable[[Path], None] = lambda folder: None


def _rename(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def inner_names(folder: Path) -> None:
    """As files that were saved from the inner model, with the masks that old ones have."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril().to(torch.uint8) for layer in range(2)}
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks

    _rename(folder, change)


def head_alone(folder: Path) -> None:
    """A tied table under the name of the head."""
    _rename(folder, lambda tensors: {_HEAD.get(name, name): tensor for name, tensor in tensors.items()})


_HEAD = {"model.embed_tokens.weight": "lm_head.weight"}
_FIVE = {"transformers_version": "5.23.0", "dtype": "float32"}
DIRECTORIES: dict[str, Directory] = {
    "llama2_v4": Directory(_llama(rope_scaling=None, rope_theta=10000.0, torch_dtype="float16"), torch.float16),
    "llama31_v4_shards": Directory(
        _llama(rope_scaling=_LLAMA3, rope_theta=500.0, torch_dtype="float32"), shards="20KB"
    ),
    "llama32_v5_tied_linked": Directory(
        _llama(rope_parameters={**_LLAMA3, "rope_theta": 500.0}, tie_word_embeddings=True, head_dim=8, **_FIVE),
        linked=True,
    ),
    "llama_v4_yarn": Directory(
        _llama(
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "finetuned": True},
            torch_dtype="float32",
            auto_map={"AutoModelForCausalLM": "modeling_llama_yarn.LlamaForCausalLM"},
        )
    ),
    "llama_v5_length_outside": Directory(
        _llama(rope_parameters={**_YARN, "rope_theta": 1e4}, original_max_position_embeddings=32, **_FIVE)
    ),
    "mistral_v4_window": Directory(
        _config("mistral", "MistralForCausalLM", sliding_window=8, rope_theta=1e6, torch_dtype="bfloat16"),
        torch.bfloat16,
    ),
    "mistral_v5_shards_linked": Directory(
        _config("mistral", "MistralForCausalLM", sliding_window=None, head_dim=12, rope_parameters=_PLAIN, **_FIVE),
        shards="20KB",
        linked=True,
    ),
    "qwen2_v4_tied": Directory(_qwen("qwen2", tie_word_embeddings=True, rope_theta=1e6, torch_dtype="float32")),
    "qwen2_v4_yarn_head_alone": Directory(
        _qwen(
            "qwen2",
            tie_word_embeddings=True,
            rope_theta=1e6,
            rope_scaling={"type": "yarn", "factor": 4.0},
            torch_dtype="float32",
        ),
        touch=head_alone,
    ),
    "qwen3_v5_both_ropes": Directory(
        _qwen(
            "qwen3",
            head_dim=24,
            attention_bias=False,
            rope_parameters=_PLAIN,
            rope_scaling={**_YARN, "rope_theta": 1e6},
            **_FIVE,
        )
    ),
    "neox_v4_parallel": Directory(_neox(torch_dtype="float16"), torch.float16, shards="20KB"),
    "gemma3_v5_windows": Directory(_gemma3(**_FIVE)),
    "gpt2_v4_inner": Directory(_gpt2(), touch=inner_names),
    "gpt2_v5_untied": Directory(_gpt2(tie_word_embeddings=False, n_inner=40, **_FIVE), shards="20KB"),
}


def build(name: str, parent: Path) -> Path:
    """Write one of them; returns the directory that a user would name."""
    import transformers

    about = DIRECTORIES[name]
    rest = {key: value for key, value in about.config.items() if key not in ("model_type", "auto_map")}
    config = transformers.AutoConfig.for_model(about.config["model_type"], **json.loads(json.dumps(rest)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    fill(model, name)
    folder = parent / name
    model.to(about.dtype).save_pretrained(folder, max_shard_size=about.shards)
    about.touch(folder)
    (folder / "config.json").write_text(json.dumps(about.config, indent=2) + "\n")
    write_beside(folder)
    return hub_cache(folder, parent / "hub") if about.linked else folder


def fill(model: Any, seed: str) -> None:
    """Large random weights."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:8], 16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name or ".ln_" in name else 0.0) * ("bias" not in name))
            elif "embed" in name or "wte" in name:
                parameter.copy_(noise)
            else:
                transposed = ".c_" in name  # Conv1D: [in, out]
                parameter.copy_(1.5 * noise / parameter.shape[0 if transposed else 1] ** 0.5)


def write_beside(folder: Path) -> None:
    """What lies beside the weights: a tokenizer, settings of generation, a chat template."""
    small_tokenizer().save(folder)
    settings = {"bos_token_id": 1, "eos_token_id": [0, 5, 7], "pad_token_id": 3, "do_sample": True, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


def hub_cache(folder: Path, root: Path) -> Path:
    """The same directory as the cache of the hub has it: blobs by their hash, and a snapshot of links to them."""
    model = root / f"models--a--{folder.name}"
    snapshot = model / "snapshots" / "0123456789abcdef"
    (model / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(model / "blobs" / blob)
        os.symlink(f"../../blobs/{blob}", snapshot / file.name)
    return snapshot
