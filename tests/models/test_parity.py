"""Logits equal those of transformers' implementations, with weights moved over by the name tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from orchestrator.config.schema import MLAConfig, ModelConfig, MoEConfig, RopeScalingConfig
from orchestrator.errors import CheckpointError
from orchestrator.interop.hf_weights import from_hf, to_hf
from orchestrator.models.decoder import Decoder
from tests.models.conftest import randomise

transformers = pytest.importorskip("transformers")

V, D, L, H, KV, M, T = 97, 64, 2, 4, 2, 112, 48
OURS = {"vocab_size": V, "dim": D, "layers": L, "heads": H, "kv_heads": KV, "mlp_dim": M, "max_seq_len": 64}
THEIRS = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": KV,
    "intermediate_size": M,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attn_implementation": "sdpa",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT2 = {
    "norm": "layer",
    "activation": "gelu",
    "positions": "learned",
    "attention_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "tied_embeddings": True,
    "kv_heads": H,
    "mlp_dim": 4 * D,
}


def rope(kind: str, theta: float = 10000.0, original: int | None = None, **parameters: float) -> dict[str, object]:
    """Their `rope_parameters`."""
    length = {} if original is None else {"original_max_position_embeddings": original}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters, **length}}


def scaled(kind: str, original: int, **parameters: float) -> dict[str, object]:
    return {"rope_scaling": RopeScalingConfig(kind=kind, original_max_seq_len=original, **parameters)}  # type: ignore[arg-type]


DEEPSEEK_MOE = MoEConfig(
    experts=8,
    top_k=3,
    mlp_dim=40,
    shared_mlp_dim=80,
    dense_layers=1,
    score="sigmoid",
    scale=2.5,
    groups=4,
    top_groups=2,
    balance_bias=True,
)
DEEPSEEK: dict = {
    "mla": MLAConfig(kv_lora_rank=24, q_lora_rank=40, nope_head_dim=12, rope_head_dim=8, v_head_dim=20),
    "moe": DEEPSEEK_MOE,
    "rope_layout": "interleaved",
}
DEEPSEEK_YARN = scaled("yarn", 16, factor=4.0, attention_factor=1.0, mscale_all_dim=1.0)
DEEPSEEK_THEIRS = {
    "num_key_value_heads": H,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "v_head_dim": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
GPT_OSS = {
    "activation": "swiglu_clamped",
    "attention_sinks": True,
    "attention_bias": True,
    "output_bias": True,
    "windows": (8, None),
    "head_dim": 24,
    "rope_theta": 150000.0,
    **scaled("yarn", 16, factor=4.0, truncate=False),
    "moe": MoEConfig(experts=6, top_k=2, score="softmax_chosen", router_bias=True, expert_bias=True),
}


# name -> family, what differs in our configuration, their class of configuration, what differs in it
CASES: dict[str, tuple[str, dict, str, dict]] = {
    "llama": ("llama", {}, "Llama", rope("default")),
    "llama_llama3": (
        "llama",
        {"rope_theta": 500.0, **scaled("llama3", 32, **LLAMA3)},
        "Llama",
        rope("llama3", 500.0, 32, **LLAMA3),
    ),
    "llama_linear": ("llama", scaled("linear", 16, factor=4.0), "Llama", rope("linear", factor=4.0)),
    "llama_yarn": (
        "llama",
        scaled("yarn", 16, factor=4.0),
        "Llama",
        rope("yarn", original=16, factor=4.0, beta_fast=32.0, beta_slow=1.0),
    ),
    "llama_yarn_long": (
        "llama",
        {"rope_theta": 1e6, **scaled("yarn", 32768, factor=4.0)},
        "Llama",
        rope("yarn", 1e6, 32768, factor=4.0) | {"max_position_embeddings": 131072},
    ),
    "llama_biases": (
        "llama",
        {"attention_bias": True, "output_bias": True, "mlp_bias": True},
        "Llama",
        rope("default") | {"attention_bias": True, "mlp_bias": True},
    ),
    "qwen3": (
        "qwen3",
        {"qk_norm": True, "tied_embeddings": True, "head_dim": 24},
        "Qwen3",
        rope("default") | {"head_dim": 24, "tie_word_embeddings": True},
    ),
    "qwen2": ("qwen2", {"attention_bias": True}, "Qwen2", rope("default")),
    "mistral": ("mistral", {"sliding_window": 8}, "Mistral", rope("default") | {"sliding_window": 8}),
    "mixtral": (
        "mixtral",
        {"rope_theta": 1e6, "sliding_window": 24, "moe": MoEConfig(experts=6, top_k=2)},
        "Mixtral",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 24},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"qk_norm": True, "moe": MoEConfig(experts=8, top_k=3, mlp_dim=40, normalize=False, dense_layers=1)},
        "Qwen3Moe",
        rope("default")
        | {"num_local_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    "olmoe": (
        "olmoe",
        {"qk_norm": True, "qk_norm_over": "width", "moe": MoEConfig(experts=8, top_k=3, normalize=False)},
        "Olmoe",
        rope("default") | {"num_experts": 8, "num_experts_per_tok": 3},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**DEEPSEEK, **DEEPSEEK_YARN, "kv_heads": H},
        "DeepseekV3",
        DEEPSEEK_THEIRS | rope("yarn", original=16, factor=4.0, mscale=1.0, mscale_all_dim=1.0),
    ),
    "deepseek_v3_plain": (
        "deepseek_v3",
        {**DEEPSEEK, "mla": MLAConfig(24, None, 12, 8, 20), "rope_layout": "half", "kv_heads": H},
        "DeepseekV3",
        DEEPSEEK_THEIRS | rope("default") | {"q_lora_rank": None, "rope_interleave": False},
    ),
    "gpt_oss": (
        "gpt_oss",
        GPT_OSS,
        "GptOss",
        {
            **rope("yarn", 150000.0, 16, factor=4.0, truncate=False),
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 24,
            "sliding_window": 8,
            "attn_implementation": "eager",
        },
    ),
}
FUSED = [name for name, case in CASES.items() if "moe" in case[1]]


def build(case: str) -> tuple[Decoder, torch.nn.Module, str]:
    """Our model and theirs with the same random weights, and the family."""
    if case == "gpt2":
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=H, n_positions=64)
        )
        family, config = "gpt2", ModelConfig(**{**OURS, **GPT2})
    else:
        family, changes, name, their_changes = CASES[case]
        foreign = getattr(transformers, f"{name}Config")(**{**THEIRS, **their_changes})
        theirs = getattr(transformers, f"{name}ForCausalLM")(foreign)
        config = ModelConfig(**{**OURS, **changes})
    randomise(theirs)
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)))
    ours = Decoder(config)
    ours.load_state_dict(from_hf(theirs.state_dict(), family, config), strict=False)  # type: ignore[arg-type]
    return ours.eval(), theirs.eval(), family


@pytest.mark.parametrize("case", [*CASES, "gpt2"])
def test_logits(case: str) -> None:
    ours, theirs, _ = build(case)
    tokens = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = ours(tokens), theirs(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [*CASES, "gpt2"])
def test_round_trip_is_exact(case: str) -> None:
    ours, theirs, family = build(case)
    given = dict(theirs.state_dict())
    if ours.config.tied_embeddings:
        del given["lm_head.weight"]
    parameters = dict(ours.named_parameters())
    same(to_hf(parameters, family, ours.config, given), given)  # type: ignore[arg-type]
    same(from_hf(given, family, ours.config), parameters)  # type: ignore[arg-type]
    # A state dict lists a tied head too.
    same(to_hf(ours.state_dict(), family, ours.config, given), given)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", FUSED)
def test_experts_have_the_names_and_bytes_that_transformers_saves(case: str, tmp_path: Path) -> None:
    ours, theirs, family = build(case)
    parameters = dict(ours.named_parameters())
    for fused in (False, True):
        theirs.save_pretrained(tmp_path / str(fused), save_original_format=not fused)
        saved = load_file(tmp_path / str(fused) / "model.safetensors")
        same(to_hf(parameters, family, ours.config, saved if fused else ()), saved)  # type: ignore[arg-type]
        same(from_hf(saved, family, ours.config), parameters)  # type: ignore[arg-type]


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def test_gpt2_files_from_the_hub_lack_a_prefix_and_hold_masks() -> None:
    ours, theirs, _ = build("gpt2")
    hub = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    hub["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    same(from_hf(hub, "gpt2", ours.config), dict(ours.named_parameters()))


def test_tensors_that_do_not_fit_are_named() -> None:
    ours, theirs, _ = build("llama")
    given = dict(theirs.state_dict())
    with pytest.raises(CheckpointError, match=r"missing:   model\.norm\.weight"):
        from_hf({name: t for name, t in given.items() if name != "model.norm.weight"}, "llama", ours.config)
    with pytest.raises(CheckpointError, match=r"left over: model\.surprise"):
        from_hf({**given, "model.surprise": torch.ones(1)}, "llama", ours.config)
    with pytest.raises(CheckpointError, match=r"norm\.weight: \(3,\), wanted \(64,\)"):
        from_hf({**given, "model.norm.weight": torch.ones(3)}, "llama", ours.config)
    with pytest.raises(CheckpointError, match="no counterpart"):
        from_hf(given, "llama", ModelConfig(**{**OURS, "qk_norm": True}))
    with pytest.raises(CheckpointError, match="family"):
        from_hf(given, "t5", ours.config)  # type: ignore[arg-type]
