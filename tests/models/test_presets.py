"""The model presets: complete, readable by the schema, and of the published sizes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml

from orchestrator.config.convert import from_dict
from orchestrator.config.schema import MLAConfig, ModelConfig, MoEConfig, RopeScalingConfig
from orchestrator.models.decoder import Decoder
from orchestrator.planner.estimate.flops import flops_per_token, parameter_count

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "model"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PUBLISHED = {
    "gpt2": 124_439_808,
    "llama3_2_1b": 1_235_814_400,
    "llama3_0_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "mistral_7b": 7_241_732_096,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "olmo2_1b": 1_484_916_736,
    "olmo3_7b": 7_298_011_136,
    "pythia_160m": 162_322_944,
    "smollm3_3b": 3_075_098_624,
    "phi3_mini": 3_821_079_552,
    "starcoder2_3b": 3_030_371_328,
    "mixtral_8x7b": 46_702_792_704,
    "qwen3_30b_a3b": 30_532_122_624,
    "olmoe_1b_7b": 6_919_161_856,
    "deepseek_v3": 671_026_419_200,
    "gpt_oss_20b": 20_914_757_184,
}
GROUPS = ("rope_scaling", "moe", "mla")
# Active for a token, in billions as their reports say.
ACTIVE = {"mixtral_8x7b": 12.9, "qwen3_30b_a3b": 3.3, "olmoe_1b_7b": 1.28, "deepseek_v3": 37.0, "gpt_oss_20b": 3.61}
WITHOUT_EMBEDDING = ("gpt_oss_20b",)
OWN = {
    "tiny": 1_279_104,
    "tiny_qwen3": 1_312_256,
    "tiny_gpt2": 1_448_704,
    "llama_20m": 20_453_760,
    "llama_125m": 124_668_672,
    "tiny_gemma3": 1_560_064,
    "tiny_olmo2": 1_902_720,
    "tiny_neox": 1_841_920,
    "tiny_moe": 2_757_760,
    "tiny_mixtral": 697_152,
    "tiny_qwen3_moe": 710_048,
    "tiny_olmoe": 706_112,
    "tiny_deepseek": 699_488,
    "tiny_gpt_oss": 625_104,
}


def read(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def preset(name: str, vocab_size: int = 4096) -> ModelConfig:
    """The preset as Hydra composes it; `vocab_size` where it leaves that to the tokenizer."""
    base, own = read("base"), read(name)
    own.pop("defaults", None)
    data = {**base, **own, **{key: {**base[key], **own.get(key, {})} for key in GROUPS}}
    if data["vocab_size"] == "auto":
        data["vocab_size"] = vocab_size
    return from_dict(ModelConfig, data)


def test_base_documents_every_key() -> None:
    text, base = (FOLDER / "base.yaml").read_text(), read("base")
    assert list(base) == [field.name for field in fields(ModelConfig)]
    assert list(base["rope_scaling"]) == [field.name for field in fields(RopeScalingConfig)]
    assert list(base["mla"]) == [field.name for field in fields(MLAConfig)]
    assert list(base["moe"]) == [field.name for field in fields(MoEConfig)]
    assert all("#" in line for line in text.splitlines())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "base"])
def test_preset_starts_from_base_and_names_its_source(name: str) -> None:
    text, own = (FOLDER / f"{name}.yaml").read_text(), read(name)
    assert text.startswith("# ")
    assert own["defaults"] == ["base", "_self_"]
    assert own["name"] == name
    assert name in OWN or "Source: " in text
    count = parameter_count(preset(name)).total
    assert f"{count:,}" in text or f"{count / 1e6:.1f}M" in text


def test_every_preset_has_an_expected_size() -> None:
    assert set(NAMES) - {"base"} == set(PUBLISHED) | set(OWN)


@pytest.mark.parametrize("name", NAMES)
def test_count_agrees_with_the_model_and_with_the_publication(name: str) -> None:
    config = preset(name)
    count = parameter_count(config)
    assert count.total == {**PUBLISHED, **OWN}.get(name, count.total)
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count.total
    assert sum(p.numel() for n, p in model.named_parameters() if ".attn." in n) == count.attention
    assert sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n) == count.mlp
    assert sum(p.numel() for n, p in model.named_parameters() if "_norm" in n and ".attn." not in n) == (
        count.norms - sum(p.numel() for p in model.norm.parameters())
    )


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_those_of_the_report(name: str) -> None:
    """Some of which cut rather than round: to 2%."""
    count = parameter_count(preset(name))
    counted = count.active - (count.embedding if name in WITHOUT_EMBEDDING else 0)
    assert f"{count.active:,}" in (FOLDER / f"{name}.yaml").read_text()
    assert counted / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)
    assert count.matmul < count.active < count.total


def test_arithmetic_counts_active_experts_alone() -> None:
    mixed = preset("tiny_moe")
    dense = replace(mixed, moe=MoEConfig(), mlp_dim=mixed.moe.top_k * mixed.moe.width(mixed))
    router = mixed.layers * mixed.dim * mixed.moe.experts
    assert parameter_count(mixed).active == parameter_count(dense).total + router
    assert flops_per_token(mixed, 64) == flops_per_token(dense, 64) + 6 * router
