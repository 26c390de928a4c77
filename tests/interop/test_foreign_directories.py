"""What lies in people's model directories: read as transformers reads it, or named for what it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.cli import checkpoint as cli
from orchestrator.config.compose import compose
from orchestrator.errors import CheckpointError, UserError
from orchestrator.interop import logit_check
from orchestrator.interop.exporting import export_hf
from orchestrator.interop.hf_config_write import to_hf_config
from orchestrator.interop.importing import Imported, describe, detect_format, import_weights
from orchestrator.models.rope import inverse_frequencies
from orchestrator.runs import init_from
from orchestrator.runs.stored_model import find_checkpoint, model_of
from tests.lab.hf_directories import DIRECTORIES, build, fill
from tests.lab.models import VOCAB

transformers = pytest.importorskip("transformers")


def bring(source: Path, output: Path, **options: Any) -> Imported:
    """Its logits are held against those of transformers, and it must be possible."""
    return import_weights(source, str(output), detect_format(source), **{"logits": "true", **options})


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change(folder: Path, **tensors: Any) -> None:
    """Set or (None) take away tensors of the single file; `__` stands for a dot."""
    held = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        held[name.replace("__", ".")] = tensor
    kept = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def tied(tmp_path) -> Path:
    return build("qwen2_v4_tied", tmp_path)


@pytest.fixture
def llama(tmp_path) -> Path:
    return build("llama2_v4", tmp_path)


def head() -> torch.Tensor:
    return torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(5))


# The head and the embedding


def test_a_head_of_its_own_is_kept_whatever_the_flag_says(tied, tmp_path):
    change(tied, lm_head__weight=head())
    found = bring(tied, tmp_path / "out")
    assert not found.model.tied_embeddings
    assert any("head of its own" in note for note in found.report.notes)
    assert "False" in found.report.keys["tie_word_embeddings"][1]
    export_hf(Checkpoint(tmp_path / "out"), str(tmp_path / "again"), "stored", 10**9, print)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")["lm_head.weight"], head())


def test_a_head_that_is_the_embedding_again_stays_tied(tied, tmp_path):
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    change(tied, lm_head__weight=embedding.clone())
    found = bring(tied, tmp_path / "out")
    assert found.model.tied_embeddings
    assert found.left_out == 1
    assert "equal to the embedding" in found.report.tensors["lm_head.weight"][2]


def test_a_head_that_is_missing_is_not_made_up(llama, tmp_path):
    change(llama, lm_head__weight=None)
    with pytest.raises(CheckpointError, match=r"missing: +lm_head\.weight"):
        bring(llama, tmp_path / "out")


# Files


def test_the_single_file_counts_before_the_index(llama, tmp_path):
    other = build("llama31_v4_shards", tmp_path)
    for file in other.glob("model*"):
        file.rename(llama / file.name)
    found = bring(llama, tmp_path / "out")
    assert any("model.safetensors was taken" in note for note in found.report.notes)


def test_a_tensor_that_the_index_does_not_list_is_read(tmp_path):
    folder = build("llama31_v4_shards", tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    found = bring(folder, tmp_path / "out")
    assert any("does not list" in note and "model.norm.weight" in note for note in found.report.notes)


@pytest.mark.parametrize("name", ["a\0b", "\ud800.safetensors", "..", "", "x/y", "\x1b[2J", "x" * 300])
def test_names_in_an_index_that_no_file_has(tmp_path, name):
    folder = build("llama31_v4_shards", tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="does not name files of its directory"):
        bring(folder, tmp_path / "out")


def test_links_are_followed_and_said_and_one_that_leads_nowhere_is_named(tmp_path):
    snapshot = build("llama32_v5_tied_linked", tmp_path)
    found = bring(snapshot, tmp_path / "out")
    assert [
        note for note in found.report.notes if note.startswith("model.safetensors is a link to ") and "blobs" in note
    ]
    (snapshot / "model.safetensors").unlink()
    os.symlink("../../blobs/gone", snapshot / "model.safetensors")
    with pytest.raises(CheckpointError, match="a link that leads nowhere"):
        bring(snapshot, tmp_path / "again")
    (snapshot / "model.safetensors").unlink()
    os.symlink("/dev/zero", snapshot / "model.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        bring(snapshot, tmp_path / "again")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", POINTER, ["Git LFS pointer", "git lfs pull"]),
        ("config.json", POINTER, ["Git LFS pointer", "git lfs pull"]),
        ("model.safetensors", b"<!DOCTYPE html><html>", ["web page"]),
        ("config.json", b'{"model_type": "llama", "hidden_size": 3, "hidden_size": 4}', ["twice", "hidden_size"]),
    ],
)
def test_what_a_download_left_in_place_of_a_file_is_named(llama, tmp_path, name, content, words):
    (llama / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        bring(llama, tmp_path / "out")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("name", "word"),
    [("model.gguf", "llama.cpp"), ("adapter_config.json", "adapter"), ("tf_model.h5", "TensorFlow")],
)
def test_weights_in_another_format_are_named_for_what_they_are(llama, tmp_path, name, word):
    (llama / "model.safetensors").rename(llama / ("adapter_model.safetensors" if "adapter" in name else "x.old"))
    (llama / name).write_text("{}")
    with pytest.raises(CheckpointError, match=word):
        bring(llama, tmp_path / "out")


# Names


def test_names_of_an_inner_model(tmp_path):
    """Qwen3-Embedding: AutoModel saved without the prefix."""
    folder = build("qwen2_v4_tied", tmp_path)
    held = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in held.items()}, folder / "model.safetensors")
    edit(folder, architectures=["Qwen2Model"])
    assert bring(folder, tmp_path / "out").left_out == 0


def test_what_is_no_weight_of_the_model_is_named_in_the_report(llama, tmp_path, capsys):
    change(llama, score__weight=torch.ones(2, 32), model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert cli.main(["import", str(llama), f"output={tmp_path / 'out'}", "--report", "progress=false"]) == 0
    said = capsys.readouterr().out
    assert "score.weight (no weight of this model: left out)" in said
    assert "inv_freq (follows from the configuration: computed anew)" in said
    assert "model.layers.0.self_attn.q_proj.weight" in said
    assert "logits: equal to transformers" in said
    report = json.loads((tmp_path / "out" / "import.json").read_text())
    assert {row["name"] for row in report["tensors"]} == set(load_file(llama / "model.safetensors"))
    assert {row["key"] for row in report["config"]} == set(DIRECTORIES["llama2_v4"].config)


# Quantised weights, other families


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
    ],
)
def test_quantised_weights_are_named_before_they_are_opened(llama, tmp_path, changes, word):
    edit(llama, **changes)
    (llama / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=rf"the weights are quantised \({word}\)"):
        bring(llama, tmp_path / "out")


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"model__layers__0__self_attn__q_proj__weight": torch.ones(32, 32).to(torch.float8_e4m3fn)}, "F8_E4M3"),
        ({"model__layers__0__self_attn__q_proj__weight": torch.ones(32, 4).to(torch.uint32)}, "U32"),
        ({"model__layers__0__self_attn__q_proj__qweight": torch.ones(4, 32, dtype=torch.int32)}, "GPTQ or AWQ"),
        ({"model__layers__0__self_attn__q_proj__weight_scale_inv": torch.ones(1)}, "FP8"),
    ],
)
def test_quantised_weights_without_a_word_in_config_json(llama, tmp_path, tensors, word):
    change(llama, **tensors)
    with pytest.raises(CheckpointError, match=word) as caught:
        bring(llama, tmp_path / "out")
    assert "damaged" not in str(caught.value)


def test_another_family_is_said_first_whatever_the_weights_look_like(llama, tmp_path, capsys):
    edit(llama, model_type="bloom")
    change(llama, gpt_neox__layers__0__attention__bias=torch.ones(1, 1, 8, 8).bool())
    with pytest.raises(CheckpointError, match="model_type=bloom"):
        bring(llama, tmp_path / "out")
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="model_type=bloom"):
        cli.main(["import", str(llama), f"output={tmp_path / 'out'}"])


# Numbers


def test_weights_that_are_not_finite_are_named(llama, tmp_path):
    held = load_file(llama / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    held[3, 4], held[0, 0] = float("nan"), float("inf")
    change(llama, model__layers__1__mlp__up_proj__weight=held)
    with pytest.raises(CheckpointError, match=r"not finite(.|\n)*model\.layers\.1\.mlp\.up\.weight \(2 of 1,536\)"):
        bring(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_logits_that_differ_are_refused_and_nothing_is_written(llama, tmp_path, monkeypatch):
    real = logit_check._ours
    monkeypatch.setattr(logit_check, "_ours", lambda *args: real(*args) * 1.001)
    with pytest.raises(CheckpointError, match="computes something else here than in transformers"):
        bring(llama, tmp_path / "out", logits="auto")
    assert not (tmp_path / "out").exists()
    assert bring(llama, tmp_path / "out", logits="false").report.logits == "not checked: check_logits=false"


def test_why_logits_were_not_checked(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(logit_check, "_free_bytes", lambda: 1000)
    assert "GB of memory" in bring(llama, tmp_path / "a", logits="auto").report.logits
    monkeypatch.setattr(logit_check, "_theirs", lambda *args: 1 / 0)
    with pytest.raises(CheckpointError, match="transformers cannot compute this model"):
        bring(llama, tmp_path / "b")
    monkeypatch.setattr(logit_check.importlib.util, "find_spec", lambda name: None)
    assert "transformers is not installed" in bring(llama, tmp_path / "c", logits="auto").report.logits
    with pytest.raises(UserError, match="needs the package 'transformers'"):
        bring(llama, tmp_path / "d")


# Presets


def test_a_preset_is_held_against_the_config_beside_the_weights(tmp_path):
    preset = compose(["model=tiny_qwen3"]).config.model
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=preset.dim,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        head_dim=preset.head_dim if preset.head_dim != "auto" else preset.dim // preset.heads,
        intermediate_size=preset.mlp_dim,
        rms_norm_eps=preset.norm_eps,
        tie_word_embeddings=preset.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": preset.rope_theta},
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    fill(model, "preset")
    model.save_pretrained(tmp_path / "hf")
    assert bring(tmp_path / "hf", tmp_path / "a", model="tiny_qwen3").model.name == "tiny_qwen3"
    edit(tmp_path / "hf", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": preset.rope_theta})
    with pytest.raises(CheckpointError, match="not the model that config") as caught:
        bring(tmp_path / "hf", tmp_path / "b", model="tiny_qwen3")
    assert "rope_scaling" in str(caught.value)
    (tmp_path / "hf" / "config.json").unlink()
    assert "cannot show" in describe(tmp_path / "hf", model="llama3_8b").notes[0]


# What is wanted is a checkpoint, and a directory of transformers is given


def test_the_import_is_named_where_a_checkpoint_is_wanted(llama, tmp_path):
    fix = f"checkpoint import {llama} output=imported/llama2_v4"
    for place in (llama, llama / "model.safetensors"):
        with pytest.raises(CheckpointError, match="a model of other software") as caught:
            init_from.settle(compose([f"train.init_from={place}"]), True, print)
        assert fix in str(caught.value)
    with pytest.raises(CheckpointError, match="a model of other software") as caught:
        find_checkpoint(str(llama), "runs", print)
    assert fix in str(caught.value)


def test_weights_without_their_tokenizer_are_not_trained_on_one_made_on_the_spot(llama, tmp_path):
    (llama / "tokenizer.json").unlink()
    bring(llama, tmp_path / "out")
    words = [f"train.init_from={tmp_path / 'out'}", "train.seq_len=32", "train.global_batch_tokens=64"]
    with pytest.raises(CheckpointError, match="without their tokenizer") as caught:
        init_from.settle(compose(words), True, print)
    assert "data.tokenizer.path=" in str(caught.value)
    said: list[str] = []
    config = init_from.settle(compose([*words, "data.tokenizer.kind=bytes"]), True, said.append)
    assert config.data.tokenizer.kind == "bytes"
    assert "without their tokenizer" in said[0]


# Rope

_YARN = {"type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e2, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": 5e2, "rope_parameters": {"rope_type": "default", "rope_theta": 7e2}},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 7e2},
            "rope_scaling": {"type": "yarn", "factor": 4.0},
        },
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7e2}, "rope_scaling": {}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 16,
        },
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
            "original_max_position_embeddings": 16,
        },
        {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": 0, "beta_slow": None}, "rope_theta": 10000},
    ],
)
def test_rope_keys_count_in_the_order_of_transformers(llama, keys):
    """The frequencies are those that transformers makes of the same config.json."""
    edit(llama, **{"rope_scaling": ..., "rope_theta": ..., **keys})
    config = transformers.AutoConfig.from_pretrained(llama)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    found = describe(llama)
    ours, amplitude = inverse_frequencies(8, found.model.rope_theta, found.model.rope_scaling)
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)
    assert amplitude == pytest.approx(theirs.attention_scaling)
    hidden = isinstance(keys.get("rope_parameters"), dict) and bool(keys.get("rope_scaling"))
    assert any("WARNING: rope_theta=700.0" in note for note in found.notes) == hidden


# Other models of the same directory


def test_a_changed_model_is_exported_in_its_own_generation_of_config_json(tmp_path):
    """What describes the model is written anew, what does not is kept."""
    folder = build("qwen3_v5_both_ropes", tmp_path)
    edit(folder, rope_scaling=..., eos_token_id=[9, 8], auto_map={"AutoModel": "x.Y"})
    bring(folder, tmp_path / "out")
    opened = Checkpoint(tmp_path / "out")
    model = model_of(opened)
    original = json.loads(opened.read("hf_config.json"))
    assert {k: v for k, v in original.items() if k != "auto_map"} == {
        **to_hf_config(model, "qwen3", 9, "float32", original)
    }
    longer = type(model)(**{**vars(model), "rope_theta": 5e5, "max_seq_len": 128})
    written = to_hf_config(longer, "qwen3", 0, "bfloat16", original)
    assert written["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}
    assert {"rope_theta", "rope_scaling", "auto_map", "torch_dtype"}.isdisjoint(written)
    assert (written["max_position_embeddings"], written["dtype"]) == (128, "bfloat16")
    assert written["eos_token_id"] == [0, 9, 8], "the token that ends documents here is put before the model's"
    assert (written["bos_token_id"], written["pad_token_id"]) == (1, 3)
    assert transformers.AutoConfig.for_model(**written).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rope_scaling": {"rope_type": {"a": 1}, "factor": [2]}}, "rope_type"),
        ({"rope_scaling": {"type": "yarn", "factor": "four"}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        ({"layer_types": [{}, []]}, "layer_types"),
        ({"quantization_config": ["fp8"]}, "quantised"),
        ({"task_specific_params": json.loads("[" * 90 + "]" * 90)}, "nested too deep"),
        ({"\x1b[2J": 1}, "not known what they change"),
    ],
)
def test_values_of_config_json_that_nobody_means(llama, tmp_path, change, word):
    edit(llama, **{"rope_scaling": None, **change})
    with pytest.raises(CheckpointError, match=word) as caught:
        bring(llama, tmp_path / "out")
    assert "\x1b" not in str(caught.value)


def test_a_number_in_config_json_that_is_none(llama, tmp_path):
    """Some published ones have NaN; the report stays JSON that every reader takes."""
    edit(llama, bad_words_ids=float("nan"))
    bring(llama, tmp_path / "out", logits="false")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / "out" / "import.json").read_text(), parse_constant=refuse)
