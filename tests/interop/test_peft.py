"""Adapters to PEFT and from it, and merged: the logits of PEFT's own model, on families of several kinds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from orchestrator.checkpoint.adapters import STATE_KEY, record_for
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.writer import Contents, save
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import LoraConfig
from orchestrator.constants import LORA_A, LORA_B
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.errors import CheckpointError
from orchestrator.inference.generator import load_decoder
from orchestrator.interop.exporting import export_hf
from orchestrator.interop.peft_adapters import ADAPTER_WEIGHTS, export_peft, import_peft
from orchestrator.models.decoder import Decoder
from orchestrator.models.lora import apply_lora, lora_scale
from orchestrator.sharding.shard import Shard
from tests.lab.models import VOCAB, model_config, random_model, save_model
from tests.lab.slow import cases

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
TOKENS = torch.arange(24).reshape(2, 12) % VOCAB
LORA = LoraConfig(rank=4, alpha=6.0)
CASES = {
    "llama": LORA,
    "llama_biases": replace(LORA, rslora=True, target_modules=("q", "v", "down")),
    "gpt2": LORA,  # queries, keys and values are one matrix, transposed
    "gpt_neox": replace(LORA, target_modules=("q", "v", "up")),  # one matrix, head by head; keys have no adapter
    "qwen3_moe": replace(LORA, target_modules=("q", "k", "v", "o")),
    "deepseek_v3": replace(LORA, target_modules=("q_down", "q_up", "kv_down", "kv_up", "o")),
}


def shards(tensors):
    whole = lambda tensor: tuple(slice(0, size) for size in tensor.shape)  # noqa: E731
    return [Shard(name, tuple(tensor.shape), whole(tensor), tensor) for name, tensor in tensors.items()]


def adapted(parent, kind, lora):
    """A base, a model with random adapters beside it, and the checkpoint of these."""
    model = random_model(model_config(kind, dropout=0.0))
    base = Checkpoint(save_model(parent / "base", model))
    apply_lora(model, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    tensors = {f"model.{name}": one.detach() for name, one in model.named_parameters() if one.requires_grad}
    record = record_for(base, lora_scale(lora), parent / "saved" / "step-00000001")
    config = {"name": "small", "model": to_dict(model.config), "train": {"lora": to_dict(lora)}}
    contents = Contents({"step": 1, STATE_KEY: record.to_dict()}, config)
    return base, model.eval(), Checkpoint(save(parent / "saved", 1, shards(tensors), SingleProcess(), contents))


def logits(model):
    with torch.no_grad():
        result = model(TOKENS)
    return getattr(result, "logits", result)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def assert_same(ours, theirs, relative=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * theirs.abs().max().item())


@pytest.mark.parametrize("kind", cases(CASES, quick=["llama", "gpt2"]))
def test_merged_exported_and_loaded_by_peft_the_logits_are_the_same(tmp_path, kind):
    base, model, saved = adapted(tmp_path, kind, CASES[kind])
    unmerged = logits(model)
    assert (unmerged - logits(load_decoder(base, CPU))).abs().max() > 0.1 * unmerged.abs().max()
    assert_same(logits(load_decoder(saved, CPU)), unmerged)
    for one, name in ((saved, "merged"), (base, "hf")):
        export_hf(one, str(tmp_path / name), "stored", 1 << 30, lambda done: None)
    assert_same(logits(load(tmp_path / "merged")), unmerged)
    export_peft(saved, str(tmp_path / "peft"), "stored")
    theirs = peft.PeftModel.from_pretrained(load(tmp_path / "hf"), tmp_path / "peft")
    assert_same(logits(theirs), unmerged)
    back = import_peft(tmp_path / "peft", str(tmp_path / "back" / "step-00000000"), base)
    assert back.layers >= len([name for name in saved.manifest.tensors if name.endswith(LORA_A)])
    assert_same(logits(load_decoder(Checkpoint(tmp_path / "back" / "step-00000000"), CPU)), unmerged)


def test_dense_layers_of_a_model_with_experts_are_merged_and_not_exported(tmp_path):
    _, model, saved = adapted(tmp_path, "qwen3_moe", LORA)
    assert_same(logits(load_decoder(saved, CPU)), logits(model))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\."):
        export_peft(saved, str(tmp_path / "peft"), "stored")


def test_what_peft_saves_is_computed_as_peft_does(tmp_path):
    """Patterns of ranks and alphas, some layers only, and rank-stabilised scales."""
    model = random_model(model_config("llama"))
    base = Checkpoint(save_model(tmp_path / "base", model))
    export_hf(base, str(tmp_path / "hf"), "stored", 1 << 30, lambda done: None)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2, "model.layers.0.mlp.down_proj": 3},
        alpha_pattern={"v_proj": 5},
        layers_to_transform=None,
        use_rslora=True,
        lora_dropout=0.1,
    )
    theirs = peft.get_peft_model(load(tmp_path / "hf"), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    found = import_peft(tmp_path / "adapter", str(tmp_path / "step-00000000"), base)
    assert (found.lora.rank, found.lora.dropout, found.lora.target_modules) == (4, 0.1, ("down", "q", "v"))
    merged = load_decoder(Checkpoint(tmp_path / "step-00000000"), CPU)
    assert_same(logits(merged), logits(theirs))
    # Rank 2 has become 4: the rows and columns that were added are zeros.
    shapes = {name: one.shape for name, one in Checkpoint(tmp_path / "step-00000000").manifest.tensors.items()}
    assert {shape[0] for name, shape in shapes.items() if name.endswith(LORA_A)} == {4}
    assert {shape[1] for name, shape in shapes.items() if name.endswith(LORA_B)} == {4}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"something_new": True}, "something_new"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "alpha_pattern"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_what_is_more_than_lora_is_refused(tmp_path, change, said):
    base, _, saved = adapted(tmp_path, "llama", LORA)
    export_peft(saved, str(tmp_path / "peft"), "stored")
    path = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(path.read_text()) | change
    if change == {"lora_alpha": None}:
        del config["lora_alpha"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        import_peft(tmp_path / "peft", str(tmp_path / "new"), base)
    assert not (tmp_path / "new").exists()


def test_adapters_of_another_model_and_damaged_ones_are_refused(tmp_path):
    base, _, saved = adapted(tmp_path, "llama", LORA)
    other = Checkpoint(save_model(tmp_path / "other", random_model(model_config("llama", dim=64))))
    export_peft(saved, str(tmp_path / "peft"), "bf16")
    with pytest.raises(CheckpointError, match="does not fit its matrix"):
        import_peft(tmp_path / "peft", str(tmp_path / "new"), other)
    with pytest.raises(CheckpointError, match="adapters itself"):
        import_peft(tmp_path / "peft", str(tmp_path / "new"), saved)
    with pytest.raises(CheckpointError, match="whole weights"):
        export_peft(base, str(tmp_path / "new"), "stored")
    weights = tmp_path / "peft" / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_peft(tmp_path / "peft", str(tmp_path / "new"), base)


def test_a_base_that_is_gone_or_another_one_is_said(tmp_path):
    base, model, saved = adapted(tmp_path, "llama", LORA)
    moved = tmp_path / "moved"
    (tmp_path / "new").mkdir()
    base.directory.parent.rename(moved)
    with pytest.raises(CheckpointError, match="not where the checkpoint says"):
        load_decoder(saved, CPU)
    moved.rename(tmp_path / "new" / "base")
    (tmp_path / "saved").rename(tmp_path / "new" / "saved")  # as they lay to each other
    found = Checkpoint(tmp_path / "new" / "saved" / saved.directory.name)
    assert_same(logits(load_decoder(found, CPU)), logits(model))
    (tmp_path / "new" / "base").rename(tmp_path / "gone")
    plain = Decoder(model.config)
    save_model(tmp_path / "new" / "base", plain)
    with pytest.raises(CheckpointError, match="not the weights"):
        load_decoder(found, CPU)
