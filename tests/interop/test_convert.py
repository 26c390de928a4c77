"""Weights for other software and from it: equal logits, equal bytes, equal tokens, and clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reader import Reader
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.data.tokenize import load_tokenizer
from orchestrator.errors import CheckpointError, ConfigErrors, UserError
from orchestrator.interop import hf_files_write
from orchestrator.interop.exporting import export_dcp, export_hf, weight_bytes
from orchestrator.interop.importing import detect_format, import_weights
from orchestrator.models.decoder import Decoder
from orchestrator.runs.stored_model import model_of
from orchestrator.sharding.layout import Layout
from tests.lab import runs
from tests.lab.models import MODELS, VOCAB, model_config, random_model, save_model, small_tokenizer, tokenizer_files
from tests.lab.tensors import read_all

transformers = pytest.importorskip("transformers")

TEXT = "def f(x):\n    return x + 1  # the quick brown fox, naïve 狐"
GB = 10**9


def nothing(*done: int) -> None:
    pass


def export(checkpoint: Path, output: Path, dtype: Any = "stored", limit: int = 5 * GB) -> Path:
    export_hf(Checkpoint(checkpoint), str(output), dtype, limit, nothing)
    return output


def bring(source: Path, output: Path, **options: Any) -> Path:
    import_weights(source, str(output), detect_format(source), **options)
    return output


def tokens(vocab: int = VOCAB, length: int = 32) -> torch.Tensor:
    return torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(1))


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def load_ours(checkpoint: Path) -> Decoder:
    opened = Checkpoint(checkpoint)
    model = Decoder(model_of(opened))
    reader = Reader(opened)
    model.load_state_dict({name: reader.tensor(f"model.{name}") for name, _ in model.named_parameters()}, strict=False)
    model.tie_weights()
    return model.eval()


# Logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(tmp_path, name):
    """Written by four ranks, fsdp2 x tensor2."""
    ours = random_model(model_config(name))
    saved = save_model(tmp_path / "run", ours, Layout(fsdp=2, tensor=2))
    exported = export(saved, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert type(theirs).__name__ == MODELS[name][0]
    expected = logits_of(ours, tokens())
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of(theirs.eval(), tokens()), expected, atol=1e-5, rtol=0)
    held = theirs.state_dict() | ({"lm_head.weight": torch.empty(0)} if ours.config.tied_embeddings else {})
    assert sum(tensor.numel() for tensor in held.values()) == sum(p.numel() for p in ours.parameters())
    # And back: the same model, bit for bit, and its logits.
    assert torch.equal(logits_of(load_ours(bring(exported, tmp_path / "back")), tokens()), expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of 4 ranks, fsdp2 x tensor2, after 10 steps."""
    tmp = tmp_path_factory.mktemp("trained")
    config = runs.small_config(tmp, "layout.fsdp=2", "layout.tensor=2", "train.max_steps=10", "hardware.devices=4")
    runs.train(config, 4, tmp / "run")
    return runs.checkpoint(tmp / "run", 10)


def test_a_trained_checkpoint(trained, tmp_path):
    exported = export(trained, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    ours = load_ours(trained)
    ids = torch.tensor([load_tokenizer(trained).encode(TEXT)])
    torch.testing.assert_close(logits_of(theirs, ids), logits_of(ours, ids), atol=1e-5, rtol=0)
    assert theirs.config.eos_token_id == load_tokenizer(trained).eos_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer(TEXT)["input_ids"] == ids[0].tolist()
    weights = {name: t for name, t in read_all(trained).items() if name.startswith("model.")}
    same(read_all(bring(exported, tmp_path / "back")), weights)


# Bytes


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


FAMILIES = ["llama", "qwen3", "gpt2", "gpt_neox", "gemma3", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_import_then_export_gives_the_same_bytes_back(tmp_path, name, dtype):
    """Of files that transformers itself wrote, one and several: the same files, in the same order, byte for byte."""
    config = transformers.AutoConfig.from_pretrained(export(save(tmp_path, name), tmp_path / "first"))
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for size in ("20KB", "1GB"):
        given, imported, again = (tmp_path / f"{kind}-{size}" for kind in ("theirs", "imported", "again"))
        theirs.save_pretrained(given, max_shard_size=size)
        assert (given / "model.safetensors.index.json").exists() == (size == "20KB")
        bring(given, imported)
        assert {tensor.dtype for tensor in read_all(imported).values()} == {dtype}
        export(imported, again)
        for file in given.iterdir():
            if file.name != "generation_config.json":
                assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    smaller = export(imported, tmp_path / "smaller", limit=15_000)
    same(load_all(smaller), load_all(given))
    assert len(list(smaller.glob("*.safetensors"))) > 2
    assert export_json(export(imported, tmp_path / "half", "fp16"))["dtype"] == "float16"


def export_json(exported: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((exported / "config.json").read_text())
    return content


def save(tmp_path: Path, name: str, **options: Any) -> Path:
    return save_model(tmp_path / f"run-{name}", random_model(model_config(name)), **options)


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_tensors_of_different_formats_keep_their_own(tmp_path):
    exported = export(save(tmp_path, "llama"), tmp_path / "hf")
    tensors = load_file(exported / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    same(load_all(export(bring(exported, tmp_path / "back"), tmp_path / "again")), tensors)


@pytest.mark.parametrize(("dtype", "wanted"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_another_dtype(tmp_path, dtype, wanted):
    saved = save(tmp_path, "gpt2")
    got = load_all(export(saved, tmp_path / "hf", dtype))
    plain = load_all(export(saved, tmp_path / "plain"))
    same(got, {name: tensor.to(wanted) for name, tensor in plain.items()})
    assert weight_bytes(Checkpoint(saved), dtype) * 2 == weight_bytes(Checkpoint(saved), "stored")


def test_files_are_as_small_as_asked_and_in_the_usual_form(tmp_path):
    done: list[int] = []
    saved = save(tmp_path, "llama")
    export_hf(Checkpoint(saved), str(tmp_path / "hf"), "stored", 20_000, done.append)
    assert sum(done) == weight_bytes(Checkpoint(saved), "stored")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(done)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = set(opened.keys())
            assert {name for name, where in index["weight_map"].items() if where == file.name} == names
        assert file.stat().st_size < 25_000 or len(names) == 1


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    alive: list[int] = []
    real = Reader.tensor

    def tensor(self, name, box=None):
        found = real(self, name, box)
        alive.append(found.numel())
        return found

    monkeypatch.setattr(Reader, "tensor", tensor)
    written: list[int] = []

    def note(done: int) -> None:
        written.append(len(alive))

    export_hf(Checkpoint(save(tmp_path, "llama")), str(tmp_path / "hf"), "stored", GB, note)
    assert written == list(range(1, len(written) + 1)), "each is written before the next is read"


# Tokenizers


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_the_tokenizer_comes_along(tmp_path, name):
    saved = save(tmp_path, name, extra=tokenizer_files(tmp_path / "tokenizer"))
    exported = export(saved, tmp_path / "hf")
    loader = transformers.PreTrainedTokenizerFast if name == "qwen2" else transformers.AutoTokenizer
    ours, theirs = small_tokenizer(), loader.from_pretrained(exported)
    for text in (TEXT, "  two  spaces\n\n", "", "fox"):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == ours.eos_id
    config = transformers.AutoConfig.from_pretrained(exported)
    assert config.eos_token_id == ours.eos_id
    imported = bring(exported, tmp_path / "back")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (imported / file).read_bytes() == (saved / file).read_bytes() == (exported / file).read_bytes()


def test_a_tokenizer_that_transformers_mistakes_is_pointed_out(tmp_path):
    """It takes Qwen2's own way of splitting text for every tokenizer beside a Qwen2 model."""
    files = tokenizer_files(tmp_path / "tokenizer")
    notes = {}
    for name in ("qwen2", "qwen3", "llama"):
        saved = save(tmp_path, name, extra=files)
        notes[name] = export_hf(Checkpoint(saved), str(tmp_path / name), "stored", GB, nothing).note
    assert "PreTrainedTokenizerFast" in notes.pop("qwen2")
    assert notes == {"qwen3": "", "llama": ""}
    mistaken = transformers.AutoTokenizer.from_pretrained(tmp_path / "qwen2")
    assert mistaken(TEXT)["input_ids"] != small_tokenizer().encode(TEXT), "the note is not needed any more"


def test_what_else_lies_beside_the_weights_is_carried(tmp_path):
    exported = export(save(tmp_path, "llama", extra=tokenizer_files(tmp_path / "tokenizer")), tmp_path / "hf")
    (exported / "chat_template.jinja").write_text("{{ messages }}")
    (exported / "generation_config.json").write_text('{"temperature": 0.6}')
    (exported / "modeling_custom.py").write_text("raise SystemExit")
    imported = bring(exported, tmp_path / "back")
    again = export(imported, tmp_path / "again")
    assert (again / "chat_template.jinja").read_text() == "{{ messages }}"
    assert transformers.AutoModelForCausalLM.from_pretrained(again).generation_config.temperature == 0.6
    assert not (imported / "modeling_custom.py").exists()


def test_a_tokenizer_from_elsewhere(tmp_path):
    exported = export(save(tmp_path, "llama"), tmp_path / "hf")
    assert not (exported / "tokenizer.json").exists()
    small_tokenizer().save(tmp_path / "tokenizer")
    imported = bring(exported, tmp_path / "a", tokenizer=str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert load_tokenizer(imported).fingerprint == small_tokenizer().fingerprint
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        bring(exported, tmp_path / "b", tokenizer=str(tmp_path / "nowhere"))
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer that can be read"):
        bring(exported, tmp_path / "b", tokenizer=str(tmp_path / "tokenizer"))
    assert config["vocab_size"] == VOCAB


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    model = random_model(model_config("llama", vocab_size=100))
    exported = export(save_model(tmp_path / "run", model), tmp_path / "hf")
    small_tokenizer().save(exported)
    with pytest.raises(CheckpointError, match="more tokens than the model"):
        bring(exported, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# Outputs


def test_nothing_is_written_over_and_nothing_half_done_stays(tmp_path, monkeypatch):
    saved = save(tmp_path, "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for output in (tmp_path / "full", tmp_path / "full" / "mine"):
        with pytest.raises(CheckpointError, match="nothing is written over"):
            export(saved, output)
    (tmp_path / "empty").mkdir()
    export(saved, tmp_path / "empty")
    with pytest.raises(CheckpointError, match="nothing is written over"):
        bring(tmp_path / "empty", tmp_path / "full")
    with pytest.raises(CheckpointError, match="folder of this machine"):
        export_hf(Checkpoint(saved), "s3://bucket/x", "stored", GB, nothing)

    def full(*unused):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_files_write, "write_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export(saved, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "run-llama"]


def test_a_model_that_transformers_does_not_have(tmp_path):
    model = random_model(model_config("llama", qk_norm=True, mlp_bias=True))
    saved = save_model(tmp_path / "run", model)
    with pytest.raises(CheckpointError, match="no class of transformers"):
        export(saved, tmp_path / "hf")
    export_dcp(Checkpoint(saved), str(tmp_path / "dcp"), "stored", "own", nothing)
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_that_is_not_what_it_says(tmp_path):
    saved = save(tmp_path, "llama")
    config = {"name": "small", "model": {**to_dict(model_config("llama")), "layers": 3}}
    with pytest.raises(CheckpointError, match=r"nothing for model\.layers\.2"):
        export(reconfigured(saved, tmp_path / "other", config), tmp_path / "hf")
    config["model"]["layers"] = 10**9
    with pytest.raises(ConfigErrors, match=r"'model\.layers' is out of range"):
        export(reconfigured(saved, tmp_path / "other", config), tmp_path / "hf")


def reconfigured(saved: Path, parent: Path, config: dict[str, Any]) -> Path:
    from tests.lab.checkpoints import write_whole

    return write_whole(parent, read_all(saved), config=config)


# Sources


def test_an_imported_checkpoint_says_what_it_is(tmp_path):
    exported = export(save(tmp_path, "qwen3"), tmp_path / "hf")
    imported = Checkpoint(bring(exported, tmp_path / "back"))
    imported.verify()
    assert imported.step == 0
    assert imported.state()["imported"] == {
        "format": "hf",
        "source": str(exported),
        "family": "qwen3",
        "dtypes": ["F32"],
    }
    assert from_dict(RunConfig, imported.config()).model == model_config("qwen3", name="hf")
    assert all(name.startswith("model.") for name in imported.manifest.tensors)


def _drop(exported: Path, name: str) -> None:
    tensors = load_file(exported / "model.safetensors")
    del tensors[name]
    save_file(tensors, exported / "model.safetensors")


def _edit(exported: Path, **changes: Any) -> None:
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, **changes}))


def _pickle_only(exported: Path) -> None:
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")


def _integers(exported: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, exported / "model.safetensors")


def _index(exported: Path, weight_map: Any) -> None:
    """An index in place of the single file, which would count."""
    (exported / "model.safetensors").rename(exported / "part.safetensors")
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_pickle_only, ["cannot be read as weights alone", "pytorch_model.bin"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["no weights in safetensors"]),
        (lambda folder: (folder / "config.json").unlink(), ["nothing says which model", "model=PRESET"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["not JSON"]),
        (lambda folder: (folder / "config.json").write_text("[1]"), ["not a JSON object"]),
        (lambda folder: _edit(folder, model_type="t5"), ["model_type=t5"]),
        (lambda folder: _edit(folder, hidden_size="wide"), ["does not describe a model", "dim"]),
        (lambda folder: _edit(folder, num_attention_heads=0), ["does not describe a model"]),
        (lambda folder: _edit(folder, num_key_value_heads=3), ["does not describe a model", "kv_heads"]),
        (lambda folder: _edit(folder, num_hidden_layers=10**9), ["model.layers", "out of range"]),
        (lambda folder: _edit(folder, num_hidden_layers=3), ["missing:   model.layers.2"]),
        (lambda folder: _edit(folder, vocab_size=10**12), ["model.vocab_size", "out of range"]),
        (lambda folder: _drop(folder, "model.norm.weight"), ["missing:   model.norm.weight"]),
        (lambda folder: _drop(folder, "model.embed_tokens.weight"), ["no embedding by a name that is known"]),
        (_integers, ["no floating point numbers", "I8"]),
        (lambda folder: _index(folder, {"a": "../x.safetensors"}), ["does not name files of its directory"]),
        (lambda folder: _index(folder, {"a": 3}), ["does not name files"]),
        (lambda folder: _index(folder, {}), ["does not name files"]),
        (lambda folder: _index(folder, {"a": "part.safetensors"}), ["not hold what their index lists"]),
        (lambda folder: _index(folder, {"a": "gone.safetensors"}), ["gone.safetensors"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), ["damaged"]),
    ],
)
def test_sources_that_cannot_be_imported(tmp_path, damage, words):
    exported = export(save(tmp_path, "llama"), tmp_path / "hf")
    damage(exported)
    with pytest.raises(CheckpointError) as caught:
        bring(exported, tmp_path / "back")
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob("*.partial-*"))


def test_a_tensor_in_two_files(tmp_path):
    exported = export(save(tmp_path, "llama"), tmp_path / "hf", limit=20_000)
    shutil.copy(next(exported.glob("model-00001-of-*.safetensors")), exported / "again.safetensors")
    path = exported / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {**index, "more": "again.safetensors"}}))
    with pytest.raises(CheckpointError, match="is there twice"):
        bring(exported, tmp_path / "back")


def test_what_is_no_source(tmp_path):
    saved = save(tmp_path, "llama")
    with pytest.raises(CheckpointError, match="nothing to import here"):
        detect_format(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"train\.init_from"):
        detect_format(saved)
